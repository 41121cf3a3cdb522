#include "rows/row_sums.h"

#include "simd/isa.h"

namespace csae {
namespace {

template <class T>
CSAE_INLINE void fetch(const T* p, int64_t count) {
    for (int64_t c = 0; c < count; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + c);
}

// Columns [c, c + R * W) of a weighted sum, in R registers. Prefetches the next to_fetch columns of the rows.
template <int W, int R, class T, class Out>
CSAE_INLINE void weighted_columns(const T* table, int64_t stride, int64_t c, int64_t to_fetch, const int64_t* ids,
                                  const float* weights, int64_t count, Out* out) {
    Register<W> sum[R] = {};
    for (int64_t j = 0; j < count; ++j) {
        const T* row = table + ids[j] * stride + c;
        const float weight = weights[j];
        fetch(row + R * W, to_fetch);
        for (int r = 0; r < R; ++r) sum[r].x += weight * load<W>(row + r * W).x;
    }
    for (int r = 0; r < R; ++r) store(out + c + r * W, sum[r]);
}

template <int W, class T, class Out>
CSAE_INLINE void weighted_sum(const T* table, int64_t stride, int64_t d, const int64_t* ids, const float* weights,
                              int64_t count, const int64_t* next_ids, int64_t next_count, Out* out) {
    constexpr int64_t chunk = 8 * W;
    int64_t c = 0;
    for (; c + chunk <= d; c += chunk) {
        const int64_t left = d - c - chunk;
        weighted_columns<W, 8>(table, stride, c, left < chunk ? left : chunk, ids, weights, count, out);
    }
    for (int64_t j = 0; j < next_count; ++j) fetch(table + next_ids[j] * stride, d < chunk ? d : chunk);
    for (; c + W <= d; c += W) weighted_columns<W, 1>(table, stride, c, 0, ids, weights, count, out);
    for (; c < d; ++c) weighted_columns<1, 1>(table, stride, c, 0, ids, weights, count, out);
}

// R dot products at once: they share the loads of `row`, and their sums are independent. Prefetches the next R rows of
// the table.
template <int W, int R, class T>
CSAE_INLINE void dots_of(const T* table, int64_t stride, int64_t d, const int64_t* ids, const int64_t* next_ids,
                         const float* row, float* out) {
    Register<W> sum[R] = {};
    int64_t c = 0;
    for (; c + W <= d; c += W) {
        const Register<W> x = load<W>(row + c);
        for (int r = 0; r < R; ++r) {
            __builtin_prefetch(table + next_ids[r] * stride + c);
            sum[r].x += x.x * load<W>(table + ids[r] * stride + c).x;
        }
    }
    for (int r = 0; r < R; ++r) {
        float total = 0;
        for (int l = 0; l < W; ++l) total += sum[r].x[l];
        for (int64_t rest = c; rest < d; ++rest) total += row[rest] * load<1>(table + ids[r] * stride + rest).x[0];
        out[r] = total;
    }
}

template <int W, class T>
CSAE_INLINE void dots(const T* table, int64_t stride, int64_t d, const int64_t* ids, int64_t count, const float* row,
                      float* out) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const int64_t* next = ids + (j + 8 <= count ? j + 4 : j);
        dots_of<W, 4>(table, stride, d, ids + j, next, row, out + j);
    }
    for (; j < count; ++j) dots_of<W, 1>(table, stride, d, ids + j, ids + j, row, out + j);
}

#define CSAE_ROW_SUMS(NAME, TARGET, W)                                                                                \
    template <class T, class Out>                                                                                     \
    TARGET void weighted_sum_##NAME(const T* table, int64_t stride, int64_t d, const int64_t* ids,                    \
                                    const float* weights, int64_t count, const int64_t* next_ids, int64_t next_count, \
                                    Out* out) {                                                                       \
        weighted_sum<W>(table, stride, d, ids, weights, count, next_ids, next_count, out);                            \
    }                                                                                                                 \
    template <class T>                                                                                                \
    TARGET void dots_##NAME(const T* table, int64_t stride, int64_t d, const int64_t* ids, int64_t count,             \
                            const float* row, float* out) {                                                           \
        dots<W>(table, stride, d, ids, count, row, out);                                                              \
    }                                                                                                                 \
    template <class T>                                                                                                \
    constexpr RowSums<T> NAME = {weighted_sum_##NAME<T, float>, weighted_sum_##NAME<T, T>, dots_##NAME<T>};

CSAE_ROW_SUMS(portable, , 4)
#if CSAE_X86
CSAE_ROW_SUMS(avx2, CSAE_AVX2, 8)
CSAE_ROW_SUMS(avx512, CSAE_AVX512, 16)
#endif

}  // namespace

template <class T>
const RowSums<T>& row_sums() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return avx512<T>;
    if (current_isa() == Isa::avx2) return avx2<T>;
#endif
    return portable<T>;
}

template const RowSums<float>& row_sums();
template const RowSums<BFloat16>& row_sums();

}  // namespace csae
