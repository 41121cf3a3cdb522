#include "topk_scan.h"

#include <limits>

#include "isa.h"

#if CSAE_X86
#if !defined(__clang__)
// GCC's own header leaves the unused operand of some intrinsics uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace csae {
namespace {

// A tile lies row after row, mostly in L3: this many columns are fetched ahead, which is often the next row.
constexpr int64_t ahead = 512;

template <class T>
CSAE_INLINE void fetch_block(const T* row) {
    for (int64_t c = 0; c < block_width; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

// --- in plain C++: compiled for each instruction set -------------------------------------------------------

template <class T>
CSAE_INLINE void group_maxima(const T* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    for (int64_t g = 0; g < groups; g += group_unit) {
        int32_t maxima[group_unit];
        for (int32_t& maximum : maxima) maximum = std::numeric_limits<int32_t>::min();
        for (int64_t c = g; c < n; c += groups) {
            for (int64_t l = 0; l < group_unit; ++l) {
                const int32_t here = ordered(load<1>(row + c + l).x[0] + bias[c + l]);
                maxima[l] = here > maxima[l] ? here : maxima[l];
            }
        }
        std::memcpy(order + g, maxima, sizeof maxima);
    }
}

CSAE_INLINE int32_t bound_of_kth(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    int32_t lowest = order[0], highest = order[0];
    for (int64_t i = 1; i < n; ++i) {
        lowest = order[i] < lowest ? order[i] : lowest;
        highest = order[i] > highest ? order[i] : highest;
    }
    // At least k reach `low`, fewer than k reach what is above `high`.
    int64_t low = lowest, high = highest;
    exactly_k = false;
    while (low < high && !exactly_k) {
        const auto middle = static_cast<int32_t>(high - (high - low) / 2);
        int32_t reach = 0;
        for (int64_t i = 0; i < n; ++i) reach += order[i] >= middle;
        exactly_k = reach == k;
        if (reach < k) {
            high = int64_t{middle} - 1;
        } else {
            low = middle;
        }
    }
    return static_cast<int32_t>(low);
}

CSAE_INLINE void rank(int64_t* keys, int64_t n, int64_t* ranks) {
    for (int64_t i = n; i % 8 != 0; ++i) keys[i] = 0;
    for (int64_t i = 0; i < n; i += 8) {
        int64_t larger[8] = {};
        for (int64_t j = 0; j < n; ++j) {
            for (int64_t l = 0; l < 8; ++l) larger[l] += keys[j] > keys[i + l];
        }
        for (int64_t l = 0; l < 8; ++l) ranks[i + l] = larger[l];
    }
}

// --- portable ----------------------------------------------------------------------------------------------

template <class T>
int64_t find_portable(const T* row, const float* bias, int64_t n_blocks, float threshold, int32_t* blocks,
                      uint64_t* columns) {
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, bias += block_width) {
        // A compiler makes vectors of this loop, and not of the one that shifts.
        int32_t any = 0;
        for (int64_t c = 0; c < block_width; ++c) any |= !(load<1>(row + c).x[0] + bias[c] < threshold);
        if (any == 0) continue;
        uint64_t bits = 0;
        for (int64_t c = 0; c < block_width; ++c) bits |= static_cast<uint64_t>(!(load<1>(row + c).x[0] + bias[c] < threshold)) << c;
        blocks[found] = static_cast<int32_t>(b);
        columns[found++] = bits;
    }
    return found;
}

template <class T>
void group_maxima_portable(const T* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, bias, n, order, groups);
}

int32_t bound_of_kth_portable(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

void rank_portable(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan portable = {{find_portable<float>, group_maxima_portable<float>},
                             {find_portable<BFloat16>, group_maxima_portable<BFloat16>},
                             bound_of_kth_portable,
                             rank_portable};

#if CSAE_X86

// --- AVX2 --------------------------------------------------------------------------------------------------

template <class T>
CSAE_AVX2 int64_t find_avx2(const T* row, const float* bias, int64_t n_blocks, float threshold, int32_t* blocks,
                            uint64_t* columns) {
    const __m256 t = _mm256_set1_ps(threshold);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, bias += block_width) {
        fetch_block(row + ahead);
        uint64_t bits = 0;
        for (int c = 0; c < block_width; c += 8) {
            const __m256 x = _mm256_add_ps((__m256)load<8>(row + c).x, _mm256_loadu_ps(bias + c));
            const int not_below = _mm256_movemask_ps(_mm256_cmp_ps(x, t, _CMP_NLT_UQ));
            bits |= static_cast<uint64_t>(static_cast<uint32_t>(not_below)) << c;
        }
        // No branch: where the large values are can't be predicted.
        blocks[found] = static_cast<int32_t>(b);
        columns[found] = bits;
        found += bits != 0;
    }
    return found;
}

template <class T>
CSAE_AVX2 void group_maxima_avx2(const T* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, bias, n, order, groups);
}

CSAE_AVX2 int32_t bound_of_kth_avx2(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

CSAE_AVX2 void rank_avx2(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx2 = {{find_avx2<float>, group_maxima_avx2<float>},
                             {find_avx2<BFloat16>, group_maxima_avx2<BFloat16>},
                             bound_of_kth_avx2,
                             rank_avx2};

// --- AVX-512 -----------------------------------------------------------------------------------------------

template <class T>
CSAE_AVX512 inline __m512 sum_avx512(const T* row, const float* bias) {
    return _mm512_add_ps((__m512)load<16>(row).x, _mm512_loadu_ps(bias));
}

template <class T>
CSAE_AVX512 int64_t find_avx512(const T* row, const float* bias, int64_t n_blocks, float threshold,
                                int32_t* blocks, uint64_t* columns) {
    const __m512 t = _mm512_set1_ps(threshold);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, bias += block_width) {
        fetch_block(row + ahead);
        const __mmask16 m0 = _mm512_cmp_ps_mask(sum_avx512(row, bias), t, _CMP_NLT_UQ);
        const __mmask16 m1 = _mm512_cmp_ps_mask(sum_avx512(row + 16, bias + 16), t, _CMP_NLT_UQ);
        const __mmask16 m2 = _mm512_cmp_ps_mask(sum_avx512(row + 32, bias + 32), t, _CMP_NLT_UQ);
        const __mmask16 m3 = _mm512_cmp_ps_mask(sum_avx512(row + 48, bias + 48), t, _CMP_NLT_UQ);
        const __mmask32 low = _mm512_kunpackw(m1, m0), high = _mm512_kunpackw(m3, m2);
        const uint64_t bits = _cvtmask64_u64(_mm512_kunpackd(high, low));
        blocks[found] = static_cast<int32_t>(b);
        columns[found] = bits;
        found += bits != 0;
    }
    return found;
}

template <class T>
CSAE_AVX512 void group_maxima_avx512(const T* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, bias, n, order, groups);
}

CSAE_AVX512 int32_t bound_of_kth_avx512(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

CSAE_AVX512 void rank_avx512(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx512 = {{find_avx512<float>, group_maxima_avx512<float>},
                             {find_avx512<BFloat16>, group_maxima_avx512<BFloat16>},
                             bound_of_kth_avx512,
                             rank_avx512};

#endif

}  // namespace

const TopkScan& topk_scan() {
#if CSAE_X86
    if (current_isa() == Isa::avx512) return avx512;
    if (current_isa() == Isa::avx2) return avx2;
#endif
    return portable;
}

}  // namespace csae
