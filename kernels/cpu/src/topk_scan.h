// The inner loops of the row-wise top-k, in each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "register.h"

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

// What reads rows of T, float or BFloat16.
template <class T>
struct TopkReads {
    // The blocks of row + bias that have something not below the threshold, NaN included, in order, and for each a bit
    // per column that has it. Returns how many. Writes go one place past that many.
    int64_t (*find)(const T* row, const float* bias, int64_t n_blocks, float threshold, int32_t* blocks,
                    uint64_t* columns);

    // order [groups]: the largest of every groups-th of row + bias [n]. groups is a multiple of group_unit, n one of
    // groups.
    void (*group_maxima)(const T* row, const float* bias, int64_t n, int32_t* order, int64_t groups);
};

struct TopkScan {
    TopkReads<float> floats;
    TopkReads<BFloat16> bfloat16s;

    template <class T>
    const TopkReads<T>& of() const;

    // The largest bound that at least k of order [n] reach; or a lower one that exactly k reach, and then `exactly_k`.
    // Needs 1 <= k <= n.
    int32_t (*bound_of_kth)(const int32_t* order, int64_t n, int64_t k, bool& exactly_k);

    // ranks [n]: how many of keys [n] are larger. Both have room for n rounded up to a multiple of 8.
    void (*rank)(int64_t* keys, int64_t n, int64_t* ranks);
};

template <>
inline const TopkReads<float>& TopkScan::of<float>() const {
    return floats;
}

template <>
inline const TopkReads<BFloat16>& TopkScan::of<BFloat16>() const {
    return bfloat16s;
}

const TopkScan& topk_scan();

}  // namespace csae
