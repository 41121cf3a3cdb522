// Each row of the result is a weighted sum of rows of the table, up to the code's length: a weighted embedding bag.
#include <algorithm>
#include <atomic>

#include "csae_cpu.h"
#include "parallel.h"
#include "rows/row_sums.h"

namespace csae {
namespace {

constexpr int64_t most_rows_of_piece = 16;

// Returns false if an index before its row's length is outside of [0, d_sae).
template <class T>
bool gather_sum(const float* values, int64_t values_stride, const int64_t* indices, int64_t indices_stride, int64_t n,
                int64_t k, const T* table, int64_t table_stride, int64_t d_sae, int64_t d, T* out, int64_t out_stride,
                int n_threads) {
    const RowSums<T>& sums = row_sums<T>();
    std::atomic<bool> good{true};
    const int64_t piece = std::max<int64_t>(1, std::min<int64_t>(most_rows_of_piece, n / (int64_t{4} * n_threads)));
    parallel_for(n, piece, n_threads, [&](int, int64_t begin, int64_t end) {
        int64_t lengths[most_rows_of_piece + 1];
        for (int64_t i = begin; i < end; ++i) {
            lengths[i - begin] = length_of(values + i * values_stride, k);
            if (!all_below(indices + i * indices_stride, lengths[i - begin], d_sae)) {
                good.store(false, std::memory_order_relaxed);
            }
        }
        lengths[end - begin] = 0;
        if (!good.load(std::memory_order_relaxed)) return;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t* ids = indices + i * indices_stride;
            sums.rounded_weighted_sum(table, table_stride, d, ids, values + i * values_stride, lengths[i - begin],
                                      ids + indices_stride, lengths[i - begin + 1], out + i * out_stride);
        }
    });
    return good;
}

}  // namespace
}  // namespace csae

int csae_gather_sum(const float* values, int64_t values_stride, const int64_t* indices, int64_t indices_stride,
                    int64_t n, int64_t k, const void* table, int64_t table_stride, int64_t d_sae, int64_t d, int type,
                    void* out, int64_t out_stride, int n_threads) {
    if (n < 0 || k < 0 || d_sae < 0 || d < 0 || n_threads < 1) return csae_bad_argument;
    if (values_stride < 0 || indices_stride < 0 || table_stride < 0 || (n > 1 && out_stride < d)) {
        return csae_bad_argument;
    }
    if ((n * d > 0 && out == nullptr) || (n * k > 0 && (values == nullptr || indices == nullptr))) {
        return csae_bad_argument;
    }
    if (d_sae * d > 0 && table == nullptr) return csae_bad_argument;
    if (type != csae_float32 && type != csae_bfloat16) return csae_bad_argument;
    // An empty matrix may be a null pointer, and pointer arithmetic on null is undefined.
    if (k == 0) values_stride = indices_stride = 0;
    if (d == 0) table_stride = out_stride = 0;
    const auto run = [&](auto* typed_table, auto* typed_out) {
        return csae::gather_sum(values, values_stride, indices, indices_stride, n, k, typed_table, table_stride, d_sae,
                                d, typed_out, out_stride, n_threads);
    };
    const bool good = type == csae_float32
                          ? run(static_cast<const float*>(table), static_cast<float*>(out))
                          : run(static_cast<const csae::BFloat16*>(table), static_cast<csae::BFloat16*>(out));
    return good ? csae_ok : csae_bad_index;
}
