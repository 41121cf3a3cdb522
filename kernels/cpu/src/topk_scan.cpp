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

// --- in plain C++: compiled for each instruction set -------------------------------------------------------

CSAE_INLINE int64_t append(const float* row, const float* bias, const int32_t* blocks, const uint64_t* columns,
                           int64_t n_blocks, int64_t first_column, int64_t limit, Candidates& to, bool& nan) {
    int64_t done = 0;
    for (; done < n_blocks && to.count <= limit; ++done) {
        const int64_t first = blocks[done] * block_width;
        for (uint64_t bits = columns[done]; bits != 0; bits &= bits - 1) {
            const int64_t c = first + __builtin_ctzll(bits);
            const float x = (row[c] + bias[c]) + 0.0f;  // -0.0 + 0.0 is 0.0
            nan |= x != x;
            to.order[to.count] = ordered(x);
            to.columns[to.count++] = static_cast<int32_t>(first_column + c);
        }
    }
    return done;
}

CSAE_INLINE void group_maxima(const float* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    for (int64_t g = 0; g < groups; g += candidate_group) {
        int32_t maxima[candidate_group];
        for (int32_t& maximum : maxima) maximum = std::numeric_limits<int32_t>::min();
        for (int64_t c = g; c < n; c += groups) {
            for (int64_t l = 0; l < candidate_group; ++l) {
                const int32_t here = ordered(row[c + l] + bias[c + l]);
                maxima[l] = here > maxima[l] ? here : maxima[l];
            }
        }
        std::memcpy(order + g, maxima, sizeof maxima);
    }
}

CSAE_INLINE int32_t bound_of_kth(int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    constexpr auto lowest = std::numeric_limits<int32_t>::min();
    for (; n % candidate_group != 0; ++n) order[n] = lowest;
    // Bit by bit from the top.
    int32_t bound = lowest;
    for (int bit = 31; bit >= 0; --bit) {
        const auto higher = static_cast<int32_t>(static_cast<uint32_t>(bound) + (uint32_t{1} << bit));
        int32_t reach[candidate_group] = {};
        for (int64_t i = 0; i < n; i += candidate_group) {
            for (int64_t l = 0; l < candidate_group; ++l) reach[l] += order[i + l] >= higher;
        }
        int32_t total = 0;
        for (int32_t r : reach) total += r;
        if (total >= k) bound = higher;
        exactly_k = total == k;
        if (exactly_k) break;
    }
    return bound;
}

CSAE_INLINE void keep(Candidates& candidates, int32_t bound, int64_t ties) {
    int64_t kept = 0;
    for (int64_t i = 0; i < candidates.count; ++i) {
        const int32_t order = candidates.order[i];
        candidates.order[kept] = order;
        candidates.columns[kept] = candidates.columns[i];
        const bool tie = order == bound;
        kept += (order > bound) | (tie & (ties > 0));
        ties -= tie;
    }
    candidates.count = kept;
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

int64_t find_portable(const float* row, const float* bias, int64_t n_blocks, float threshold, int32_t* blocks,
                      uint64_t* columns) {
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, bias += block_width) {
        // A compiler makes vectors of this loop, and not of the one that shifts.
        int32_t any = 0;
        for (int64_t c = 0; c < block_width; ++c) any |= !(row[c] + bias[c] < threshold);
        if (any == 0) continue;
        uint64_t bits = 0;
        for (int64_t c = 0; c < block_width; ++c) bits |= static_cast<uint64_t>(!(row[c] + bias[c] < threshold)) << c;
        blocks[found] = static_cast<int32_t>(b);
        columns[found++] = bits;
    }
    return found;
}

int64_t append_portable(const float* row, const float* bias, const int32_t* blocks, const uint64_t* columns,
                        int64_t n_blocks, int64_t first_column, int64_t limit, Candidates& to, bool& nan) {
    return append(row, bias, blocks, columns, n_blocks, first_column, limit, to, nan);
}

void group_maxima_portable(const float* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, bias, n, order, groups);
}

int32_t bound_of_kth_portable(int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

void keep_portable(Candidates& candidates, int32_t bound, int64_t ties) { keep(candidates, bound, ties); }

void rank_portable(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan portable = {find_portable, append_portable, group_maxima_portable, bound_of_kth_portable, keep_portable, rank_portable};

#if CSAE_X86

// --- AVX2 --------------------------------------------------------------------------------------------------

CSAE_AVX2 int64_t find_avx2(const float* row, const float* bias, int64_t n_blocks, float threshold, int32_t* blocks,
                            uint64_t* columns) {
    const __m256 t = _mm256_set1_ps(threshold);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, bias += block_width) {
        uint64_t bits = 0;
        for (int c = 0; c < block_width; c += 8) {
            const __m256 x = _mm256_add_ps(_mm256_loadu_ps(row + c), _mm256_loadu_ps(bias + c));
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

CSAE_AVX2 int64_t append_avx2(const float* row, const float* bias, const int32_t* blocks, const uint64_t* columns,
                              int64_t n_blocks, int64_t first_column, int64_t limit, Candidates& to, bool& nan) {
    return append(row, bias, blocks, columns, n_blocks, first_column, limit, to, nan);
}

CSAE_AVX2 void group_maxima_avx2(const float* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, bias, n, order, groups);
}

CSAE_AVX2 int32_t bound_of_kth_avx2(int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

CSAE_AVX2 void keep_avx2(Candidates& candidates, int32_t bound, int64_t ties) { keep(candidates, bound, ties); }

CSAE_AVX2 void rank_avx2(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx2 = {find_avx2, append_avx2, group_maxima_avx2, bound_of_kth_avx2, keep_avx2, rank_avx2};

// --- AVX-512 -----------------------------------------------------------------------------------------------

CSAE_AVX512 inline __m512 sum_avx512(const float* row, const float* bias) {
    return _mm512_add_ps(_mm512_loadu_ps(row), _mm512_loadu_ps(bias));
}

CSAE_AVX512 int64_t find_avx512(const float* row, const float* bias, int64_t n_blocks, float threshold,
                                int32_t* blocks, uint64_t* columns) {
    const __m512 t = _mm512_set1_ps(threshold);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, bias += block_width) {
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

CSAE_AVX512 int64_t append_avx512(const float* row, const float* bias, const int32_t* blocks, const uint64_t* columns,
                                  int64_t n_blocks, int64_t first_column, int64_t limit, Candidates& to, bool& nan) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    uint32_t unordered = 0;
    int64_t done = 0, count = to.count;
    for (; done < n_blocks && count <= limit; ++done) {
        for (int c = 0; c < block_width; c += 16) {
            const int64_t first = blocks[done] * block_width + c;
            const auto here = static_cast<__mmask16>(columns[done] >> c);
            const __m512 x = _mm512_add_ps(sum_avx512(row + first, bias + first), _mm512_setzero_ps());
            unordered |= _cvtmask16_u32(_mm512_mask_cmp_ps_mask(here, x, x, _CMP_UNORD_Q));
            const __m512i bits = _mm512_castps_si512(x);
            const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
            const __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(first_column + first)));
            _mm512_storeu_si512(to.order + count, _mm512_maskz_compress_epi32(here, _mm512_xor_si512(bits, flip)));
            _mm512_storeu_si512(to.columns + count, _mm512_maskz_compress_epi32(here, column));
            count += __builtin_popcount(_cvtmask16_u32(here));
        }
    }
    to.count = count;
    nan |= unordered != 0;
    return done;
}

CSAE_AVX512 void group_maxima_avx512(const float* row, const float* bias, int64_t n, int32_t* order, int64_t groups) {
    group_maxima(row, bias, n, order, groups);
}

CSAE_AVX512 int32_t bound_of_kth_avx512(int32_t* order, int64_t n, int64_t k, bool& exactly_k) {
    return bound_of_kth(order, n, k, exactly_k);
}

CSAE_AVX512 void keep_avx512(Candidates& candidates, int32_t bound, int64_t ties) { keep(candidates, bound, ties); }

CSAE_AVX512 void rank_avx512(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx512 = {find_avx512, append_avx512, group_maxima_avx512, bound_of_kth_avx512, keep_avx512, rank_avx512};

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
