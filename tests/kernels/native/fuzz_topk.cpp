// Cases of the row-wise top-k, and of the one that is settled after a product in bfloat16.
#include "fuzz.h"

namespace fuzz {
namespace {

// --- csae_topk_add, csae_topk_finish ---------------------------------------------------------------------------

void add_tile(const csae_topk& best, const Matrix<float>& pre_acts, const Matrix<float>& bias, int64_t first,
              int64_t width) {
    const int64_t n = best.n;
    Matrix<float> tile(n, width, one_in(2) ? width : width + below(9));
    const auto of_tile = allocate<float>(width);
    std::copy_n(bias.data() + first, width, of_tile.get());
    for (int64_t i = 0; i < n * width; ++i) tile(i / width, i % width) = pre_acts(i / width, first + i % width);
    check_status(csae_topk_add(&best, tile.data(), tile.stride, of_tile.get(), width, first, some_threads()), csae_ok);
}

}  // namespace

void topk_rows() {
    function = "csae_topk_add";
    const bool large = one_in(16);  // enough for two threads
    const int64_t n = large ? 24 + below(24) : below(7), d_sae = 1 + below(large ? 3000 : 300);
    const int64_t k = 1 + below(one_in(2) ? d_sae : std::min<int64_t>(d_sae, 40));
    const auto kind = static_cast<Kind>(below(3));
    const auto pre_acts = input_of(n, d_sae, kind), bias = input_of(1, d_sae, one_in(2) ? kind : plain);
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

// --- csae_above_add, csae_above_finish, csae_cut ----------------------------------------------------------------

namespace {

// Floors of zero or more, NaN and infinity among them, and ceilings or none.
struct Band {
    Matrix<float> floor, ceiling;
    bool has_ceiling;

    explicit Band(int64_t d_sae) : floor(1, d_sae, d_sae), ceiling(1, d_sae, d_sae), has_ceiling(one_in(3)) {
        for (int64_t c = 0; c < d_sae; ++c) {
            floor(0, c) = one_in(20) ? (one_in(2) ? NAN : INFINITY) : static_cast<float>(below(5)) / 2;
            ceiling(0, c) = floor(0, c) + static_cast<float>(below(4));
        }
    }
    csae_band from(int64_t first) const {
        return {floor.data() + first, has_ceiling ? ceiling.data() + first : nullptr};
    }
    bool inside(int64_t c, float x) const { return x > floor(0, c) && (!has_ceiling || x < ceiling(0, c)); }
};

void check_cut(const Matrix<float>& values, const Matrix<int64_t>& indices, int64_t n, int64_t k) {
    std::vector<std::pair<float, int64_t>> all;  // places, the largest value first, equal ones in order
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < k && values(i, j) > 0; ++j) all.emplace_back(values(i, j), i * k + j);
    }
    std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    const int64_t found = static_cast<int64_t>(all.size()), budget = below(2 * found + 2);
    std::vector<bool> kept(static_cast<size_t>(n * k));
    for (int64_t place = 0; place < std::min(found, budget); ++place) kept[all[place].second] = true;
    std::vector<float> before(static_cast<size_t>(n * k));
    std::vector<int64_t> columns(static_cast<size_t>(n * k));
    for (int64_t p = 0; p < n * k; ++p) {
        before[p] = values(p / k, p % k);
        columns[p] = indices(p / k, p % k);
    }
    function = "csae_cut";
    float threshold = -1;
    check_status(csae_cut(values.data(), values.stride, indices.data(), indices.stride, n, k, budget, &threshold),
                 csae_ok);
    check(threshold == (budget > 0 && budget <= found ? all[budget - 1].first : 0), "wrong threshold");
    for (int64_t p = 0; p < n * k; ++p) {
        const float value = values(p / k, p % k);
        const bool stays = kept[p] || std::isnan(before[p]);
        check(stays ? value == before[p] || std::isnan(value) : value == 0, "wrong value");
        check(indices(p / k, p % k) == (stays ? columns[p] : 0), "wrong index");
    }
}

}  // namespace

void above_rows() {
    function = "csae_above_add";
    const bool large = one_in(16);  // enough for two threads
    const int64_t n = large ? 24 + below(24) : below(7), d_sae = 1 + below(large ? 3000 : 300);
    const int64_t k = 1 + below(one_in(2) ? d_sae : std::min<int64_t>(d_sae, 40));
    const auto kind = static_cast<Kind>(below(3));
    const auto pre_acts = input_of(n, d_sae, kind), bias = input_of(1, d_sae, one_in(2) ? kind : plain);
    const Band band(d_sae);
    const int64_t capacity = k + 64 + below(one_in(2) ? 64 : 2 * d_sae);
    const Matrix<int32_t> orders(n, capacity, capacity), columns(n, capacity, capacity), count(1, n, n);
    const Matrix<float> threshold(1, n, n);
    std::fill_n(count.data(), n, 0);
    std::fill_n(threshold.data(), n, -INFINITY);
    const csae_topk best = {orders.data(), columns.data(), threshold.data(), count.data(), n, k, capacity};
    for (int64_t first = 0, width; first < d_sae; first += width) {
        width = std::min(d_sae - first, one_in(2) ? d_sae : 1 + below(200));
        const Matrix<float> tile(n, width, width + below(9));
        for (int64_t i = 0; i < n * width; ++i) tile(i / width, i % width) = pre_acts(i / width, first + i % width);
        const csae_band here = band.from(first);
        check_status(
            csae_above_add(&best, &here, tile.data(), tile.stride, bias.data() + first, width, first, some_threads()),
            csae_ok);
    }
    function = "csae_above_finish";
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    check_status(csae_above_finish(&best, values.data(), values.stride, indices.data(), indices.stride, some_threads()),
                 csae_ok);
    for (int64_t i = 0; i < n; ++i) {
        std::vector<std::pair<float, int64_t>> wanted;
        bool nan = false;
        for (int64_t c = 0; c < d_sae; ++c) {
            const float x = pre_acts(i, c) + bias(0, c);
            nan = nan || std::isnan(x);
            if (band.inside(c, x)) wanted.emplace_back(-x, c);
        }
        std::sort(wanted.begin(), wanted.end());
        wanted.resize(static_cast<size_t>(k), {0, 0});
        for (int64_t j = 0; j < k; ++j) {
            check(indices(i, j) == (nan ? j : wanted[j].second), "wrong index");
            check(nan ? std::isnan(values(i, j)) : values(i, j) == -wanted[j].first, "wrong value");
        }
    }
    check_cut(values, indices, n, k);
    values.check_between_rows();
    indices.check_between_rows();
}

namespace {

// --- csae_round_rows, csae_topk_settle ---------------------------------------------------

struct Rounded {
    Stored rows;
    std::unique_ptr<float[]> lengths, errors;
};

struct Squares {
    double row, lost;
};

// Of a row of d numbers, and of what rounding took from it.
template <class Rows>
Squares squares(const Rows& rows, const Stored& rounded, int64_t i, int64_t d) {
    Squares found{0, 0};
    for (int64_t c = 0; c < d; ++c) {
        const double x = rows(i, c), near = rounded(i, c);
        const bool same = std::isnan(x) ? std::isnan(near) : x == near;
        check(same || std::abs(x - near) <= std::abs(x) / 256 + 1e-40, "rounded too far");
        found.row += x * x;
        found.lost += (x - near) * (x - near);
    }
    return found;
}

Rounded round_rows(const Matrix<float>& rows) {
    function = "csae_round_rows";
    const int64_t n = rows.rows, d = rows.columns;
    Rounded found{stored_output(csae_bfloat16, n, d), allocate<float>(n), allocate<float>(n)};
    check_status(csae_round_rows(rows.data(), rows.stride, n, d, found.rows.data(), found.rows.stride(),
                                 found.lengths.get(), found.errors.get(), some_threads()),
                 csae_ok);
    found.rows.check_between_rows();
    for (int64_t i = 0; i < n; ++i) {
        const auto [square, lost] = squares(rows, found.rows, i, d);
        if (!std::isfinite(square)) continue;
        check(std::abs(found.lengths[i] - std::sqrt(square)) <= std::sqrt(square) / 1024 + 1e-18, "wrong length");
        check(std::abs(found.errors[i] - std::sqrt(lost)) <= std::sqrt(lost) / 1024 + 1e-18, "wrong error");
    }
    return found;
}

// Of the candidates for the largest bounds: those in a band are settled, or nothing is said about the row.
void above_settle(const csae_topk& best, int64_t k, const Matrix<float>& x, const Stored& table,
                  const Matrix<float>& bias, const Matrix<float>& dots, const float* lengths, double longest,
                  float largest_bias, const std::vector<bool>& unknown) {
    function = "csae_above_settle";
    const int64_t n = best.n, d = x.columns, d_sae = bias.columns;
    const Band band(d_sae);
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    const auto settled = allocate<uint8_t>(n);
    const csae_band all = band.from(0);
    check_status(csae_above_settle(&best, &all, k, -INFINITY, 1, x.data(), x.stride, table.data(), table.stride(),
                                   d_sae, d, table.type, bias.data(), values.data(), values.stride, indices.data(),
                                   indices.stride, settled.get(), some_threads()),
                 csae_ok);
    values.check_between_rows();
    indices.check_between_rows();
    for (int64_t i = 0; i < n; ++i) {
        if (!settled[i] || unknown[i]) continue;
        const double slack = 1e-5 * (lengths[i] * longest + largest_bias + 1);
        std::vector<bool> chosen(static_cast<size_t>(d_sae));
        int64_t found = 0;
        for (; found < k && values(i, found) != 0; ++found) {
            const int64_t f = indices(i, found);
            const double wanted = double{dots(i, f)} + bias(0, f);
            check(!chosen[f], "a column twice");
            chosen[f] = true;
            check(values(i, found) == wanted || std::abs(values(i, found) - wanted) <= slack, "wrong value");
            check(band.inside(f, values(i, found)), "outside of the band");
            check(found == 0 || values(i, found) <= values(i, found - 1), "not in order");
        }
        const double lowest = found < k ? 0 : values(i, k - 1);
        for (int64_t j = found; j < k; ++j) check(values(i, j) == 0 && indices(i, j) == 0, "something behind the end");
        for (int64_t f = 0; f < d_sae; ++f) {
            const double value = double{dots(i, f)} + bias(0, f);
            const bool surely =
                band.inside(f, static_cast<float>(value - slack)) && band.inside(f, static_cast<float>(value + slack));
            check(chosen[f] || !surely || !(value > lowest + slack), "one in the band was missed");
        }
    }
}

}  // namespace

void topk_settle() {
    const int64_t n = below(12), d = 1 + below(60), d_sae = 70 + below(300), k = 1 + below(12);
    const auto kind = static_cast<Kind>(below(3));
    const auto x = input_of(n, d, kind), bias = input_of(1, d_sae, one_in(2) ? kind : plain);
    const auto wide = input_of(d_sae, d, kind);
    Stored table(some_type(), d_sae, d, input_stride(d));
    for (int64_t i = 0; i < d_sae * d; ++i) table.set(i / d, i % d, wide(i / d, i % d));
    const Rounded acts = round_rows(x), weights = round_rows(wide);
    const bool as_stored = table.type == csae_bfloat16;
    // Upper bounds from the product of what was rounded; they may be loose.
    Matrix<float> bounds(n, d_sae, d_sae), dots(n, d_sae, d_sae);
    double longest = 0;
    float largest_bias = 0;
    std::vector<bool> unknown(static_cast<size_t>(n));  // a bound is NaN: then nothing is said about the row
    for (int64_t f = 0; f < d_sae; ++f) {
        double square = 0, lost = 0;
        for (int64_t c = 0; c < d; ++c) {
            const double w = table(f, c), rounded = as_stored ? w : weights.rows(f, c);
            square += w * w;
            lost += (w - rounded) * (w - rounded);
        }
        longest = std::max(longest, std::sqrt(square));
        if (std::isfinite(bias(0, f))) largest_bias = std::max(largest_bias, std::abs(bias(0, f)));
        for (int64_t i = 0; i < n; ++i) {
            double coarse = 0, fine = 0;
            for (int64_t c = 0; c < d; ++c) {
                coarse += double{acts.rows(i, c)} * (as_stored ? table(f, c) : weights.rows(f, c));
                fine += double{x(i, c)} * table(f, c);
            }
            const double length = acts.lengths[i] * 1.002, off = acts.errors[i] * 1.002;
            const double reach = std::sqrt(square), slack = std::abs(double{bias(0, f)}) * 1e-5 + (one_in(4) ? 0.1 : 0);
            bounds(i, f) = static_cast<float>(coarse + bias(0, f) + off * reach + (length + off) * std::sqrt(lost) +
                                              1e-4 * length * reach + 1e-16 + (std::isfinite(slack) ? slack : 0));
            unknown[i] = unknown[i] || std::isnan(bounds(i, f));
            dots(i, f) = static_cast<float>(fine);
        }
    }
    const int64_t candidates = k + 1 + below(56), capacity = candidates + 64 + below(100);
    const Matrix<int32_t> orders(n, capacity, capacity), columns(n, capacity, capacity), count(1, n, n);
    const Matrix<float> threshold(1, n, n);
    std::fill_n(count.data(), n, 0);
    std::fill_n(threshold.data(), n, -INFINITY);
    const csae_topk best = {orders.data(), columns.data(), threshold.data(), count.data(), n, candidates, capacity};
    function = "csae_topk_add";
    const Matrix<float> no_bias(1, d_sae, d_sae);
    std::fill_n(no_bias.data(), d_sae, 0.0f);
    for (int64_t first = 0, width; first < d_sae; first += width) {
        width = std::min(d_sae - first, 1 + below(200));
        add_tile(best, bounds, no_bias, first, width);
    }
    if (one_in(2)) {
        above_settle(best, k, x, table, bias, dots, acts.lengths.get(), longest, largest_bias, unknown);
        return;
    }
    function = "csae_topk_settle";
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    const auto settled = allocate<uint8_t>(n);
    check_status(
        csae_topk_settle(&best, k, x.data(), x.stride, table.data(), table.stride(), d_sae, d, table.type, bias.data(),
                         values.data(), values.stride, indices.data(), indices.stride, settled.get(), some_threads()),
        csae_ok);
    values.check_between_rows();
    indices.check_between_rows();
    for (int64_t i = 0; i < n; ++i) {
        if (!settled[i] || unknown[i]) continue;
        std::vector<bool> chosen(static_cast<size_t>(d_sae));
        const double slack = 1e-5 * (acts.lengths[i] * longest + largest_bias + 1);
        double lowest = INFINITY;
        for (int64_t j = 0; j < k; ++j) {
            const int64_t f = indices(i, j);
            const double wanted = double{dots(i, f)} + bias(0, f);
            check(!chosen[f], "a column twice");
            chosen[f] = true;
            const double value = std::max(wanted, 0.0);
            check(values(i, j) == value || std::abs(values(i, j) - value) <= slack, "wrong value");
            check(j == 0 || values(i, j) <= values(i, j - 1), "not in order");
            lowest = std::min(lowest, wanted);
        }
        for (int64_t f = 0; f < d_sae; ++f) {
            check(chosen[f] || !(double{dots(i, f)} + bias(0, f) > lowest + slack), "a larger one was missed");
        }
    }
}

// --- csae_round_pairs, csae_topk_add_products ------------------------------------------------------------------

namespace {

// Rows as csae_round_pairs has them, and the same row by row.
struct Paired {
    std::unique_ptr<uint16_t[]> pairs;
    Stored rows;
};

Paired round_pairs(const Stored& from, int64_t width) {
    function = "csae_round_pairs";
    const int64_t n = from.floats.rows + from.halves.rows, d = from.floats.columns, n_blocks = (n + 15) / 16;
    const Stored bias = stored_of(csae_bfloat16, n, 2, plain), packed(csae_bfloat16, n, 2, 2);
    for (int64_t i = 0; i < 2 * n; ++i) packed.halves.data()[i] = bias.halves(i / 2, i % 2);
    const float unseen = one_in(2) ? 0.0f : 0.25f, above = one_in(2) ? 1.0f : 1.5f;
    Paired found{allocate<uint16_t>(n_blocks * 16 * width), Stored(csae_bfloat16, n, width, width)};
    const auto lengths = allocate<float>(n);
    check_status(csae_round_pairs(from.data(), from.stride(), n, d, from.type, packed.data(), unseen, above, width,
                                  found.pairs.get(), lengths.get(), some_threads()),
                 csae_ok);
    for (int64_t i = 0; i < n_blocks * 16; ++i) {
        for (int64_t c = 0; c < width; ++c) {
            const uint16_t bits = found.pairs[(i / 16 * width + c / 2 * 2) * 16 + i % 16 * 2 + c % 2];
            check(bits == 0 || (i < n && c < d + 4), "numbers beyond the rows");
            if (i < n) found.rows.halves(i, c) = bits;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const auto [square, lost] = squares(from, found.rows, i, d);
        for (int64_t c = 0; c < 2; ++c) check(found.rows.halves(i, d + c) == packed.halves(i, c), "another bias");
        if (!std::isfinite(square)) continue;
        const double length = (std::sqrt(square) + unseen) * above, error = (std::sqrt(lost) + unseen) * above;
        check(std::abs(lengths[i] - length) <= length / 1024 + 1e-18, "wrong length");
        check(std::abs(found.rows(i, d + 2) - length) <= length / 128 + 1e-18, "wrong length beside the row");
        check(std::abs(found.rows(i, d + 3) - error) <= error / 128 + 1e-18, "wrong error");
    }
    return found;
}

}  // namespace

void topk_products() {
    const int64_t n = below(one_in(4) ? 600 : 80), d_sae = 1 + below(200), d = below(100);
    const int64_t k = 1 + below(std::min<int64_t>(d_sae, 40)), width = (d + 4 + 31) / 32 * 32 + 32 * below(2);
    const auto kind = static_cast<Kind>(below(3));
    const Stored x = stored_of(csae_bfloat16, n, width, kind);
    Stored bounds(csae_bfloat16, d_sae, width, width);  // row by row what was added
    const int64_t capacity = k + 64 + below(100);
    const Matrix<int32_t> orders(n, capacity, capacity), columns(n, capacity, capacity), count(1, n, n);
    const Matrix<float> threshold(1, n, n);
    std::fill_n(count.data(), n, 0);
    std::fill_n(threshold.data(), n, -INFINITY);
    const csae_topk best = {orders.data(), columns.data(), threshold.data(), count.data(), n, k, capacity};
    for (int64_t first = 0, here; first < d_sae; first += here) {
        here = std::min(d_sae - first, one_in(2) ? d_sae : 1 + below(70));
        const Paired table = round_pairs(stored_of(some_type(), here, d, kind), width);
        for (int64_t i = 0; i < here * width; ++i) {
            bounds.halves(first + i / width, i % width) = table.rows.halves(i / width, i % width);
        }
        function = "csae_topk_add_products";
        check_status(
            csae_topk_add_products(&best, x.data(), x.stride(), table.pairs.get(), width, here, first, some_threads()),
            csae_ok);
    }
    const auto values = output<float>(n, k);
    const auto indices = output<int64_t>(n, k);
    function = "csae_topk_finish";
    check_status(csae_topk_finish(&best, values.data(), values.stride, indices.data(), indices.stride, some_threads()),
                 csae_ok);
    function = "csae_topk_add_products";
    std::vector<double> wanted(static_cast<size_t>(d_sae));
    for (int64_t i = 0; i < n; ++i) {
        double size = 0;
        for (int64_t f = 0; f < d_sae; ++f) {
            Sum sum;
            for (int64_t c = 0; c < width; ++c) sum.add(double{x(i, c)} * bounds(f, c));
            wanted[f] = sum.value;
            size = std::max(size, std::isnan(sum.size) ? INFINITY : sum.size);
        }
        if (!(size < 1e37)) continue;  // what overflows, or is NaN, does so in any order
        const double slack = 1e-5 * size + 1e-35;
        double lowest = INFINITY;
        std::vector<bool> chosen(static_cast<size_t>(d_sae));
        for (int64_t j = 0; j < k; ++j) {
            const int64_t f = indices(i, j);
            check(!chosen[f], "a column twice");
            chosen[f] = true;
            check(std::abs(values(i, j) - std::max(wanted[f], 0.0)) <= slack, "wrong value");
            lowest = std::min(lowest, wanted[f]);
        }
        for (int64_t f = 0; f < d_sae; ++f) check(chosen[f] || wanted[f] <= lowest + slack, "a larger one was missed");
    }
}

}  // namespace fuzz
