// The two passes of the row-wise top-k over a row, and the sort of what they leave, in each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

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

// A row is cut into blocks of 64 columns, a block into 16 groups of 4 (columns l, l + 16, l + 32, l + 48).
constexpr int64_t block_width = 64;
constexpr int64_t block_groups = 16;

struct TopkScan {
    // maxima [n_blocks, 16]: the maximum of each group. Returns whether there is a NaN (then maxima is undefined).
    bool (*group_maxima)(const float* row, int64_t n_blocks, float* maxima);

    // A bound that at least k of the row's values reach, from the maxima. folded and order [n_folded, 16] are
    // scratch. Needs k <= 16 * n_folded <= 16 * n_blocks.
    float (*bound_of_kth)(const float* maxima, int64_t n_blocks, int64_t k, float* folded, int32_t* order,
                          int64_t n_folded);

    // The blocks with a value of at least `bound`, in order, and for each a bit per column that has one.
    // Returns how many. Writes may go one past that many.
    int64_t (*find_at_least)(const float* row, const float* maxima, int64_t n_blocks, float bound, uint32_t* blocks,
                             uint64_t* columns);

    // ranks [n]: how many of keys [n] are larger. Both have room for n rounded up to a multiple of 8.
    void (*rank)(int64_t* keys, int64_t n, int64_t* ranks);
};

const TopkScan& topk_scan();

}  // namespace csae
