// Cases of look-back attention: of whole windows, and of one position.
#include "fuzz.h"

namespace fuzz {
namespace {

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

}  // namespace

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
    const csae_attention given = {q.view,
                                  k.view,
                                  v.view,
                                  slope.data(),
                                  null.data(),
                                  masked ? mask.data() : nullptr,
                                  bounded ? starts.data() : nullptr,
                                  B,
                                  T,
                                  H,
                                  d_head,
                                  d_value};

    const auto run = [&](std::vector<Matrix<float>>& results, int n_threads) {
        const int64_t n = B * T * H;
        for (int64_t size : {n * d_value, n, n * d_head, n * d_head, n * d_value, H, H}) {
            results.emplace_back(1, size, 0);
        }
        function = "csae_lookback_forward";
        check_status(csae_lookback_forward(&given, results[0].data(), results[1].data(), n_threads), csae_ok);
        function = "csae_lookback_backward";
        const csae_heads out = {results[0].data(), T * H * d_value, H * d_value, d_value};
        check_status(
            csae_lookback_backward(&given, &grad.view, &out, results[1].data(), results[2].data(), results[3].data(),
                                   results[4].data(), results[5].data(), results[6].data(), n_threads),
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
    const csae_memory given = {q.data(),
                               q.stride,
                               memory.data(),
                               stride_b,
                               stride_l,
                               takes_part.data(),
                               takes_part.stride,
                               slope.data(),
                               null.data(),
                               start.data(),
                               looks.data(),
                               B,
                               L,
                               H,
                               d_head,
                               d_value,
                               t};
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

}  // namespace fuzz
