// The inner loops of the streaming top-k, in each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/register.h"

namespace csae {

// Integers that sort like the floats, except that -0.0 comes below 0.0.
inline int32_t ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_ordered(int32_t order) {
    const int32_t bits = order ^ ((order >> 31) & 0x7fffffff);
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// A row is read in blocks of 64 columns, whose hits are the bits of one integer.
constexpr int64_t block_width = 64;

// Group maxima that are computed at a time.
constexpr int64_t group_unit = 16;

// A row of pre-activations: row + bias, added on the fly.
struct Sums {
    const float *row, *bias;

    void fetch(int64_t c) const {
        for (int64_t line = 0; line < block_width; line += 16) __builtin_prefetch(row + c + line);
    }
    Sums from(int64_t c) const { return {row + c, bias + c}; }
};

template <int W>
CSAE_INLINE Register<W> at(const Sums& sums, int64_t c) {
    return {load<W>(sums.row + c).x + load<W>(sums.bias + c).x};
}

struct TopkScan {
    // Finds the blocks of a row with a value that is not below the threshold (or NaN). Writes their numbers in order,
    // and a bit for each such column. Returns how many blocks there are. Both outputs need room for one more.
    int64_t (*find)(const Sums& row, int64_t n_blocks, float threshold, int32_t* blocks, uint64_t* columns);

    // order [groups]: order[g] is the maximum of columns g, g + groups, g + 2 groups, ... below n, as an integer.
    // groups is a multiple of group_unit, n one of groups.
    void (*group_maxima)(const Sums& row, int64_t n, int32_t* order, int64_t groups);

    // Bisection select. Returns the k-th largest of order [n]; or a smaller number that exactly k reach, and then sets
    // exactly_k. Needs 1 <= k <= n.
    int32_t (*bound_of_kth)(const int32_t* order, int64_t n, int64_t k, bool& exactly_k);

    // ranks[i]: the number of keys [n] that are larger than keys[i]. Both need room for n rounded up to a multiple of
    // 8.
    void (*rank)(int64_t* keys, int64_t n, int64_t* ranks);
};

const TopkScan& topk_scan();

}  // namespace csae
