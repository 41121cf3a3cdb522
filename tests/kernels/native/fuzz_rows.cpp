// Cases of gathers, and of the sums of feature rows and Adam on them.
#include "fuzz.h"

namespace fuzz {

// --- csae_gather_sum, csae_gather_dot ----------------------------------------------------------------------------

void gather(bool dot) {
    function = dot ? "csae_gather_dot" : "csae_gather_sum";
    const int64_t n = below(20), k = below(20), d_sae = one_in(16) ? 0 : 1 + below(50), d = below(300);
    const auto kind = static_cast<Kind>(below(3));
    auto values = input_of(n, k, kind);
    const auto rows = input_of(n, dot ? d : 0, kind);
    for (int64_t i = 0; k > 0 && i < n; ++i) {
        const float zero = one_in(2) ? 0.0f : -0.0f;
        for (int64_t j = one_in(2) ? k : below(k + 1); j < k; ++j) values(i, j) = zero;
        if (one_in(4)) values(i, below(k)) = zero;
    }
    std::vector<int64_t> lengths(static_cast<size_t>(n), k);  // known now: rows may overlap
    for (int64_t i = 0; i < n; ++i) {
        while (lengths[i] > 0 && values(i, lengths[i] - 1) == 0) --lengths[i];
    }
    const Stored table = stored_of(some_type(), d_sae, d, kind);
    const auto indices = input<int64_t>(n, k);  // out of range between rows and behind lengths: not to be looked at
    const int64_t outside[] = {-1, d_sae, INT64_MAX, INT64_MIN};
    bool in_range = true;
    for (int64_t i = 0; i < n * k; ++i) indices(i / k, i % k) = d_sae == 0 ? 0 : below(d_sae);
    for (int64_t i = 0; i < n; ++i) {
        in_range &= d_sae > 0 || lengths[i] == 0;
        for (int64_t j = lengths[i]; j < k && (indices.stride >= k || n == 1); ++j) indices(i, j) = outside[below(4)];
    }
    const int64_t chosen = n > 0 ? below(n) : 0;
    if (n > 0 && lengths[chosen] > 0 && one_in(8)) {
        indices(chosen, below(lengths[chosen])) = outside[below(4)];
        in_range = false;
    }
    const Stored out = stored_output(dot ? csae_float32 : table.type, n, dot ? k : d);
    const auto run = [&](const Stored& to, int n_threads) {
        const int status =
            dot ? csae_gather_dot(rows.data(), rows.stride, values.data(), values.stride, indices.data(),
                                  indices.stride, n, k, table.data(), table.stride(), d_sae, d, table.type,
                                  to.floats.data(), to.stride(), n_threads)
                : csae_gather_sum(values.data(), values.stride, indices.data(), indices.stride, n, k, table.data(),
                                  table.stride(), d_sae, d, table.type, to.data(), to.stride(), n_threads);
        check_status(status, in_range ? csae_ok : csae_bad_index);
        to.check_between_rows();
    };
    run(out, some_threads());
    if (!in_range) return;

    const int64_t columns = dot ? k : d;
    std::vector<Sum> wanted(static_cast<size_t>(n * columns));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < lengths[i]; ++j) {
            for (int64_t c = 0; c < d; ++c) {
                const double factor = dot ? rows(i, c) : values(i, j);
                wanted[i * columns + (dot ? j : c)].add(factor * table(indices(i, j), c));
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
namespace {

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
        return {gradient->view,   param.data(),        exp_avg.data(), exp_avg_sq.data(), param.stride,
                exp_avg.stride(), exp_avg_sq.stride(), exp_avg.type,   unit_rows};
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

}  // namespace

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
    const csae_adam step = {between(0, 0.1),
                            between(1, 5),
                            between(1e-8, 1e-3),
                            between(0, 1),
                            between(0, 1),
                            between(0, 1),
                            static_cast<uint32_t>(random_bits()),
                            one_in(2),
                            one_in(2) ? 0 : static_cast<uint32_t>(random_bits())};
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
                const auto place = static_cast<uint32_t>((f + int64_t{step.first_row}) * d + c);
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

}  // namespace fuzz
