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
};

template <class T>
Matrix<T> input(int64_t rows, int64_t columns) {
    const int64_t strides[] = {columns, columns + below(9), below(columns + 1), 0};
    return {rows, columns, strides[below(4)]};
}

Matrix<float> input_of(int64_t rows, int64_t columns, Kind kind) {
    auto matrix = input<float>(rows, columns);
    for (int64_t at = 0; at < matrix.size; ++at) matrix.memory[at] = number(kind);
    return matrix;
}

// The stride of a single row is of no meaning.
template <class T>
Matrix<T> output(int64_t rows, int64_t columns) {
    return {rows, columns, rows > 1 ? columns + below(5) : below(5)};
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

void topk_rows() {
    function = "csae_topk_add";
    const bool large = one_in(16);  // enough for two threads
    const int64_t n = large ? 24 + below(24) : below(7), d_sae = 1 + below(large ? 3000 : 300);
    const int64_t k = 1 + below(one_in(2) ? d_sae : std::min<int64_t>(d_sae, 40));
    const auto kind = static_cast<Kind>(below(3));
    const auto pre_acts = input_of(n, d_sae, kind);
    const auto bias = input_of(1, d_sae, one_in(2) ? kind : plain);
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    const int64_t capacity = (k + 64 + below(one_in(2) ? 64 : 2 * d_sae) + 15) / 16 * 16;
    const Matrix<int32_t> orders(n, capacity, capacity), columns(n, capacity, capacity), count(1, n, n);
    const Matrix<float> threshold(1, n, n);
    std::fill_n(count.data(), n, 0);
    std::fill_n(threshold.data(), n, -INFINITY);
    const csae_topk best = {orders.data(), columns.data(), threshold.data(), count.data(), n, k, capacity};
    for (int64_t first = 0, width; first < d_sae; first += width) {
        width = std::min(d_sae - first, one_in(2) ? d_sae : 1 + below(200));
        Matrix<float> tile(n, width, one_in(2) ? width : width + below(9));
        const auto of_tile = allocate<float>(width);
        std::copy_n(bias.data() + first, width, of_tile.get());
        for (int64_t i = 0; i < n; ++i) std::copy_n(&pre_acts(i, first), width, &tile(i, 0));
        check_status(csae_topk_add(&best, tile.data(), tile.stride, of_tile.get(), width, first, some_threads()),
                     csae_ok);
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

// --- csae_gather_sum, csae_gather_dot, csae_feature_sum --------------------------------------------------------

using SparseSum = decltype(&csae_gather_sum);

void sparse_sum(SparseSum call) {
    const bool dot = call == csae_gather_dot, by_feature = call == csae_feature_sum;
    function = dot ? "csae_gather_dot" : by_feature ? "csae_feature_sum" : "csae_gather_sum";
    const bool large = one_in(16);  // enough for feature_sum to count in two threads
    const int64_t n = large ? 600 + below(200) : below(20), k = large ? 60 + below(20) : below(20);
    const int64_t d_sae = one_in(16) ? 0 : 1 + below(50), d = below(large ? 5 : 300);
    const auto kind = static_cast<Kind>(below(3));
    const auto first = input_of(n, dot ? d : k, kind);
    const auto second = input_of(by_feature ? n : d_sae, d, kind);
    const auto indices = input<int64_t>(n, k);  // between its rows they are out of range: they must not be looked at
    for (int64_t i = 0; i < n * k; ++i) indices(i / k, i % k) = d_sae == 0 ? 0 : below(d_sae);
    bool in_range = n * k == 0 || d_sae > 0;
    if (n * k > 0 && one_in(8)) {
        const int64_t outside[] = {-1, d_sae, INT64_MAX, INT64_MIN};
        indices(below(n), below(k)) = outside[below(4)];
        in_range = false;
    }
    const auto out = output<float>(by_feature ? d_sae : n, dot ? k : d);
    const auto run = [&](const Matrix<float>& to, int n_threads) {
        check_status(call(first.data(), first.stride, indices.data(), indices.stride, n, k, second.data(),
                          second.stride, d_sae, d, to.data(), to.stride, n_threads),
                     in_range ? csae_ok : csae_bad_index);
        to.check_between_rows();
    };
    run(out, some_threads());
    if (!in_range) return;

    std::vector<Sum> wanted(static_cast<size_t>(out.rows * out.columns));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < k; ++j) {
            const int64_t f = indices(i, j);
            for (int64_t c = 0; c < d; ++c) {
                const double term = double{first(i, dot ? c : j)} * second(by_feature ? i : f, c);
                wanted[(by_feature ? f : i) * out.columns + (dot ? j : c)].add(term);
            }
        }
    }
    const Matrix<float> alone(out.rows, out.columns, out.stride);
    run(alone, 1);
    for (int64_t i = 0; i < out.rows * out.columns; ++i) {
        const float& x = out(i / out.columns, i % out.columns);
        check_near(x, wanted[i], (wanted[i].count + 1) * unit, "an element of out");
        check(std::memcmp(&x, &alone(i / out.columns, i % out.columns), sizeof x) == 0, "other bits with threads");
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
        const int isa = static_cast<int>(case_number / 5) % (best + 1);
        function = "csae_use_isa";
        check(csae_use_isa(isa) == csae_ok && csae_isa() == isa, "doesn't use what this CPU has");
        choose_openmp(one_in(4));
        switch (case_number % 5) {
            case 0: topk_rows(); break;
            case 1: sparse_sum(csae_gather_sum); break;
            case 2: sparse_sum(csae_gather_dot); break;
            case 3: sparse_sum(csae_feature_sum); break;
            case 4: lookback(); break;
        }
    }
    std::printf("%u cases, instruction sets 0 to %d\n", case_number - first_case, best);
}
