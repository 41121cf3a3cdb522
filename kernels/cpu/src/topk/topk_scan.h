// The inner loops of the row-wise top-k, in each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/register.h"

namespace csae {

// Integers in the order of the floats, except that -0.0 comes below 0.0.
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

// A row is read in blocks of 64 columns: a bit for each in one integer.
constexpr int64_t block_width = 64;

// Maxima are worked on so many at a time.
constexpr int64_t group_unit = 16;

// A row of pre-activations: row + bias.
struct Sums {
    const float *row, *bias;

    void fetch(int64_t c) const {
        for (int64_t line = 0; line < block_width; line += 16) __builtin_prefetch(row + c + line);
    }
    Sums from(int64_t c) const { return {row + c, bias + c}; }
};

template <int W>
CSAE_INLINE Register<W> at(const Sums& of, int64_t c) {
    return {load<W>(of.row + c).x + load<W>(of.bias + c).x};
}

struct TopkScan {
    // The blocks of a row that have something not below the threshold, NaN included, in order, and for each a bit per
    // column that has it. Returns how many. Writes go one place past that many.
    int64_t (*find)(const Sums& row, int64_t n_blocks, float threshold, int32_t* blocks, uint64_t* columns);

    // order [groups]: the largest of every groups-th of a row's first n. groups is a multiple of group_unit, n one of
    // groups.
    void (*group_maxima)(const Sums& row, int64_t n, int32_t* order, int64_t groups);

    // The largest bound that at least k of order [n] reach; or a lower one that exactly k reach, and then `exactly_k`.
    // Needs 1 <= k <= n.
    int32_t (*bound_of_kth)(const int32_t* order, int64_t n, int64_t k, bool& exactly_k);

    // ranks [n]: how many of keys [n] are larger. Both have room for n rounded up to a multiple of 8.
    void (*rank)(int64_t* keys, int64_t n, int64_t* ranks);
};

const TopkScan& topk_scan();

}  // namespace csae
