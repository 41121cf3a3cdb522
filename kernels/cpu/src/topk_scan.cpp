#include "topk_scan.h"

#include <limits>

#include "isa.h"

#if CSAE_X86
#if !defined(__clang__)
// GCC's own header leaves the unused operand of _mm512_max_ps uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace csae {
namespace {

// --- in plain C++: compiled for each instruction set -------------------------------------------------------

CSAE_INLINE float bound_of_kth(const float* maxima, int64_t n_blocks, int64_t k, float* folded, int32_t* order, int64_t n_folded) {
    // The maxima of 16 * n_folded larger groups.
    const int64_t n = n_folded * block_groups, n_maxima = n_blocks * block_groups;
    std::memcpy(folded, maxima, static_cast<size_t>(n) * sizeof *folded);
    for (int64_t first = n; first < n_maxima; first += n) {
        const int64_t m = n_maxima - first < n ? n_maxima - first : n;
        for (int64_t i = 0; i < m; ++i) folded[i] = maxima[first + i] > folded[i] ? maxima[first + i] : folded[i];
    }
    // Their k-th largest, bit by bit from the top. The lower half of the bits would raise it by less than 1%.
    for (int64_t i = 0; i < n; ++i) order[i] = ordered(folded[i]);
    auto bound = std::numeric_limits<int32_t>::min();
    for (int bit = 31; bit >= 16; --bit) {
        const auto higher = static_cast<int32_t>(static_cast<uint32_t>(bound) + (uint32_t{1} << bit));
        int32_t count[block_groups] = {};
        for (int64_t i = 0; i < n; i += block_groups) {
            for (int64_t l = 0; l < block_groups; ++l) count[l] += order[i + l] >= higher;
        }
        int32_t total = 0;
        for (int32_t c : count) total += c;
        if (total >= k) bound = higher;
    }
    const int32_t lowest = ordered(-std::numeric_limits<float>::infinity());
    return from_ordered(bound > lowest ? bound : lowest);
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

bool group_maxima_portable(const float* row, int64_t n_blocks, float* maxima) {
    int32_t nan[block_groups] = {};
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, maxima += block_groups) {
        for (int64_t l = 0; l < block_groups; ++l) {
            const float x0 = row[l], x1 = row[l + 16], x2 = row[l + 32], x3 = row[l + 48];
            const float left = x0 > x1 ? x0 : x1, right = x2 > x3 ? x2 : x3;
            maxima[l] = left > right ? left : right;
            nan[l] |= -static_cast<int32_t>(x0 != x0) | -static_cast<int32_t>(x1 != x1);
            nan[l] |= -static_cast<int32_t>(x2 != x2) | -static_cast<int32_t>(x3 != x3);
        }
    }
    int32_t any = 0;
    for (int32_t lane : nan) any |= lane;
    return any != 0;
}

int64_t find_at_least_portable(const float* row, const float* maxima, int64_t n_blocks, float bound,
                               uint32_t* blocks, uint64_t* columns) {
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        uint32_t any = 0;
        for (int64_t l = 0; l < block_groups; ++l) any |= maxima[b * block_groups + l] >= bound;
        blocks[found] = static_cast<uint32_t>(b);
        found += any;
    }
    for (int64_t i = 0; i < found; ++i) {
        const float* block = row + block_width * blocks[i];
        uint64_t bits = 0;
        for (int64_t c = 0; c < block_width; ++c) bits |= static_cast<uint64_t>(block[c] >= bound) << c;
        columns[i] = bits;
    }
    return found;
}

float bound_of_kth_portable(const float* maxima, int64_t n_blocks, int64_t k, float* folded, int32_t* order, int64_t n_folded) {
    return bound_of_kth(maxima, n_blocks, k, folded, order, n_folded);
}

void rank_portable(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan portable = {group_maxima_portable, bound_of_kth_portable, find_at_least_portable, rank_portable};

#if CSAE_X86

// --- AVX2 --------------------------------------------------------------------------------------------------

CSAE_AVX2 bool group_maxima_avx2(const float* row, int64_t n_blocks, float* maxima) {
    __m256 nan = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, maxima += block_groups) {
        for (int64_t l = 0; l < block_groups; l += 8) {
            const __m256 x0 = _mm256_loadu_ps(row + l), x1 = _mm256_loadu_ps(row + l + 16);
            const __m256 x2 = _mm256_loadu_ps(row + l + 32), x3 = _mm256_loadu_ps(row + l + 48);
            // One unordered comparison looks at two vectors: it is true where either has a NaN.
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(x0, x1, _CMP_UNORD_Q));
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(x2, x3, _CMP_UNORD_Q));
            _mm256_storeu_ps(maxima + l, _mm256_max_ps(_mm256_max_ps(x0, x1), _mm256_max_ps(x2, x3)));
        }
    }
    return _mm256_movemask_ps(nan) != 0;
}

CSAE_AVX2 int64_t find_at_least_avx2(const float* row, const float* maxima, int64_t n_blocks, float bound,
                                     uint32_t* blocks, uint64_t* columns) {
    const __m256 b8 = _mm256_set1_ps(bound);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        // No branch: where the large values are can't be predicted.
        const float* groups = maxima + b * block_groups;
        const __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(groups), b8, _CMP_GE_OQ);
        const __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(groups + 8), b8, _CMP_GE_OQ);
        blocks[found] = static_cast<uint32_t>(b);
        found += _mm256_movemask_ps(_mm256_or_ps(low, high)) != 0;
    }
    for (int64_t i = 0; i < found; ++i) {
        const float* block = row + block_width * blocks[i];
        uint64_t bits = 0;
        for (int64_t c = 0; c < block_width; c += 8) {
            const __m256 at_least = _mm256_cmp_ps(_mm256_loadu_ps(block + c), b8, _CMP_GE_OQ);
            bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(at_least))) << c;
        }
        columns[i] = bits;
    }
    return found;
}

CSAE_AVX2 float bound_of_kth_avx2(const float* maxima, int64_t n_blocks, int64_t k, float* folded, int32_t* order, int64_t n_folded) {
    return bound_of_kth(maxima, n_blocks, k, folded, order, n_folded);
}

CSAE_AVX2 void rank_avx2(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx2 = {group_maxima_avx2, bound_of_kth_avx2, find_at_least_avx2, rank_avx2};

// --- AVX-512 -----------------------------------------------------------------------------------------------

CSAE_AVX512 bool group_maxima_avx512(const float* row, int64_t n_blocks, float* maxima) {
    uint32_t nan = 0;
    for (int64_t b = 0; b < n_blocks; ++b, row += block_width, maxima += block_groups) {
        const __m512 x0 = _mm512_loadu_ps(row), x1 = _mm512_loadu_ps(row + 16);
        const __m512 x2 = _mm512_loadu_ps(row + 32), x3 = _mm512_loadu_ps(row + 48);
        const __mmask16 left = _mm512_cmp_ps_mask(x0, x1, _CMP_UNORD_Q);
        const __mmask16 right = _mm512_cmp_ps_mask(x2, x3, _CMP_UNORD_Q);
        nan |= _cvtmask16_u32(_kor_mask16(left, right));
        _mm512_storeu_ps(maxima, _mm512_max_ps(_mm512_max_ps(x0, x1), _mm512_max_ps(x2, x3)));
    }
    return nan != 0;
}

CSAE_AVX512 int64_t find_at_least_avx512(const float* row, const float* maxima, int64_t n_blocks, float bound,
                                         uint32_t* blocks, uint64_t* columns) {
    const __m512 b16 = _mm512_set1_ps(bound);
    int64_t found = 0;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const __mmask16 any = _mm512_cmp_ps_mask(_mm512_loadu_ps(maxima + b * block_groups), b16, _CMP_GE_OQ);
        blocks[found] = static_cast<uint32_t>(b);
        found += _cvtmask16_u32(any) != 0;
    }
    for (int64_t i = 0; i < found; ++i) {
        const float* block = row + block_width * blocks[i];
        uint64_t bits = 0;
        for (int64_t c = 0; c < block_width; c += 16) {
            const __mmask16 at_least = _mm512_cmp_ps_mask(_mm512_loadu_ps(block + c), b16, _CMP_GE_OQ);
            bits |= static_cast<uint64_t>(_cvtmask16_u32(at_least)) << c;
        }
        columns[i] = bits;
    }
    return found;
}

CSAE_AVX512 float bound_of_kth_avx512(const float* maxima, int64_t n_blocks, int64_t k, float* folded, int32_t* order, int64_t n_folded) {
    return bound_of_kth(maxima, n_blocks, k, folded, order, n_folded);
}

CSAE_AVX512 void rank_avx512(int64_t* keys, int64_t n, int64_t* ranks) { rank(keys, n, ranks); }

constexpr TopkScan avx512 = {group_maxima_avx512, bound_of_kth_avx512, find_at_least_avx512, rank_avx512};

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
