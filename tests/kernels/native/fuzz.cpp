// Calls every function of the native CPU library with random arguments for a while, and checks each result against
// a plain definition in double. Buffers have no element to spare, so that AddressSanitizer sees any overrun.
//
//     fuzz SECONDS SEED [FIRST_CASE]
//
// A case depends on the seed and its number only: FIRST_CASE begins with the one that a failure named. Exits with 1
// on a mismatch.
#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "csae_cpu.h"

extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

void impossible_arguments();  // impossible_arguments.cpp

namespace {

constexpr double unit = 1.0 / (1 << 24);  // of float: the largest relative error of one operation
constexpr double least = std::numeric_limits<float>::denorm_min();
constexpr int untouched = -777;

unsigned seed, case_number;
const char* function = "impossible_arguments";
std::mt19937_64 random_bits;

void say_where() {
    std::fprintf(stderr, "fuzz: %s, seed %u, case %u, isa %d\n", function, seed, case_number, csae_isa());
}

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "fuzz: %s\n", what.c_str());
    say_where();
    std::exit(1);
}

void check(bool good, const char* what) {
    if (!good) fail(what);
}

void check_status(int status, int wanted) {
    if (status != wanted) fail("status " + std::to_string(status) + ", wanted " + std::to_string(wanted));
}

// --- random arguments ----------------------------------------------------------------------------------------

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
bool one_in(int64_t n) { return below(n) == 0; }

enum Kind { plain, ties, special };

float number(Kind kind) {
    constexpr float few[] = {-1.0f, -0.0f, 0.0f, 0.5f, 1.0f};
    constexpr float rare[] = {NAN, INFINITY, -INFINITY, -0.0f, 1e-45f, -1e-45f};
    if (kind == ties) return few[below(5)];
    if (kind == special && one_in(60)) return rare[below(6)];
    return static_cast<float>(below(1 << 24)) / (1 << 22) - 2.0f;
}

int some_threads() { return one_in(40) ? (one_in(2) ? INT_MAX : 1 << 30) : 1 + static_cast<int>(below(5)); }

// Null where it is empty, as an empty tensor of torch is.
template <class T>
std::unique_ptr<T[]> allocate(int64_t size) {
    return std::unique_ptr<T[]>(size > 0 ? new T[static_cast<size_t>(size)] : nullptr);
}

// What is between the rows holds `untouched`.
template <class T>
struct Matrix {
    int64_t rows, columns, stride, size;
    std::unique_ptr<T[]> memory;

    Matrix(int64_t rows, int64_t columns, int64_t stride)
        : rows(rows),
          columns(columns),
          stride(stride),
          size(rows * columns == 0 ? 0 : (rows - 1) * stride + columns),
          memory(allocate<T>(size)) {
        std::fill_n(memory.get(), size, static_cast<T>(untouched));
    }
    T* data() const { return memory.get(); }
    T& operator()(int64_t i, int64_t j) const { return memory[i * stride + j]; }

    void check_between_rows() const {
        for (int64_t at = 0; rows > 1 && at < size; ++at) {
            if (at % stride >= columns) check(memory[at] == static_cast<T>(untouched), "wrote between two rows");
        }
    }
    void check_same_bits(const Matrix& other, const char* what) const {
        for (int64_t i = 0; i < rows * columns; ++i) {
            const T &a = (*this)(i / columns, i % columns), &b = other(i / columns, i % columns);
            check(std::memcmp(&a, &b, sizeof a) == 0, what);
        }
    }
};

int64_t input_stride(int64_t columns) {
    const int64_t strides[] = {columns, columns + below(9), below(columns + 1), 0};
    return strides[below(4)];
}

// The stride of a single row is of no meaning.
int64_t output_stride(int64_t rows, int64_t columns) { return rows > 1 ? columns + below(5) : below(5); }

template <class T>
Matrix<T> input(int64_t rows, int64_t columns) {
    return {rows, columns, input_stride(columns)};
}

Matrix<float> input_of(int64_t rows, int64_t columns, Kind kind) {
    auto matrix = input<float>(rows, columns);
    for (int64_t at = 0; at < matrix.size; ++at) matrix.memory[at] = number(kind);
    return matrix;
}

template <class T>
Matrix<T> output(int64_t rows, int64_t columns) {
    return {rows, columns, output_stride(rows, columns)};
}

// A matrix of floats or of bfloat16, which are the upper halves of floats.
struct Stored {
    int type;
    Matrix<float> floats;
    Matrix<uint16_t> halves;

    Stored(int type, int64_t rows, int64_t columns, int64_t stride)
        : type(type),
          floats(type == csae_float32 ? rows : 0, columns, stride),
          halves(type == csae_float32 ? 0 : rows, columns, stride) {}
    void* data() const { return type == csae_float32 ? static_cast<void*>(floats.data()) : halves.data(); }
    int64_t stride() const { return floats.stride; }
    float operator()(int64_t i, int64_t j) const {
        if (type == csae_float32) return floats(i, j);
        const uint32_t bits = uint32_t{halves(i, j)} << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    void set(int64_t i, int64_t j, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (type == csae_float32) {
            floats(i, j) = x;
        } else {  // a NaN that is all in the lower half becomes infinity, as good a number as any
            halves(i, j) = static_cast<uint16_t>(bits >> 16);
        }
    }
    double rounding() const { return type == csae_float32 ? 0 : 1.0 / 256; }
    void check_between_rows() const {
        floats.check_between_rows();
        halves.check_between_rows();
    }
    void check_same_bits(const Stored& other, const char* what) const {
        floats.check_same_bits(other.floats, what);
        halves.check_same_bits(other.halves, what);
    }
};

int some_type() { return one_in(2) ? csae_float32 : csae_bfloat16; }

Stored stored_of(int type, int64_t rows, int64_t columns, Kind kind) {
    Stored matrix(type, rows, columns, input_stride(columns));
    for (int64_t i = 0; i < rows * columns; ++i) matrix.set(i / columns, i % columns, number(kind));
    return matrix;
}

Stored stored_output(int type, int64_t rows, int64_t columns) {
    return {type, rows, columns, output_stride(rows, columns)};
}

// --- results -------------------------------------------------------------------------------------------------

// What a float should be: the terms' sum, and that of their sizes, to which rounding is relative.
struct Sum {
    double value = 0, size = 0;
    int64_t count = 0;

    void add(double term, double size_of_term) {
        value += term;
        size += size_of_term;
        ++count;
    }
    void add(double term) { add(term, std::abs(term)); }
    bool near(float x, double rounding) const {
        if (std::isnan(value)) return std::isnan(x);
        return std::isinf(value) ? x == value : std::abs(x - value) <= rounding * size + 2 * least * (count + 1);
    }
};

void check_near(float x, const Sum& sum, double rounding, const char* name) {
    if (sum.near(x, rounding)) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.9g, wanted %.9g; error over size of terms %.3g, allowed %.3g", name, x,
                  sum.value, std::abs(x - sum.value) / sum.size, rounding);
    fail(text);
}

// --- csae_topk_add, csae_topk_finish ---------------------------------------------------------------------------

void add_tile(const csae_topk& best, const Stored& pre_acts, const Matrix<float>& bias, int64_t first, int64_t width) {
    const int64_t n = best.n;
    Stored tile(pre_acts.type, n, width, one_in(2) ? width : width + below(9));
    const auto of_tile = allocate<float>(width);
    std::copy_n(bias.data() + first, width, of_tile.get());
    for (int64_t i = 0; i < n * width; ++i) tile.set(i / width, i % width, pre_acts(i / width, first + i % width));
    check_status(
        csae_topk_add(&best, tile.data(), tile.stride(), tile.type, of_tile.get(), width, first, some_threads()),
        csae_ok);
}

void topk_rows() {
    function = "csae_topk_add";
    const bool large = one_in(16);  // enough for two threads
    const int64_t n = large ? 24 + below(24) : below(7), d_sae = 1 + below(large ? 3000 : 300);
    const int64_t k = 1 + below(one_in(2) ? d_sae : std::min<int64_t>(d_sae, 40));
    const auto kind = static_cast<Kind>(below(3));
    const Stored pre_acts = stored_of(some_type(), n, d_sae, kind);
    const auto bias = input_of(1, d_sae, one_in(2) ? kind : plain);
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    const int64_t capacity = k + 64 + below(one_in(2) ? 64 : 2 * d_sae);
    const Matrix<int32_t> orders(n, capacity, capacity), columns(n, capacity, capacity), count(1, n, n);
    const Matrix<float> threshold(1, n, n);
    std::fill_n(count.data(), n, 0);
    std::fill_n(threshold.data(), n, -INFINITY);
    const csae_topk best = {orders.data(), columns.data(), threshold.data(), count.data(), n, k, capacity};
    for (int64_t first = 0, width; first < d_sae; first += width) {
        width = std::min(d_sae - first, one_in(2) ? d_sae : 1 + below(200));
        add_tile(best, pre_acts, bias, first, width);
    }
    function = "csae_topk_finish";
    check_status(csae_topk_finish(&best, values.data(), values.stride, indices.data(), indices.stride, some_threads()),
                 csae_ok);
    std::vector<float> row(static_cast<size_t>(d_sae));
    std::vector<int64_t> order(static_cast<size_t>(d_sae));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t c = 0; c < d_sae; ++c) row[c] = pre_acts(i, c) + bias(0, c);
        const bool nan = std::any_of(row.begin(), row.end(), [](float x) { return std::isnan(x); });
        for (int64_t c = 0; c < d_sae; ++c) order[c] = c;
        const auto before = [&](int64_t a, int64_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
        if (!nan) std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
        for (int64_t j = 0; j < k; ++j) {
            check(indices(i, j) == order[j], "wrong index");
            check(nan ? std::isnan(values(i, j)) : values(i, j) == std::max(row[order[j]], 0.0f), "wrong value");
        }
    }
    values.check_between_rows();
    indices.check_between_rows();
}

// --- csae_round_rows, csae_topk_settle -------------------------------------------------------------------------

struct Rounded {
    Stored rows;
    std::unique_ptr<float[]> lengths, errors;
};

Rounded round_rows(const Matrix<float>& rows) {
    function = "csae_round_rows";
    const int64_t n = rows.rows, d = rows.columns;
    Rounded found{stored_output(csae_bfloat16, n, d), allocate<float>(n), allocate<float>(n)};
    check_status(csae_round_rows(rows.data(), rows.stride, n, d, found.rows.data(), found.rows.stride(),
                                 found.lengths.get(), found.errors.get(), some_threads()),
                 csae_ok);
    found.rows.check_between_rows();
    for (int64_t i = 0; i < n; ++i) {
        double square = 0, lost = 0;
        for (int64_t c = 0; c < d; ++c) {
            const double x = rows(i, c), rounded = found.rows(i, c);
            const bool same = std::isnan(x) ? std::isnan(rounded) : x == rounded;
            check(same || std::abs(x - rounded) <= std::abs(x) / 256 + 1e-40, "rounded too far");
            square += x * x;
            lost += (x - rounded) * (x - rounded);
        }
        if (!std::isfinite(square)) continue;
        check(std::abs(found.lengths[i] - std::sqrt(square)) <= std::sqrt(square) / 1024 + 1e-18, "wrong length");
        check(std::abs(found.errors[i] - std::sqrt(lost)) <= std::sqrt(lost) / 1024 + 1e-18, "wrong error");
    }
    return found;
}

void topk_settle() {
    const int64_t n = below(12), d = 1 + below(60), d_sae = 70 + below(300), k = 1 + below(12);
    const auto kind = static_cast<Kind>(below(3));
    const auto x = input_of(n, d, kind), bias = input_of(1, d_sae, one_in(2) ? kind : plain);
    const auto wide = input_of(d_sae, d, kind);
    Stored table(some_type(), d_sae, d, input_stride(d));
    for (int64_t i = 0; i < d_sae * d; ++i) table.set(i / d, i % d, wide(i / d, i % d));
    const Rounded acts = round_rows(x), weights = round_rows(wide);
    const bool as_stored = table.type == csae_bfloat16;
    // The product of what was rounded, itself rounded.
    Matrix<float> product(n, d_sae, d_sae), dots(n, d_sae, d_sae);
    double longest = 0, most_lost = 0;
    float largest_bias = 0;
    for (int64_t f = 0; f < d_sae; ++f) {
        double square = 0, lost = 0;
        for (int64_t c = 0; c < d; ++c) {
            const double w = table(f, c), rounded = as_stored ? w : weights.rows(f, c);
            square += w * w;
            lost += (w - rounded) * (w - rounded);
        }
        // What is not finite stays: such rows can't be settled.
        longest = square <= longest * longest ? longest : std::sqrt(square);
        most_lost = lost <= most_lost * most_lost ? most_lost : std::sqrt(lost);
        largest_bias = std::abs(bias(0, f)) <= largest_bias ? largest_bias : std::abs(bias(0, f));
        for (int64_t i = 0; i < n; ++i) {
            double coarse = 0, fine = 0;
            for (int64_t c = 0; c < d; ++c) {
                coarse += double{acts.rows(i, c)} * (as_stored ? table(f, c) : weights.rows(f, c));
                fine += double{x(i, c)} * table(f, c);
            }
            product(i, f) = static_cast<float>(coarse);
            dots(i, f) = static_cast<float>(fine);
        }
    }
    const Rounded tiles = round_rows(product);
    const int64_t candidates = k + 1 + below(56), capacity = candidates + 64 + below(100);
    const Matrix<int32_t> orders(n, capacity, capacity), columns(n, capacity, capacity), count(1, n, n);
    const Matrix<float> threshold(1, n, n), errors(1, n, n);
    std::fill_n(count.data(), n, 0);
    std::fill_n(threshold.data(), n, -INFINITY);
    std::vector<bool> hopeless(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
        const double length = acts.lengths[i] * 1.002, lost = acts.errors[i] * 1.002;
        errors(0, i) = static_cast<float>(lost * longest + (length + lost) * most_lost + 1e-4 * length * longest +
                                          1e-5 * largest_bias + 1e-16);
        if (one_in(8)) errors(0, i) = one_in(2) ? INFINITY : NAN;
        hopeless[i] = !std::isfinite(errors(0, i));
    }
    const csae_topk best = {orders.data(), columns.data(), threshold.data(), count.data(), n, candidates, capacity};
    function = "csae_topk_add";
    for (int64_t first = 0, width; first < d_sae; first += width) {
        width = std::min(d_sae - first, 1 + below(200));
        add_tile(best, tiles.rows, bias, first, width);
    }
    function = "csae_topk_settle";
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    const auto settled = allocate<uint8_t>(n);
    check_status(csae_topk_settle(&best, k, x.data(), x.stride, table.data(), table.stride(), d_sae, d, table.type,
                                  bias.data(), largest_bias, errors.data(), values.data(), values.stride,
                                  indices.data(), indices.stride, settled.get(), some_threads()),
                 csae_ok);
    values.check_between_rows();
    indices.check_between_rows();
    for (int64_t i = 0; i < n; ++i) {
        check(!(hopeless[i] && settled[i]), "settled without a bound");
        if (!settled[i]) continue;
        std::vector<bool> chosen(static_cast<size_t>(d_sae));
        const double slack = 1e-5 * (acts.lengths[i] * longest + largest_bias + 1);
        double lowest = INFINITY;
        for (int64_t j = 0; j < k; ++j) {
            const int64_t f = indices(i, j);
            const double wanted = double{dots(i, f)} + bias(0, f);
            check(!chosen[f], "a column twice");
            chosen[f] = true;
            check(std::abs(values(i, j) - std::max(wanted, 0.0)) <= slack, "wrong value");
            check(j == 0 || values(i, j) <= values(i, j - 1), "not in order");
            lowest = std::min(lowest, wanted);
        }
        for (int64_t f = 0; f < d_sae; ++f) {
            check(chosen[f] || !(double{dots(i, f)} + bias(0, f) > lowest + slack), "a larger one was missed");
        }
    }
}

// --- csae_gather_sum, csae_gather_dot ----------------------------------------------------------------------------

void gather(bool dot) {
    function = dot ? "csae_gather_dot" : "csae_gather_sum";
    const int64_t n = below(20), k = below(20), d_sae = one_in(16) ? 0 : 1 + below(50), d = below(300);
    const auto kind = static_cast<Kind>(below(3));
    const auto first = input_of(n, dot ? d : k, kind);
    const Stored table = stored_of(some_type(), d_sae, d, kind);
    const auto indices = input<int64_t>(n, k);  // between its rows they are out of range: they must not be looked at
    for (int64_t i = 0; i < n * k; ++i) indices(i / k, i % k) = d_sae == 0 ? 0 : below(d_sae);
    bool in_range = n * k == 0 || d_sae > 0;
    if (n * k > 0 && one_in(8)) {
        const int64_t outside[] = {-1, d_sae, INT64_MAX, INT64_MIN};
        indices(below(n), below(k)) = outside[below(4)];
        in_range = false;
    }
    const Stored out = stored_output(dot ? csae_float32 : table.type, n, dot ? k : d);
    const auto run = [&](const Stored& to, int n_threads) {
        const int status =
            dot ? csae_gather_dot(first.data(), first.stride, indices.data(), indices.stride, n, k, table.data(),
                                  table.stride(), d_sae, d, table.type, to.floats.data(), to.stride(), n_threads)
                : csae_gather_sum(first.data(), first.stride, indices.data(), indices.stride, n, k, table.data(),
                                  table.stride(), d_sae, d, table.type, to.data(), to.stride(), n_threads);
        check_status(status, in_range ? csae_ok : csae_bad_index);
        to.check_between_rows();
    };
    run(out, some_threads());
    if (!in_range) return;

    const int64_t columns = dot ? k : d;
    std::vector<Sum> wanted(static_cast<size_t>(n * columns));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < k; ++j) {
            for (int64_t c = 0; c < d; ++c) {
                wanted[i * columns + (dot ? j : c)].add(double{first(i, dot ? c : j)} * table(indices(i, j), c));
            }
        }
    }
    for (int64_t i = 0; i < n * columns; ++i) {
        const double rounding = (wanted[i].count + 1) * unit + out.rounding();
        check_near(out(i / columns, i % columns), wanted[i], rounding, "an element of out");
    }
    const Stored alone(out.type, n, columns, out.stride());
    run(alone, 1);
    out.check_same_bits(alone, "other bits with threads");
}

// --- csae_sort_pairs, csae_feature_sums, csae_adam_rows ----------------------------------------------------------

struct Gradient {
    int64_t d;
    Matrix<float> weights;
    Stored rows;
    csae_gradient view;
    std::vector<Sum> wanted;  // [d_sae, d]

    Gradient(int64_t n_pairs, int64_t n, int64_t d, Kind kind)
        : d(d), weights(1, n_pairs, n_pairs), rows(stored_of(some_type(), n, d, kind)) {
        for (int64_t p = 0; p < n_pairs; ++p) weights(0, p) = number(kind);
        view = {weights.data(), rows.data(), rows.stride(), n, d, rows.type};
    }
};

// A table before or after its step.
struct AdamTable {
    const Gradient* gradient;
    Matrix<float> param;
    Stored exp_avg, exp_avg_sq;
    bool unit_rows;

    AdamTable(const Gradient& gradient, int64_t d_sae, int moments_type, bool unit_rows)
        : gradient(&gradient),
          param(output<float>(d_sae, gradient.d)),
          exp_avg(stored_output(moments_type, d_sae, gradient.d)),
          exp_avg_sq(stored_output(moments_type, d_sae, gradient.d)),
          unit_rows(unit_rows) {}
    // Moments are such that bfloat16 holds them.
    void fill(Kind kind) {
        for (int64_t i = 0; i < param.rows * param.columns; ++i) {
            const int64_t f = i / param.columns, c = i % param.columns;
            param(f, c) = number(kind);
            Stored number_of_bfloat16(csae_bfloat16, 1, 2, 2);
            number_of_bfloat16.set(0, 0, number(kind));
            number_of_bfloat16.set(0, 1, std::abs(number(kind)));
            exp_avg.set(f, c, number_of_bfloat16(0, 0));
            exp_avg_sq.set(f, c, number_of_bfloat16(0, 1));
        }
    }
    void fill(const AdamTable& other) {
        for (int64_t i = 0; i < param.rows * param.columns; ++i) {
            const int64_t f = i / param.columns, c = i % param.columns;
            param(f, c) = other.param(f, c);
            exp_avg.set(f, c, other.exp_avg(f, c));
            exp_avg_sq.set(f, c, other.exp_avg_sq(f, c));
        }
    }
    csae_table view() const {
        return {gradient->view,    param.data(), exp_avg.data(),      exp_avg_sq.data(), param.stride,
                exp_avg.stride(), exp_avg_sq.stride(), exp_avg.type, unit_rows};
    }
    void check_between_rows() const {
        param.check_between_rows();
        exp_avg.check_between_rows();
        exp_avg_sq.check_between_rows();
    }
    void check_same_bits(const AdamTable& other, const char* what) const {
        param.check_same_bits(other.param, what);
        exp_avg.check_same_bits(other.exp_avg, what);
        exp_avg_sq.check_same_bits(other.exp_avg_sq, what);
    }
};

uint32_t hash32(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

uint16_t rounded_by_chance(float x, uint32_t seed, uint32_t place) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>((bits + (hash32(place ^ hash32(seed)) >> 16)) >> 16);
}

// A row of a table with moments in float, from what it was.
void check_step(const AdamTable& now, const AdamTable& before, int64_t f, const csae_adam& step) {
    const int64_t d = now.param.columns;
    const Sum* gradient = now.gradient->wanted.data() + f * d;
    double along = 0, size_of_along = 0;
    for (int64_t c = 0; now.unit_rows && c < d; ++c) {
        along += gradient[c].value * before.param(f, c);
        size_of_along += gradient[c].size * std::abs(before.param(f, c));
    }
    std::vector<double> row;
    double squares = 0;
    for (int64_t c = 0; c < d; ++c) {
        const double w = before.param(f, c), rounding = (gradient[c].count + 2 * d + 8) * unit;
        Sum g, m, v;
        g.add(gradient[c].value, gradient[c].size);
        g.add(-along * w, size_of_along * std::abs(w));
        m.add(before.exp_avg(f, c) * (1.0 - step.one_minus_beta1), 2 * std::abs(before.exp_avg(f, c)));
        m.add(g.value * step.one_minus_beta1, g.size * step.one_minus_beta1);
        v.add(double{before.exp_avg_sq(f, c)} * step.beta2);
        v.add(g.value * g.value * step.one_minus_beta2, g.size * g.size);
        check_near(now.exp_avg(f, c), m, rounding, "an element of exp_avg");
        check_near(now.exp_avg_sq(f, c), v, 3 * rounding, "an element of exp_avg_sq");
        // From here on from the moments as they are, whose rounding an eps can make large.
        const double root = std::sqrt(double{now.exp_avg_sq(f, c)});
        row.push_back(w - step.step_size * double{now.exp_avg(f, c)} / (root * step.correction + step.eps));
        squares += row.back() * row.back();
    }
    const double norm = now.unit_rows ? std::max(std::sqrt(squares), 1e-12) : 1;
    for (int64_t c = 0; c < d; ++c) {
        Sum w;
        w.add(row[c] / norm, (2 * std::abs(before.param(f, c)) + std::abs(row[c])) / norm);
        check_near(now.param(f, c), w, (d + 16) * unit, "an element of param");
    }
}

void feature_rows() {
    function = "csae_sort_pairs";
    const bool large = one_in(16);  // enough to be sorted in two threads, and for long runs
    const int64_t n_pairs = large ? 66000 + below(4000) : below(80), n = below(20) + (n_pairs > 0);
    const int64_t d_sae = one_in(16) ? 0 : 1 + below(50);
    const auto kind = static_cast<Kind>(below(3));
    const Matrix<int64_t> features(1, n_pairs, n_pairs), tokens(1, n_pairs, n_pairs);
    const int64_t often = below(d_sae + 1);
    for (int64_t p = 0; p < n_pairs; ++p) {
        const int64_t some[] = {below(d_sae + 1), below(d_sae + 1), below(d_sae + 1), often, d_sae, -1, INT64_MIN};
        features(0, p) = some[below(one_in(9) ? 7 : 4)];
        tokens(0, p) = below(n);
    }
    const Matrix<int64_t> order(1, n_pairs, n_pairs), sorted_tokens(1, n_pairs, n_pairs), ends(1, d_sae + 1, 0);
    check_status(csae_sort_pairs(features.data(), tokens.data(), n_pairs, d_sae, order.data(), sorted_tokens.data(),
                                 ends.data(), some_threads()),
                 csae_ok);
    const auto key = [&](int64_t p) { return features(0, p) < 0 ? d_sae : std::min(features(0, p), d_sae); };
    std::vector<int64_t> wanted_order, wanted_ends(static_cast<size_t>(d_sae) + 2);
    for (int64_t p = 0; p < n_pairs; ++p) wanted_order.push_back(p);
    std::stable_sort(wanted_order.begin(), wanted_order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
    for (int64_t p = 0; p < n_pairs; ++p) ++wanted_ends[key(p) + 1];
    for (int64_t f = 0; f <= d_sae; ++f) {
        if (f > 0) wanted_ends[f] += wanted_ends[f - 1];
        check(ends(0, f) == wanted_ends[f], "wrong end");
    }
    for (int64_t p = 0; p < n_pairs; ++p) {
        check(order(0, p) == wanted_order[p], "wrong order");
        check(sorted_tokens(0, p) == tokens(0, wanted_order[p]), "wrong token");
    }

    function = "csae_feature_sums";
    const csae_pairs pairs = {order.data(), sorted_tokens.data(), ends.data(), n_pairs, d_sae};
    std::vector<Gradient> gradients;
    const int64_t n_tables = below(4);
    for (int64_t i = 0; i < n_tables; ++i) gradients.emplace_back(n_pairs, n, below(large ? 5 : 300), kind);
    for (Gradient& of : gradients) {
        of.wanted.resize(static_cast<size_t>(d_sae * of.d));
        for (int64_t p = 0; p < n_pairs; ++p) {
            for (int64_t c = 0; key(p) < d_sae && c < of.d; ++c) {
                of.wanted[key(p) * of.d + c].add(double{of.weights(0, p)} * of.rows(tokens(0, p), c));
            }
        }
    }
    int wanted_status = csae_ok;
    if (wanted_ends[d_sae] > 0 && one_in(8)) {  // what comes after it belongs to no feature
        int64_t* const places[] = {&order(0, below(wanted_ends[d_sae])), &sorted_tokens(0, below(wanted_ends[d_sae])),
                                   &ends(0, below(d_sae + 1))};
        const int64_t outside[] = {-1, n_pairs + n, INT64_MAX, INT64_MIN};
        *places[below(n_tables > 0 ? 3 : 1)] = outside[below(4)];
        wanted_status = csae_bad_index;
    }
    const auto sum = [&](int n_threads) {
        std::vector<Stored> sums;
        std::vector<csae_dense_gradient> tables;
        for (const Gradient& of : gradients) {
            sums.push_back(stored_output(of.rows.type, d_sae, of.d));
            tables.push_back({of.view, sums.back().data(), sums.back().stride()});
        }
        check_status(csae_feature_sums(&pairs, tables.data(), static_cast<int>(n_tables), n_threads), wanted_status);
        for (const Stored& out : sums) out.check_between_rows();
        return sums;
    };
    const auto sums = sum(some_threads()), sums_alone = sum(1);
    for (size_t i = 0; wanted_status == csae_ok && i < sums.size(); ++i) {
        const int64_t d = gradients[i].d;
        sums[i].check_same_bits(sums_alone[i], "other bits with threads");
        for (int64_t e = 0; e < d_sae * d; ++e) {
            const Sum& wanted = gradients[i].wanted[e];
            const double rounding = (wanted.count + 1) * unit + sums[i].rounding();
            check_near(sums[i](e / d, e % d), wanted, rounding, "an element of out");
        }
    }

    function = "csae_adam_rows";
    const auto between = [](double low, double high) {
        return static_cast<float>(low + (high - low) * static_cast<double>(below(1000)) / 1000);
    };
    const csae_adam step = {between(0, 0.1), between(1, 5),    between(1e-8, 1e-3), between(0, 1),
                            between(0, 1),   between(0, 1), static_cast<uint32_t>(random_bits()), one_in(2)};
    std::vector<AdamTable> before;
    for (const Gradient& of : gradients) {
        before.emplace_back(of, d_sae, csae_float32, one_in(2));
        before.back().fill(kind);
    }
    const auto update = [&](int moments_type, int n_threads) {
        std::vector<AdamTable> now;
        std::vector<csae_table> tables;
        for (const AdamTable& table : before) {
            now.emplace_back(*table.gradient, d_sae, moments_type, table.unit_rows);
            now.back().fill(table);
            tables.push_back(now.back().view());
        }
        check_status(csae_adam_rows(&pairs, tables.data(), static_cast<int>(n_tables), &step, n_threads),
                     wanted_status);
        for (const AdamTable& table : now) table.check_between_rows();
        return now;
    };
    const auto in_float = update(csae_float32, some_threads()), in_bfloat16 = update(csae_bfloat16, some_threads());
    const auto float_alone = update(csae_float32, 1), bfloat16_alone = update(csae_bfloat16, 1);
    for (size_t i = 0; i < before.size(); ++i) {
        in_float[i].check_same_bits(float_alone[i], "other bits with threads");
        in_bfloat16[i].check_same_bits(bfloat16_alone[i], "other bits with threads");
        if (wanted_status != csae_ok) in_float[i].check_same_bits(before[i], "refused, and updated");
        if (wanted_status != csae_ok || kind == special) continue;
        in_float[i].param.check_same_bits(in_bfloat16[i].param, "param depends on how moments are rounded");
        const int64_t d = gradients[i].d;
        for (int64_t f = 0; f < d_sae; ++f) {
            const bool updated = !step.lazy || wanted_ends[f] < wanted_ends[f + 1];
            if (updated) check_step(in_float[i], before[i], f, step);
            for (int64_t c = 0; c < d; ++c) {
                const auto place = static_cast<uint32_t>(f * d + c);
                const AdamTable& to = in_bfloat16[i];
                const float m = in_float[i].exp_avg(f, c), v = in_float[i].exp_avg_sq(f, c);
                if (!updated) {
                    const AdamTable& from = before[i];
                    check(m == from.exp_avg(f, c) && v == from.exp_avg_sq(f, c) && to.exp_avg(f, c) == m &&
                              to.exp_avg_sq(f, c) == v && in_float[i].param(f, c) == from.param(f, c),
                          "updated a row without a pair");
                    continue;
                }
                check(to.exp_avg.halves(f, c) == rounded_by_chance(m, step.seed, place), "exp_avg's rounding");
                check(to.exp_avg_sq.halves(f, c) == rounded_by_chance(v, step.seed + 0x9E3779B9u, place),
                      "exp_avg_sq's rounding");
            }
        }
    }
}

// --- csae_lookback_forward, csae_lookback_backward -------------------------------------------------------------

struct Heads {
    csae_heads view;
    std::unique_ptr<float[]> memory;

    Heads(int64_t B, int64_t T, int64_t H, int64_t d, Kind kind) {
        const int64_t gap = below(4);
        view.stride_t = one_in(2) ? d + gap : H * (d + gap);  // [B, H, T, d] or [B, T, H, d]
        view.stride_h = view.stride_t == d + gap ? T * (d + gap) : d + gap;
        view.stride_b = one_in(4) ? 0 : T * H * (d + gap);
        const int64_t last = (B - 1) * view.stride_b + (T - 1) * view.stride_t + (H - 1) * view.stride_h;
        const int64_t size = B * T * H * d == 0 ? 0 : last + d;
        memory = allocate<float>(size);
        for (int64_t i = 0; i < size; ++i) memory[i] = number(kind);
        view.x = memory.get();
    }
    float* at(int64_t b, int64_t t, int64_t h) const {
        return memory == nullptr ? nullptr : memory.get() + b * view.stride_b + t * view.stride_t + h * view.stride_h;
    }
};

void lookback() {
    function = "csae_lookback_forward";
    const int64_t B = below(3), T = below(one_in(4) ? 200 : 70), H = below(4);
    const int64_t d_head = 1 + below(40), d_value = below(40);
    const auto kind = static_cast<Kind>(below(3));
    const Heads q(B, T, H, d_head, kind), k(B, T, H, d_head, kind), v(B, T, H, d_value, kind);
    const Heads grad(B, T, H, d_value, kind);
    const auto slope = input_of(1, H, plain), null = input_of(1, H, plain);
    const Matrix<uint8_t> mask(B, T, T);
    const Matrix<int32_t> starts(B, T, T);
    const bool masked = one_in(2), bounded = one_in(2);
    for (int64_t i = 0; i < B * T; ++i) {
        const int32_t some[] = {0, -5, INT32_MIN, INT32_MAX, static_cast<int32_t>(below(T)), 64};
        mask.memory[i] = !masked || !one_in(3);
        starts.memory[i] = bounded ? some[below(6)] : 0;
        for (const Heads* of : {&q, &k, &v, &grad}) {  // what is hidden may be anything
            if (mask.memory[i] != 0 || of->view.stride_b == 0) continue;
            const int64_t d = of == &q || of == &k ? d_head : d_value;
            for (int64_t h = 0; h < H; ++h) std::fill_n(of->at(i / T, i % T, h), d, NAN);
        }
    }
    const csae_attention given = {
        q.view, k.view, v.view, slope.data(), null.data(), masked ? mask.data() : nullptr,
        bounded ? starts.data() : nullptr, B, T, H, d_head, d_value};

    const auto run = [&](std::vector<Matrix<float>>& results, int n_threads) {
        const int64_t n = B * T * H;
        for (int64_t size : {n * d_value, n, n * d_head, n * d_head, n * d_value, H, H}) {
            results.emplace_back(1, size, 0);
        }
        function = "csae_lookback_forward";
        check_status(csae_lookback_forward(&given, results[0].data(), results[1].data(), n_threads), csae_ok);
        function = "csae_lookback_backward";
        const csae_heads out = {results[0].data(), T * H * d_value, H * d_value, d_value};
        check_status(csae_lookback_backward(&given, &grad.view, &out, results[1].data(), results[2].data(),
                                            results[3].data(), results[4].data(), results[5].data(),
                                            results[6].data(), n_threads),
                     csae_ok);
    };
    std::vector<Matrix<float>> results, alone;
    run(results, some_threads());
    run(alone, 1);
    for (size_t i = 0; i < results.size(); ++i) {
        const size_t size = static_cast<size_t>(results[i].size) * sizeof(float);
        check(size == 0 || std::memcmp(results[i].data(), alone[i].data(), size) == 0, "other bits with threads");
    }
    // How NaN and infinity spread is for the tests of the package; here they look for what reads where it mustn't.
    if (kind == special) return;

    std::vector<std::vector<Sum>> wanted;
    for (const auto& result : results) wanted.emplace_back(static_cast<size_t>(result.size));
    const double scale = 1 / std::sqrt(static_cast<double>(d_head));
    for (int64_t i = 0; i < B * H * T; ++i) {
        const int64_t b = i / (H * T), h = i / T % H, t = i % T, row = (b * T + t) * H + h;
        const float *q_t = q.at(b, t, h), *grad_t = grad.at(b, t, h), null_h = null(0, h);
        std::vector<int64_t> seen;
        for (int64_t j = std::max(0, starts(b, t)); mask(b, t) && j < t; ++j) {
            if (mask(b, j)) seen.push_back(j);
        }
        std::vector<double> weights;
        double sum = std::exp(null_h);
        for (int64_t j : seen) {
            double score = -slope(0, h) * std::log(static_cast<double>(t - j));
            for (int64_t c = 0; c < d_head; ++c) score += scale * q_t[c] * k.at(b, j, h)[c];
            weights.push_back(std::exp(score));
            sum += weights.back();
        }
        wanted[1][i].add(std::log(sum), 1 + std::abs(std::log(sum)));
        Sum delta;
        for (int64_t c = 0; c < d_value; ++c) {
            Sum& out = wanted[0][row * d_value + c];
            for (size_t s = 0; s < seen.size(); ++s) out.add(weights[s] / sum * v.at(b, seen[s], h)[c]);
            delta.add(out.value * grad_t[c], out.size * std::abs(grad_t[c]));
        }
        for (size_t s = 0; s < seen.size(); ++s) {
            const int64_t j = seen[s], row_of_j = (b * T + j) * H + h;
            const double weight = weights[s] / sum;
            Sum d_score;
            d_score.add(-weight * delta.value, weight * delta.size);
            for (int64_t c = 0; c < d_value; ++c) {
                d_score.add(weight * grad_t[c] * v.at(b, j, h)[c]);
                wanted[4][row_of_j * d_value + c].add(weight * grad_t[c]);
            }
            const auto add = [&](Sum& to, double x) { to.add(d_score.value * x, d_score.size * std::abs(x)); };
            for (int64_t c = 0; c < d_head; ++c) {
                add(wanted[2][row * d_head + c], scale * k.at(b, j, h)[c]);
                add(wanted[3][row_of_j * d_head + c], scale * q_t[c]);
            }
            add(wanted[5][h], -std::log(static_cast<double>(t - j)));
        }
        const double weight = std::exp(null_h) / sum;
        if (mask(b, t)) wanted[6][h].add(-weight * delta.value, weight * delta.size);
    }
    const char* names[] = {"out", "lse", "d_q", "d_k", "d_v", "d_slope", "d_null"};
    for (size_t i = 0; i < results.size(); ++i) {
        for (int64_t c = 0; c < results[i].size; ++c) {
            check_near(results[i].memory[c], wanted[i][c], 64 * unit, names[i]);
        }
    }
}

// --- csae_read_memory --------------------------------------------------------------------------------------------

void read_memory() {
    function = "csae_read_memory";
    const int64_t B = below(4), L = 1 + below(one_in(4) ? 90 : 20), H = 1 + below(4);
    const int64_t d_head = 1 + below(40), d_value = below(40), width = H * (d_head + d_value);
    const int64_t t = below(one_in(3) ? 3 * L : L + 1);
    const auto kind = static_cast<Kind>(below(3));
    const auto q = input_of(B, H * d_head, kind), slope = input_of(1, H, plain), null = input_of(1, H, plain);
    const int64_t stride_l = input_stride(width), strides_b[] = {L * stride_l, L * stride_l + below(5), 0};
    const int64_t stride_b = strides_b[below(3)];
    const auto memory = input_of(1, B == 0 ? 0 : (B - 1) * stride_b + (L - 1) * stride_l + width, kind);
    const auto takes_part = input<uint8_t>(B, L);
    for (int64_t at = 0; at < takes_part.size; ++at) takes_part.memory[at] = !one_in(3);
    const Matrix<int64_t> start(1, B, B);
    const Matrix<uint8_t> looks(1, B, B);
    for (int64_t b = 0; b < B; ++b) {
        const int64_t some[] = {0, -5, INT64_MIN, INT64_MAX, below(t + 1)};
        start(0, b) = some[below(5)];
        looks(0, b) = !one_in(6);
    }
    const csae_memory given = {q.data(), q.stride, memory.data(), stride_b, stride_l, takes_part.data(),
                               takes_part.stride, slope.data(), null.data(), start.data(), looks.data(), B, L, H,
                               d_head, d_value, t};
    const auto out = output<float>(B, H * d_value), alone = output<float>(B, H * d_value);
    check_status(csae_read_memory(&given, out.data(), out.stride, some_threads()), csae_ok);
    check_status(csae_read_memory(&given, alone.data(), alone.stride, 1), csae_ok);
    out.check_between_rows();
    out.check_same_bits(alone, "other bits with threads");
    if (kind == special) return;  // as in lookback

    const double scale = 1 / std::sqrt(static_cast<double>(d_head));
    for (int64_t b = 0; b < B; ++b) {
        const auto row = [&](int64_t j) { return memory.data() + b * stride_b + j % L * stride_l; };
        for (int64_t h = 0; h < H; ++h) {
            std::vector<int64_t> seen;
            std::vector<double> weights;
            double sum = std::exp(static_cast<double>(null(0, h)));
            for (int64_t j = std::max({int64_t{0}, t - L, start(0, b)}); looks(0, b) && j < t; ++j) {
                if (!takes_part(b, j % L)) continue;
                double score = -slope(0, h) * std::log(static_cast<double>(t - j));
                for (int64_t c = 0; c < d_head; ++c) score += scale * q(b, h * d_head + c) * row(j)[h * d_head + c];
                seen.push_back(j);
                weights.push_back(std::exp(score));
                sum += weights.back();
            }
            for (int64_t c = 0; c < d_value; ++c) {
                Sum wanted;
                for (size_t s = 0; s < seen.size(); ++s) {
                    wanted.add(weights[s] / sum * row(seen[s])[H * d_head + h * d_value + c]);
                }
                check_near(out(b, h * d_value + c), wanted, 128 * unit, "out");
            }
        }
    }
}

// --- the choice of threads and instructions --------------------------------------------------------------------

// An OpenMP runtime that gives fewer threads than it was asked for.
void parallel(void (*work)(void*), void* data, unsigned n_threads, unsigned) {
    std::vector<std::thread> helpers;
    while (helpers.size() < std::min(n_threads / 2, 3u)) helpers.emplace_back(work, data);
    work(data);
    for (auto& helper : helpers) helper.join();
}

void choose_openmp(bool openmp) {
    function = "csae_use_openmp";
    csae_use_openmp(openmp ? reinterpret_cast<void*>(parallel) : nullptr);
    check((csae_openmp_file() != nullptr) == openmp, "csae_openmp_file doesn't say what is in use");
}

}  // namespace

int main(int n_arguments, char** arguments) {
    if (n_arguments < 3) return std::fprintf(stderr, "fuzz SECONDS SEED [FIRST_CASE]\n"), 2;
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(arguments[1]));
    seed = static_cast<unsigned>(std::atoi(arguments[2]));
    case_number = n_arguments > 3 ? static_cast<unsigned>(std::atoi(arguments[3])) : 0;
    if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(say_where);
    const int best = csae_isa();
    impossible_arguments();
    const unsigned first_case = case_number;
    for (; std::chrono::steady_clock::now() < end; ++case_number) {
        std::seed_seq seeds{seed, case_number};
        random_bits.seed(seeds);
        const int isa = static_cast<int>(case_number / 7) % (best + 1);
        function = "csae_use_isa";
        check(csae_use_isa(isa) == csae_ok && csae_isa() == isa, "doesn't use what this CPU has");
        choose_openmp(one_in(4));
        switch (case_number % 7) {
            case 0: topk_rows(); break;
            case 1: gather(true); break;
            case 2: gather(false); break;
            case 3: feature_rows(); break;
            case 4: lookback(); break;
            case 5: read_memory(); break;
            case 6: topk_settle(); break;
        }
    }
    std::printf("%u cases, instruction sets 0 to %d\n", case_number - first_case, best);
}
