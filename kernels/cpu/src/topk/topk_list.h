// The candidates for the k largest of a row, and sorting them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>

#include "csae_cpu.h"
#include "topk/topk_scan.h"

namespace csae {

constexpr int32_t broken = -1;  // the count of a row with a NaN

// The candidates of row i, in column order: ordered(value), with -0.0 replaced by 0.0, and the column.
struct Candidates {
    int32_t* order;
    int32_t* columns;
    int64_t count;

    Candidates(const csae_topk& best, int64_t i)
        : order(best.order + i * best.capacity), columns(best.columns + i * best.capacity), count(best.count[i]) {}

    // Appends those of 64 columns whose bit is set. Returns whether one of them is NaN.
    template <class Entries>
    bool append(const Entries& row, uint64_t bits, int64_t first_column) {
        bool nan = false;
        for (; bits != 0; bits &= bits - 1) {
            const int64_t c = __builtin_ctzll(bits);
            const float x = at<1>(row, c).x[0] + 0.0f;  // -0.0 + 0.0 is 0.0
            nan |= x != x;
            order[count] = ordered(x);
            columns[count++] = static_cast<int32_t>(first_column + c);
        }
        return nan;
    }

    // Keeps the candidates above `bound`, and the first `ties` of those equal to it.
    void keep(int32_t bound, int64_t ties) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t here = order[i];
            order[kept] = here;
            columns[kept] = columns[i];
            const bool tie = here == bound;
            kept += (here > bound) | (tie & (ties > 0));
            ties -= tie;
        }
        count = kept;
    }

    // Keeps the k largest. Returns the new threshold: what a later value must reach to be among them.
    float prune(const TopkScan& scan, int64_t k) {
        bool exactly_k;
        const int32_t bound = scan.bound_of_kth(order, count, k, exactly_k);
        if (exactly_k) {
            keep(bound, k);
            return from_ordered(std::max(bound, ordered(-std::numeric_limits<float>::infinity())));
        }
        int64_t larger = 0;
        for (int64_t i = 0; i < count; ++i) larger += order[i] > bound;
        keep(bound, k - larger);
        return from_ordered(std::min(bound + 1, ordered(std::numeric_limits<float>::infinity())));
    }
};

// One integer for a value and its column, which orders by value, then by lower column.
inline int64_t key_of(int32_t order, int64_t column) {
    const auto high = static_cast<uint64_t>(static_cast<uint32_t>(order)) << 32;
    return static_cast<int64_t>(high | ~static_cast<uint32_t>(column));
}

inline float value_of_key(int64_t key) { return from_ordered(static_cast<int32_t>(key >> 32)); }

inline int64_t column_of_key(int64_t key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

// Sorts up to `most` keys.
class KeySorter {
    // Up to this many keys, ranking each against all others is faster than std::sort, because it has no branches.
    static constexpr int64_t max_ranked = 192;

    std::unique_ptr<int64_t[]> sorted_;
    int64_t ranks_[max_ranked];

public:
    std::unique_ptr<int64_t[]> keys;  // [most rounded up to a multiple of 8]

    explicit KeySorter(int64_t most) : sorted_(new int64_t[most]), keys(new int64_t[most + 7]) {}

    // Returns the first n of `keys`, largest first.
    const int64_t* sort(const TopkScan& scan, int64_t n) {
        if (n <= max_ranked) {
            scan.rank(keys.get(), n, ranks_);
            for (int64_t j = 0; j < n; ++j) sorted_[ranks_[j]] = keys[j];
        } else {
            std::copy_n(keys.get(), n, sorted_.get());
            std::sort(sorted_.get(), sorted_.get() + n, std::greater<int64_t>());
        }
        return sorted_.get();
    }

    // Returns the keys of the first n candidates, largest first.
    const int64_t* sort(const TopkScan& scan, const Candidates& candidates, int64_t n) {
        for (int64_t j = 0; j < n; ++j) keys[j] = key_of(candidates.order[j], candidates.columns[j]);
        return sort(scan, n);
    }
};

// Whether `best` is valid, and each row has at least `least` candidates or is broken.
inline bool possible(const csae_topk* best, int64_t least) {
    if (best == nullptr || best->n < 0 || best->k < 1) return false;
    if (best->capacity > std::numeric_limits<int32_t>::max() || best->k > best->capacity - block_width) return false;
    if (best->n == 0) return true;
    if (best->order == nullptr || best->columns == nullptr || best->threshold == nullptr || best->count == nullptr) {
        return false;
    }
    return std::all_of(best->count, best->count + best->n,
                       [&](int32_t count) { return count == broken || (count >= least && count <= best->capacity); });
}

// Whether `best` is valid and columns first_column .. first_column + width can be added.
inline bool addable(const csae_topk* best, int64_t width, int64_t first_column) {
    return possible(best, 0) && width >= 0 && first_column >= 0 &&
           width <= std::numeric_limits<int32_t>::max() - first_column;
}

// The number of rows that a thread takes at a time.
inline int64_t piece_of(int64_t n, int n_threads) {
    return std::max<int64_t>(1, std::min<int64_t>(64, n / (4 * n_threads)));
}

}  // namespace csae
