// Gradients written out: an SpMM with the transposed code, the transpose of gather_sum.
#include "csae_cpu.h"
#include "rows/feature_gradients.h"
#include "simd/register.h"

namespace csae {
namespace {

// Whether the result can be written to table.out.
bool good(const csae_dense_gradient& table, int64_t d_sae) {
    if (d_sae > 1 && table.out_stride < table.gradient.d) return false;
    return d_sae * table.gradient.d <= 0 || table.out != nullptr;
}

void write(const csae_dense_gradient& table, int64_t feature, const float* gradient) {
    const int64_t d = table.gradient.d;
    if (d == 0) return;
    if (table.gradient.type == csae_float32) {
        std::copy(gradient, gradient + d, static_cast<float*>(table.out) + feature * table.out_stride);
        return;
    }
    BFloat16* out = static_cast<BFloat16*>(table.out) + feature * table.out_stride;
    int64_t c = 0;
    for (; c + 4 <= d; c += 4) store(out + c, load<4>(gradient + c));
    for (; c < d; ++c) store(out + c, load<1>(gradient + c));
}

}  // namespace
}  // namespace csae

int csae_feature_sums(const csae_pairs* pairs, const csae_dense_gradient* tables, int n_tables, int n_threads) {
    if (pairs == nullptr || n_tables < 0 || (n_tables > 0 && tables == nullptr)) return csae_bad_argument;
    for (int i = 0; i < n_tables; ++i) {
        if (!csae::good(tables[i], pairs->d_sae)) return csae_bad_argument;
    }
    try {
        std::vector<csae_gradient> gradients;
        for (int i = 0; i < n_tables; ++i) gradients.push_back(tables[i].gradient);
        csae::FeatureGradients rows(*pairs, std::move(gradients), n_threads);
        if (rows.status() != csae_ok) return rows.status();
        rows.for_each(false, [&](size_t table, int64_t feature, const float* gradient) {
            csae::write(tables[table], feature, gradient);
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
