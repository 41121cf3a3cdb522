// Streaming top-k: the k largest of each row, from tiles of columns that are added one after the other.
//
// Each row has a short list of candidates and a threshold. A tile is read once, while it is still in cache: values that
// are not below the row's threshold are appended to its list. A full list is pruned to its k largest, which raises the
// threshold, so later tiles append less: of F columns in random order about k log(F / k) are appended in all.
// Candidates stay in column order, and a later column loses against an equal earlier one.
#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "csae_cpu.h"
#include "parallel.h"
#include "topk/topk_list.h"
#include "topk/topk_scan.h"

namespace csae {
namespace {

// Fewest values that are worth a thread of their own.
constexpr int64_t values_per_thread = 65536;

// Blocks that are compared with the threshold before their hits are appended.
constexpr int64_t blocks_ahead = 16;

// The first threshold is the k-th largest of 4 k maxima of 8 columns each. About 1.15 k of these columns reach it.
constexpr int64_t maxima_per_k = 4, columns_per_maximum = 8;

// A row whose columns are being added.
struct Row {
    const TopkScan& scan;
    Candidates candidates;
    float threshold;
    int64_t k, limit;
    bool nan;

    // Sets the first threshold, the k-th largest of the maxima of `groups` groups of the first n columns.
    void start(const Sums& row, int64_t groups, int64_t n) {
        bool exactly_k;
        scan.group_maxima(row, n, candidates.order, groups);
        const int32_t bound = scan.bound_of_kth(candidates.order, groups, k, exactly_k);
        threshold = from_ordered(std::max(bound, ordered(-std::numeric_limits<float>::infinity())));
    }

    // last_mask: a bit for each existing column of the last block.
    void add(const Sums& row, int64_t n_blocks, uint64_t last_mask, int64_t first_column) {
        int32_t blocks[blocks_ahead + 1];
        uint64_t columns[blocks_ahead + 1];
        for (int64_t done = 0; done < n_blocks && !nan;) {
            const int64_t n = std::min(n_blocks - done, blocks_ahead), first = done * block_width;
            const int64_t found = scan.find(row.from(first), n, threshold, blocks, columns);
            done += n;
            if (done == n_blocks && found > 0 && blocks[found - 1] == n - 1) columns[found - 1] &= last_mask;
            for (int64_t b = 0; b < found; ++b) {
                const int64_t at = first + blocks[b] * block_width;
                if (candidates.count > limit) {
                    // The remaining blocks are compared again, with the new threshold.
                    threshold = candidates.prune(scan, k);
                    done = at / block_width;
                    break;
                }
                nan |= candidates.append(row.from(at), columns[b], first_column + at);
            }
        }
    }
};

// The last columns of a row, padded to a whole block.
struct Tail {
    float row[block_width] = {}, bias[block_width] = {};

    Sums copy(const Sums& from, int64_t rest) {
        std::copy_n(from.row, rest, row);
        std::copy_n(from.bias, rest, bias);
        return {row, bias};
    }
};

void add(const TopkScan& scan, const csae_topk& to, int64_t i, const Sums& row, int64_t width, int64_t first_column) {
    if (to.count[i] == broken) return;
    Row best{scan, Candidates(to, i), to.threshold[i], to.k, to.capacity - block_width, false};
    const int64_t n_whole = width / block_width, whole = n_whole * block_width, rest = width - whole;
    const int64_t groups = std::min(maxima_per_k * to.k, to.capacity) / group_unit * group_unit;
    const int64_t per_group = groups > to.k ? std::min(width / groups, columns_per_maximum) : 0;
    if (best.candidates.count == 0 && per_group > 1) best.start(row, groups, groups * per_group);
    best.add(row, n_whole, ~uint64_t{0}, first_column);
    if (rest > 0) {
        Tail tail;
        best.add(tail.copy(row.from(whole), rest), 1, (uint64_t{1} << rest) - 1, first_column + whole);
    }
    to.threshold[i] = best.threshold;
    to.count[i] = best.nan ? broken : static_cast<int32_t>(best.candidates.count);
}

void finish(const TopkScan& scan, const csae_topk& best, int64_t i, float* values, int64_t* indices,
            KeySorter& sorter) {
    Candidates candidates(best, i);
    const int64_t k = best.k;
    if (candidates.count == broken) {
        std::fill(values, values + k, std::numeric_limits<float>::quiet_NaN());
        for (int64_t j = 0; j < k; ++j) indices[j] = j;
        return;
    }
    if (candidates.count > k) candidates.prune(scan, k);
    const int64_t* keys = sorter.sort(scan, candidates, k);
    for (int64_t j = 0; j < k; ++j) {
        values[j] = std::max(value_of_key(keys[j]), 0.0f);
        indices[j] = column_of_key(keys[j]);
    }
}

}  // namespace
}  // namespace csae

int csae_topk_add(const csae_topk* best, const float* pre_acts, int64_t pre_acts_stride, const float* bias,
                  int64_t width, int64_t first_column, int n_threads) {
    if (!csae::addable(best, width, first_column) || pre_acts_stride < 0 || n_threads < 1) return csae_bad_argument;
    const int64_t n = best->n;
    if (n == 0 || width == 0) return csae_ok;
    if (pre_acts == nullptr || bias == nullptr) return csae_bad_argument;
    n_threads = static_cast<int>(std::min<int64_t>({n_threads, n, 1 + n * width / csae::values_per_thread}));
    const csae::TopkScan& scan = csae::topk_scan();
    csae::parallel_for(n, csae::piece_of(n, n_threads), n_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            csae::add(scan, *best, i, {pre_acts + i * pre_acts_stride, bias}, width, first_column);
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
        std::unique_ptr<std::unique_ptr<csae::KeySorter>[]> sorters(new std::unique_ptr<csae::KeySorter>[n_threads]);
        for (int i = 0; i < n_threads; ++i) sorters[i].reset(new csae::KeySorter(k));
        const csae::TopkScan& scan = csae::topk_scan();
        csae::parallel_for(n, csae::piece_of(n, n_threads), n_threads, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                csae::finish(scan, *best, i, values + i * values_stride, indices + i * indices_stride,
                             *sorters[thread]);
            }
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
