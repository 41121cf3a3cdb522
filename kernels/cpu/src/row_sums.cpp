#include "row_sums.h"

#include "isa.h"
#include "register.h"

namespace csae {
namespace {

CSAE_INLINE void fetch(const float* p, int64_t n_floats) {
    for (int64_t c = 0; c < n_floats; c += 16) __builtin_prefetch(p + c);
}

// Columns [c, c + R * W) of a weighted sum, kept in R registers. The next columns of the rows are fetched on the way.
template <int W, int R>
CSAE_INLINE void weighted_columns(const float* table, int64_t stride, int64_t c, int64_t to_fetch, const int64_t* ids,
                                  const float* weights, int64_t count, float* out) {
    Register<W> sum[R] = {};
    for (int64_t j = 0; j < count; ++j) {
        const float* row = table + ids[j] * stride + c;
        const float weight = weights[j];
        fetch(row + R * W, to_fetch);
        for (int r = 0; r < R; ++r) sum[r].x += weight * load<W>(row + r * W).x;
    }
    for (int r = 0; r < R; ++r) store<W>(out + c + r * W, sum[r]);
}

template <int W>
CSAE_INLINE void weighted_sum(const float* table, int64_t stride, int64_t d, const int64_t* ids, const float* weights,
                              int64_t count, const int64_t* next_ids, int64_t next_count, float* out) {
    constexpr int64_t chunk = 8 * W;
    int64_t c = 0;
    for (; c + chunk <= d; c += chunk) {
        const int64_t left = d - c - chunk;
        weighted_columns<W, 8>(table, stride, c, left < chunk ? left : chunk, ids, weights, count, out);
    }
    for (int64_t j = 0; j < next_count; ++j) fetch(table + next_ids[j] * stride, d < chunk ? d : chunk);
    for (; c + W <= d; c += W) weighted_columns<W, 1>(table, stride, c, 0, ids, weights, count, out);
    for (; c < d; ++c) {
        float sum = 0;
        for (int64_t j = 0; j < count; ++j) sum += weights[j] * table[ids[j] * stride + c];
        out[c] = sum;
    }
}

// R dot products at once: the row is loaded once for all, and their sums don't wait for each other. The R rows of
// the table that come next are fetched on the way.
template <int W, int R>
CSAE_INLINE void dots_of(const float* table, int64_t stride, int64_t d, const int64_t* ids, const int64_t* next_ids,
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
        for (int64_t rest = c; rest < d; ++rest) total += row[rest] * table[ids[r] * stride + rest];
        out[r] = total;
    }
}

template <int W>
CSAE_INLINE void dots(const float* table, int64_t stride, int64_t d, const int64_t* ids, int64_t count,
                      const float* row, float* out) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const int64_t* next = ids + (j + 8 <= count ? j + 4 : j);
        dots_of<W, 4>(table, stride, d, ids + j, next, row, out + j);
    }
    for (; j < count; ++j) dots_of<W, 1>(table, stride, d, ids + j, ids + j, row, out + j);
}

#define CSAE_ROW_SUMS(NAME, TARGET, W)                                                                              \
    TARGET void weighted_sum_##NAME(const float* table, int64_t stride, int64_t d, const int64_t* ids,              \
                                    const float* weights, int64_t count, const int64_t* next_ids,                   \
                                    int64_t next_count, float* out) {                                               \
        weighted_sum<W>(table, stride, d, ids, weights, count, next_ids, next_count, out);                          \
    }                                                                                                               \
    TARGET void dots_##NAME(const float* table, int64_t stride, int64_t d, const int64_t* ids, int64_t count,       \
                            const float* row, float* out) {                                                         \
        dots<W>(table, stride, d, ids, count, row, out);                                                            \
    }                                                                                                               \
    constexpr RowSums NAME = {weighted_sum_##NAME, dots_##NAME};

CSAE_ROW_SUMS(portable, , 4)
#if CSAE_X86
CSAE_ROW_SUMS(avx2, CSAE_AVX2, 8)
CSAE_ROW_SUMS(avx512, CSAE_AVX512, 16)
#endif

}  // namespace

const RowSums& row_sums() {
#if CSAE_X86
    if (current_isa() == Isa::avx512) return avx512;
    if (current_isa() == Isa::avx2) return avx2;
#endif
    return portable;
}

}  // namespace csae
