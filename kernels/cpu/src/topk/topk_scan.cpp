#include "topk/topk_scan.h"

#include <limits>

#include "simd/isa.h"

#if CSAE_X86
#if !defined(__clang__)
// GCC's own header leaves the unused operand of some intrinsics uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace csae {
namespace {

// Columns that are prefetched ahead. A tile is mostly in L3, row after row, so this often reaches into the next row.
constexpr int64_t ahead = 512;

// --- plain C++, compiled for each instruction set ----------------------------------------------------------

CSAE_INLINE void group_maxima(const Sums& row, int64_t n, int32_t* order, int64_t groups) {
    for (int64_t g = 0; g < groups; g += group_unit) {
        int32_t maxima[group_unit];
        for (int32_t& maximum : maxima) maximum = std::numeric_limits<int32_t>::min();
        for (int64_t c = g; c < n; c += groups) {
            for (int64_t l = 0; l < group_unit; ++l) {
                const int32_t here = ordered(at<1>(row, c + l).x[0]);
                maxima[l] = here > maxima[l] ? here : maxima[l];
            }
        }
        std::memcpy(order + g, maxima, sizeof maxima);
    }
}

CSAE_INLINE int64_t count_reaching(const int32_t* order, int64_t n, int32_t bound) {
    int32_t reach = 0;
    for (int64_t i = 0; i < n; ++i) reach += order[i] >= bound;
    return reach;
}

// Bisects to the largest low * unit that at least k numbers reach; stops early at one that exactly k reach. Invariant:
// at least k reach low * unit, fewer than k reach (high + 1) * unit.
CSAE_INLINE int32_t bisect(const int32_t* order, int64_t n, int64_t k, int64_t low, int64_t high, int64_t unit,
                           bool& exactly_k) {
    while (low < high && !exactly_k) {
        const int64_t middle = high - (high - low) / 2;
        const int64_t reach = count_reaching(order, n, static_cast<int32_t>(middle * unit));
        exactly_k = reach == k;
        if (reach < k) {
            high = middle - 1;
        } else {
            low = middle;
        }
    }
    return static_cast<int32_t>(low * unit);
}

CSAE_INLINE int32_t bound_of_kth(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    int32_t lowest = order[0], highest = order[0];
    for (int64_t i = 1; i < n; ++i) {
        lowest = order[i] < lowest ? order[i] : lowest;
        highest = order[i] > highest ? order[i] : highest;
    }
    exactly_k = false;
    // The upper 16 bits first, which mostly suffice.
    const int32_t half = bisect(order, n, k, lowest >> 16, highest >> 16, 1 << 16, exactly_k);
    if (exactly_k) return half;
    const int32_t end = half | 0xFFFF;
    if (count_reaching(order, n, end) >= k) return end;
    if (count_reaching(order, n, half + 1) < k) return half;
    return bisect(order, n, k, int64_t{half} + 1, int64_t{end} - 1, 1, exactly_k);
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

int64_t find_portable(const Sums& row, int64_t n_blocks, float threshold, int32_t* blocks, uint64_t* columns) {
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const Sums block = row.from(b * block_width);
        // Compilers vectorise this loop, and not the one below that shifts.
        int32_t any = 0;
        for (int64_t c = 0; c < block_width; ++c) any |= !(at<1>(block, c).x[0] < threshold);
        if (any == 0) continue;
        uint64_t bits = 0;
        for (int64_t c = 0; c < block_width; ++c) {
            bits |= static_cast<uint64_t>(!(at<1>(block, c).x[0] < threshold)) << c;
        }
        blocks[found] = static_cast<int32_t>(b);
        columns[found++] = bits;
    }
    return found;
}

void group_maxima_portable(const Sums& row, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, n, order, groups);
}

int32_t bound_of_kth_portable(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

void rank_portable(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan portable = {find_portable, group_maxima_portable, bound_of_kth_portable, rank_portable};

#if CSAE_X86

// --- AVX2 --------------------------------------------------------------------------------------------------

CSAE_AVX2 int64_t find_avx2(const Sums& row, int64_t n_blocks, float threshold, int32_t* blocks, uint64_t* columns) {
    const __m256 t = _mm256_set1_ps(threshold);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const Sums block = row.from(b * block_width);
        block.fetch(ahead);
        uint64_t bits = 0;
        for (int c = 0; c < block_width; c += 8) {
            const __m256 x = (__m256)at<8>(block, c).x;
            const int not_below = _mm256_movemask_ps(_mm256_cmp_ps(x, t, _CMP_NLT_UQ));
            bits |= static_cast<uint64_t>(static_cast<uint32_t>(not_below)) << c;
        }
        // Without a branch, because it would be unpredictable.
        blocks[found] = static_cast<int32_t>(b);
        columns[found] = bits;
        found += bits != 0;
    }
    return found;
}

CSAE_AVX2 void group_maxima_avx2(const Sums& row, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, n, order, groups);
}

CSAE_AVX2 int32_t bound_of_kth_avx2(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

CSAE_AVX2 void rank_avx2(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx2 = {find_avx2, group_maxima_avx2, bound_of_kth_avx2, rank_avx2};

// --- AVX-512 -----------------------------------------------------------------------------------------------

CSAE_AVX512 inline __mmask16 not_below(const Sums& row, int64_t c, __m512 threshold) {
    return _mm512_cmp_ps_mask((__m512)at<16>(row, c).x, threshold, _CMP_NLT_UQ);
}

CSAE_AVX512 int64_t find_avx512(const Sums& row, int64_t n_blocks, float threshold, int32_t* blocks,
                                uint64_t* columns) {
    const __m512 t = _mm512_set1_ps(threshold);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const Sums block = row.from(b * block_width);
        block.fetch(ahead);
        const __mmask32 low = _mm512_kunpackw(not_below(block, 16, t), not_below(block, 0, t));
        const __mmask32 high = _mm512_kunpackw(not_below(block, 48, t), not_below(block, 32, t));
        const uint64_t bits = _cvtmask64_u64(_mm512_kunpackd(high, low));
        blocks[found] = static_cast<int32_t>(b);
        columns[found] = bits;
        found += bits != 0;
    }
    return found;
}

CSAE_AVX512 void group_maxima_avx512(const Sums& row, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, n, order, groups);
}

CSAE_AVX512 int32_t bound_of_kth_avx512(const int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

CSAE_AVX512 void rank_avx512(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx512 = {find_avx512, group_maxima_avx512, bound_of_kth_avx512, rank_avx512};

#endif

}  // namespace

const TopkScan& topk_scan() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return avx512;
    if (current_isa() == Isa::avx2) return avx2;
#endif
    return portable;
}

}  // namespace csae
