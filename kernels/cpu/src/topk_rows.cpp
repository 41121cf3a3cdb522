// The k largest of each row, from tiles of columns that come one after the other.
//
// Each row has a short list of candidates and a threshold. A tile is compared with the thresholds, which reads it once,
// while it is still in cache; what is not below is appended. When the list is full, its k largest stay, and what they
// all reach becomes the threshold. So each further tile leaves fewer: of F columns in random order about k log(F / k)
// are ever appended. A later column loses against an equal earlier one, and candidates stay in the order of columns.
#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <new>

#include "csae_cpu.h"
#include "parallel.h"
#include "topk_scan.h"

namespace csae {
namespace {

// A thread for less than this many values costs more than it saves.
constexpr int64_t values_per_thread = 65536;

// Up to here ranking each candidate against all others, which has no branch, is faster than sorting.
constexpr int64_t max_ranked = 192;

// Blocks that are compared with the threshold before what was found in them is appended.
constexpr int64_t blocks_ahead = 16;

// The k-th largest of 4 k maxima, each of 8 columns, is a bound that about 1.15 k of these columns reach.
constexpr int64_t maxima_per_k = 4, columns_per_maximum = 8;

constexpr int32_t broken = -1;  // the count of a row that has a NaN

const int32_t infinity = ordered(std::numeric_limits<float>::infinity());
const int32_t minus_infinity = ordered(-std::numeric_limits<float>::infinity());

// What may still be among the k largest of a row, by column: ordered(value), with -0.0 made 0.0, and the column.
struct Candidates {
    int32_t* order;
    int32_t* columns;
    int64_t count;

    Candidates(const csae_topk& of, int64_t i)
        : order(of.order + i * of.capacity), columns(of.columns + i * of.capacity), count(of.count[i]) {}

    // Of 64 columns those that have a bit. Returns whether one of them is NaN.
    bool append(const float* row, const float* bias, uint64_t bits, int64_t first_column) {
        bool nan = false;
        for (; bits != 0; bits &= bits - 1) {
            const int64_t c = __builtin_ctzll(bits);
            const float x = (row[c] + bias[c]) + 0.0f;  // -0.0 + 0.0 is 0.0
            nan |= x != x;
            order[count] = ordered(x);
            columns[count++] = static_cast<int32_t>(first_column + c);
        }
        return nan;
    }

    // Leaves those above the bound, and the first `ties` of those that are equal to it.
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
};

// Leaves the k largest. Returns what a later value must reach to be one of them.
float prune(const TopkScan& scan, Candidates& candidates, int64_t k) {
    bool exactly_k;
    const int32_t bound = scan.bound_of_kth(candidates.order, candidates.count, k, exactly_k);
    if (exactly_k) {
        candidates.keep(bound, k);
        return from_ordered(std::max(bound, minus_infinity));
    }
    int64_t larger = 0;
    for (int64_t i = 0; i < candidates.count; ++i) larger += candidates.order[i] > bound;
    candidates.keep(bound, k - larger);
    return from_ordered(std::min(bound + 1, infinity));
}

// One row of csae_topk_add, some of its columns at a time.
struct Row {
    const TopkScan& scan;
    Candidates candidates;
    float threshold;
    int64_t k, limit;
    bool nan;

    // A threshold to begin with, from the first columns: as many as `groups` maxima reach it as needed.
    void start(const float* row, const float* bias, int64_t groups, int64_t n) {
        bool exactly_k;
        scan.group_maxima(row, bias, n, candidates.order, groups);
        const int32_t bound = scan.bound_of_kth(candidates.order, groups, k, exactly_k);
        threshold = from_ordered(std::max(bound, minus_infinity));
    }

    // `of_last`: a bit for each column of the last block that exists.
    void add(const float* row, const float* bias, int64_t n_blocks, uint64_t of_last, int64_t first_column) {
        int32_t blocks[blocks_ahead + 1];
        uint64_t columns[blocks_ahead + 1];
        for (int64_t done = 0; done < n_blocks && !nan;) {
            const int64_t n = std::min(n_blocks - done, blocks_ahead), first = done * block_width;
            const int64_t found = scan.find(row + first, bias + first, n, threshold, blocks, columns);
            done += n;
            if (done == n_blocks && found > 0 && blocks[found - 1] == n - 1) columns[found - 1] &= of_last;
            for (int64_t b = 0; b < found; ++b) {
                const int64_t at = first + blocks[b] * block_width;
                if (candidates.count > limit) {
                    // What is left of these blocks is compared again, with the new threshold.
                    threshold = prune(scan, candidates, k);
                    done = at / block_width;
                    break;
                }
                nan |= candidates.append(row + at, bias + at, columns[b], first_column + at);
            }
        }
    }
};

void add(const TopkScan& scan, const csae_topk& to, int64_t i, const float* row, const float* bias, int64_t width,
         int64_t first_column) {
    if (to.count[i] == broken) return;
    Row best{scan, Candidates(to, i), to.threshold[i], to.k, to.capacity - block_width, false};
    const int64_t n_whole = width / block_width, whole = n_whole * block_width, rest = width - whole;
    const int64_t groups = std::min(maxima_per_k * to.k, to.capacity) / group_unit * group_unit;
    const int64_t per_group = groups > to.k ? std::min(width / groups, columns_per_maximum) : 0;
    if (best.candidates.count == 0 && per_group > 1) best.start(row, bias, groups, groups * per_group);
    best.add(row, bias, n_whole, ~uint64_t{0}, first_column);
    if (rest > 0) {
        float row_tail[block_width] = {}, bias_tail[block_width] = {};
        std::copy_n(row + whole, rest, row_tail);
        std::copy_n(bias + whole, rest, bias_tail);
        best.add(row_tail, bias_tail, 1, (uint64_t{1} << rest) - 1, first_column + whole);
    }
    to.threshold[i] = best.threshold;
    to.count[i] = best.nan ? broken : static_cast<int32_t>(best.candidates.count);
}

// What one thread needs to put the k largest of a row in order.
struct Workspace {
    std::unique_ptr<int64_t[]> keys;  // [k], and up to a multiple of 8
    int64_t ranks[max_ranked];

    explicit Workspace(int64_t k) : keys(new int64_t[k + 7]) {}
};

void finish(const TopkScan& scan, const csae_topk& best, int64_t i, float* values, int64_t* indices, Workspace& w) {
    Candidates candidates(best, i);
    const int64_t k = best.k;
    if (candidates.count == broken) {
        std::fill(values, values + k, std::numeric_limits<float>::quiet_NaN());
        for (int64_t j = 0; j < k; ++j) indices[j] = j;
        return;
    }
    if (candidates.count > k) prune(scan, candidates, k);
    // A value and its column in one integer that is larger where the value is, or the value is equal and the column
    // lower.
    int64_t* keys = w.keys.get();
    for (int64_t j = 0; j < k; ++j) {
        const auto high = static_cast<uint64_t>(static_cast<uint32_t>(candidates.order[j])) << 32;
        keys[j] = static_cast<int64_t>(high | ~static_cast<uint32_t>(candidates.columns[j]));
    }
    const auto put = [&](int64_t at, int64_t key) {
        values[at] = std::max(from_ordered(static_cast<int32_t>(key >> 32)), 0.0f);
        indices[at] = static_cast<int64_t>(~static_cast<uint32_t>(key));
    };
    if (k <= max_ranked) {
        scan.rank(keys, k, w.ranks);
        for (int64_t j = 0; j < k; ++j) put(w.ranks[j], keys[j]);
    } else {
        std::sort(keys, keys + k, std::greater<int64_t>());
        for (int64_t j = 0; j < k; ++j) put(j, keys[j]);
    }
}

// Whether `best` can be worked on, and each row has `least` candidates or is broken.
bool possible(const csae_topk* best, int64_t least) {
    if (best == nullptr || best->n < 0 || best->k < 1) return false;
    if (best->capacity > std::numeric_limits<int32_t>::max() || best->k > best->capacity - block_width) return false;
    if (best->n == 0) return true;
    if (best->order == nullptr || best->columns == nullptr || best->threshold == nullptr || best->count == nullptr) {
        return false;
    }
    return std::all_of(best->count, best->count + best->n,
                       [&](int32_t count) { return count == broken || (count >= least && count <= best->capacity); });
}

int64_t piece_of(int64_t n, int n_threads) {
    return std::max<int64_t>(1, std::min<int64_t>(64, n / (4 * n_threads)));
}

}  // namespace
}  // namespace csae

int csae_topk_add(const csae_topk* best, const float* pre_acts, int64_t pre_acts_stride, const float* bias,
                  int64_t width, int64_t first_column, int n_threads) {
    if (!csae::possible(best, 0) || width < 0 || first_column < 0 || pre_acts_stride < 0 || n_threads < 1) {
        return csae_bad_argument;
    }
    if (width > std::numeric_limits<int32_t>::max() - first_column) return csae_bad_argument;
    const int64_t n = best->n;
    if (n == 0 || width == 0) return csae_ok;
    if (pre_acts == nullptr || bias == nullptr) return csae_bad_argument;
    n_threads = static_cast<int>(std::min<int64_t>({n_threads, n, 1 + n * width / csae::values_per_thread}));
    const csae::TopkScan& scan = csae::topk_scan();
    csae::parallel_for(n, csae::piece_of(n, n_threads), n_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            csae::add(scan, *best, i, pre_acts + i * pre_acts_stride, bias, width, first_column);
        }
    });
    return csae_ok;
}

int csae_topk_finish(const csae_topk* best, float* values, int64_t values_stride, int64_t* indices,
                     int64_t indices_stride, int n_threads) {
    if (best == nullptr || !csae::possible(best, best->k) || n_threads < 1) return csae_bad_argument;
    const int64_t n = best->n, k = best->k;
    if (n == 0) return csae_ok;
    if (values == nullptr || indices == nullptr) return csae_bad_argument;
    if (n > 1 && (values_stride < k || indices_stride < k)) return csae_bad_argument;
    try {
        n_threads = static_cast<int>(std::min<int64_t>({n_threads, n, 1 + n * k / 2048}));
        std::unique_ptr<std::unique_ptr<csae::Workspace>[]> workspaces(new std::unique_ptr<csae::Workspace>[n_threads]);
        for (int i = 0; i < n_threads; ++i) workspaces[i].reset(new csae::Workspace(k));
        const csae::TopkScan& scan = csae::topk_scan();
        csae::parallel_for(n, csae::piece_of(n, n_threads), n_threads, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                csae::finish(scan, *best, i, values + i * values_stride, indices + i * indices_stride,
                             *workspaces[thread]);
            }
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
