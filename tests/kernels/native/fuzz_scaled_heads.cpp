// Cases of heads that are brought to a length.
#include "fuzz.h"

namespace fuzz {

void scaled_heads() {
    function = "csae_scale_heads";
    const int64_t n = below(30), H = 1 + below(5), d = 1 + below(one_in(4) ? 300 : 40);
    const auto kind = static_cast<Kind>(below(3));
    const float least_square = one_in(2) ? 1e-6f : 1.0f, weight = one_in(2) ? 1.0f : 1.0f / 16;
    const auto contiguous = [&](int64_t size) {
        Matrix<float> matrix(1, size, size);
        for (int64_t at = 0; at < size; ++at) matrix.memory[at] = number(kind);
        return matrix;
    };
    const auto heads = contiguous(n * H * d), grad = contiguous(n * H * d), gains = contiguous(H);
    const float* gain = one_in(2) ? gains.data() : nullptr;

    const auto run = [&](std::vector<Matrix<float>>& results, int n_threads) {
        for (int64_t size : {n * H * d, n * H, n * H * d, n * H}) results.emplace_back(1, size, size);
        function = "csae_scale_heads";
        check_status(csae_scale_heads(heads.data(), n, H, d, least_square, weight, gain, results[0].data(),
                                      results[1].data(), n_threads),
                     csae_ok);
        function = "csae_scale_heads_backward";
        check_status(csae_scale_heads_backward(grad.data(), heads.data(), results[1].data(), n, H, d, weight, gain,
                                               results[2].data(), results[3].data(), n_threads),
                     csae_ok);
    };
    std::vector<Matrix<float>> results, alone;
    run(results, some_threads());
    run(alone, 1);
    for (size_t i = 0; i < results.size(); ++i) results[i].check_same_bits(alone[i], "other bits with threads");
    if (kind == special) return;  // which NaN or infinity comes out depends on the order of the sums

    const double rounding = 8 * unit * static_cast<double>(d + 8);
    for (int64_t i = 0; i < n * H; ++i) {
        const float *x = heads.data() + i * d, *g = grad.data() + i * d;
        double squares = 0;
        Sum along;
        for (int64_t c = 0; c < d; ++c) squares += double{x[c]} * x[c];
        for (int64_t c = 0; c < d; ++c) along.add(double{g[c]} * x[c]);
        const double scale = 1 / std::sqrt(least_square + weight * squares / static_cast<double>(d));
        const double factor = gain == nullptr ? 1 : gain[i % H];
        Sum wanted_scale, wanted_gain;
        wanted_scale.add(scale);
        wanted_gain.add(along.value * scale, along.size * scale);
        check_near(results[1].memory[i], wanted_scale, rounding, "scale");
        check_near(results[3].memory[i], wanted_gain, rounding, "d_gains");
        for (int64_t c = 0; c < d; ++c) {
            Sum out, d_heads;
            out.add(x[c] * scale * factor);
            d_heads.add(g[c] * scale * factor);
            const double each = x[c] * factor * scale * scale * scale * weight / static_cast<double>(d);
            d_heads.add(-along.value * each, along.size * std::abs(each));
            check_near(results[0].memory[i * d + c], out, rounding, "out");
            check_near(results[2].memory[i * d + c], d_heads, rounding, "d_heads");
        }
    }
}

}  // namespace fuzz
