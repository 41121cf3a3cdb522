// Weighted sums of, and dot products with, chosen rows of a table, in each instruction set. T, the type of the table,
// is float or BFloat16; sums are float.
#pragma once

#include <cstdint>

#include "simd/register.h"

namespace csae {

template <class T>
struct RowSums {
    // out [d] = sum over j < count of weights[j] * table[ids[j]], added in the order of j.
    // next_ids [next_count]: the rows of the next call, whose first columns are prefetched.
    void (*weighted_sum)(const T* table, int64_t stride, int64_t d, const int64_t* ids, const float* weights,
                         int64_t count, const int64_t* next_ids, int64_t next_count, float* out);

    // The same, rounded to the table's type.
    void (*rounded_weighted_sum)(const T* table, int64_t stride, int64_t d, const int64_t* ids, const float* weights,
                                 int64_t count, const int64_t* next_ids, int64_t next_count, T* out);

    // out[j] = <row, table[ids[j]]> for j < count.
    void (*dots)(const T* table, int64_t stride, int64_t d, const int64_t* ids, int64_t count, const float* row,
                 float* out);
};

template <class T>
const RowSums<T>& row_sums();

// The length of a row of a code: the place after its last non-zero value. NaN is non-zero.
inline int64_t length_of(const float* values, int64_t k) {
    while (k > 0 && values[k - 1] == 0) --k;
    return k;
}

// Whether all of ids [count] lie in [0, n).
inline bool all_below(const int64_t* ids, int64_t count, int64_t n) {
    uint64_t outside = 0;
    for (int64_t j = 0; j < count; ++j) outside |= static_cast<uint64_t>(ids[j]) >= static_cast<uint64_t>(n);
    return outside == 0;
}

}  // namespace csae
