// The dot products of each row with rows of the table, up to the code's length: an SDDMM.
#include <algorithm>
#include <atomic>

#include "csae_cpu.h"
#include "parallel.h"
#include "rows/row_sums.h"

namespace csae {
namespace {

// Returns false if an index before its row's length is outside of [0, d_sae).
template <class T>
bool gather_dot(const float* rows, int64_t rows_stride, const float* values, int64_t values_stride,
                const int64_t* indices, int64_t indices_stride, int64_t n, int64_t k, const T* table,
                int64_t table_stride, int64_t d_sae, int64_t d, float* out, int64_t out_stride, int n_threads) {
    const RowSums<T>& sums = row_sums<T>();
    std::atomic<bool> good{true};
    const int64_t piece = std::max<int64_t>(1, std::min<int64_t>(16, n / (int64_t{4} * n_threads)));
    parallel_for(n, piece, n_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t* ids = indices + i * indices_stride;
            const int64_t length = length_of(values + i * values_stride, k);
            if (!all_below(ids, length, d_sae)) {
                good.store(false, std::memory_order_relaxed);
                return;
            }
            float* dots = out + i * out_stride;
            sums.dots(table, table_stride, d, ids, length, rows + i * rows_stride, dots);
            std::fill(dots + length, dots + k, 0.0f);
        }
    });
    return good;
}

}  // namespace
}  // namespace csae

int csae_gather_dot(const float* rows, int64_t rows_stride, const float* values, int64_t values_stride,
                    const int64_t* indices, int64_t indices_stride, int64_t n, int64_t k, const void* table,
                    int64_t table_stride, int64_t d_sae, int64_t d, int type, float* out, int64_t out_stride,
                    int n_threads) {
    if (n < 0 || k < 0 || d_sae < 0 || d < 0 || n_threads < 1) return csae_bad_argument;
    if (rows_stride < 0 || values_stride < 0 || indices_stride < 0 || table_stride < 0) return csae_bad_argument;
    if (n > 1 && out_stride < k) return csae_bad_argument;
    if (n * d > 0 && rows == nullptr) return csae_bad_argument;
    if (n * k > 0 && (out == nullptr || values == nullptr || indices == nullptr)) return csae_bad_argument;
    if (d_sae * d > 0 && table == nullptr) return csae_bad_argument;
    if (type != csae_float32 && type != csae_bfloat16) return csae_bad_argument;
    // An empty matrix may be a null pointer, and pointer arithmetic on null is undefined.
    if (d == 0) rows_stride = table_stride = 0;
    if (k == 0) values_stride = indices_stride = out_stride = 0;
    const auto run = [&](auto* typed_table) {
        return csae::gather_dot(rows, rows_stride, values, values_stride, indices, indices_stride, n, k, typed_table,
                                table_stride, d_sae, d, out, out_stride, n_threads);
    };
    const bool good =
        type == csae_float32 ? run(static_cast<const float*>(table)) : run(static_cast<const csae::BFloat16*>(table));
    return good ? csae_ok : csae_bad_index;
}
