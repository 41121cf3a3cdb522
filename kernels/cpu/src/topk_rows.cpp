// The k largest of each row.
//
// A row is read once from memory. That pass leaves the maximum of every group of 4 columns, and the k-th largest of
// any k or more such maxima is a bound that at least k values of the row reach, whatever the row is. What is below the
// bound is out. The second pass, over the maxima alone, finds the few blocks that have something left; a handful more
// than k values, which are then sorted.
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

// The k-th largest of this many maxima for each one that is asked for is a bound that about 1.15 k values reach.
constexpr int64_t maxima_per_k = 4;

// Up to here ranking each candidate against all others, which has no branch, is faster than sorting.
constexpr int64_t max_ranked = 192;

// A value and its index in one integer that is larger where the value is, or the value is equal and the index lower.
int64_t make_key(float x, int64_t index) {
    const int32_t order = x == 0.0f ? 0 : ordered(x);
    return static_cast<int64_t>((static_cast<uint64_t>(static_cast<uint32_t>(order)) << 32) |
                                (~static_cast<uint32_t>(index)));
}

float relu_of_key(int64_t key) {
    const auto order = static_cast<int32_t>(key >> 32);
    return order > 0 ? from_ordered(order) : 0.0f;
}

int64_t index_of_key(int64_t key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Sizes {
    int64_t d_sae, k, n_blocks, n_folded, capacity;

    Sizes(int64_t d_sae, int64_t k)
        : d_sae(d_sae),
          k(k),
          n_blocks(round_up(d_sae, block_width) / block_width),
          n_folded(std::min(n_blocks, round_up(maxima_per_k * k, block_groups) / block_groups)),
          capacity(round_up(std::min(d_sae, std::max(2 * k, k + 1024)), block_width) + block_width) {}
};

// What one thread needs besides its row. About 1.7 times the size of a row, more only where k is large.
struct Workspace {
    std::unique_ptr<float[]> maxima;      // [n_blocks, 16]
    std::unique_ptr<float[]> folded;      // [n_folded, 16]
    std::unique_ptr<int32_t[]> order;     // [n_folded, 16]
    std::unique_ptr<uint32_t[]> blocks;   // [n_blocks + 1]
    std::unique_ptr<uint64_t[]> columns;  // [n_blocks + 1]
    std::unique_ptr<int64_t[]> keys;      // [capacity]
    int64_t ranks[max_ranked];
    float tail[block_width];  // the last block of the row, filled up with -inf

    explicit Workspace(const Sizes& s)
        : maxima(new float[s.n_blocks * block_groups]),
          folded(new float[s.n_folded * block_groups]),
          order(new int32_t[s.n_folded * block_groups]),
          blocks(new uint32_t[s.n_blocks + 1]),
          columns(new uint64_t[s.n_blocks + 1]),
          keys(new int64_t[s.capacity]) {}
};

// Leaves the k largest of keys [n] in its first k places and returns the smallest of them.
int64_t keep_largest(int64_t* keys, int64_t n, int64_t k) {
    std::nth_element(keys, keys + k - 1, keys + n, std::greater<int64_t>());
    return keys[k - 1];
}

// Collects the keys of all values that reach the bound, and no fewer than k. Returns how many.
int64_t collect(const TopkScan& scan, const Sizes& s, const float* row, float bound, Workspace& w) {
    const int64_t n_whole = s.d_sae / block_width;
    int64_t n_found = scan.find_at_least(row, w.maxima.get(), n_whole, bound, w.blocks.get(), w.columns.get());
    if (n_whole < s.n_blocks) {
        const int64_t width = s.d_sae - n_whole * block_width;
        uint64_t bits = 0;
        for (int64_t c = 0; c < width; ++c) bits |= static_cast<uint64_t>(w.tail[c] >= bound) << c;
        w.blocks[n_found] = static_cast<uint32_t>(n_whole);
        w.columns[n_found++] = bits;
    }
    int64_t* keys = w.keys.get();
    int64_t n_keys = 0;
    // Raised when the keys would overflow: a row of which very many values reach the bound, as one of equal values.
    int64_t floor = std::numeric_limits<int64_t>::min();
    for (int64_t i = 0; i < n_found; ++i) {
        if (n_keys > s.capacity - block_width) {
            floor = keep_largest(keys, n_keys, s.k);
            n_keys = s.k;
        }
        const int64_t first = static_cast<int64_t>(w.blocks[i]) * block_width;
        for (uint64_t bits = w.columns[i]; bits != 0; bits &= bits - 1) {
            const int64_t index = first + __builtin_ctzll(bits);
            const int64_t key = make_key(row[index], index);
            keys[n_keys] = key;
            n_keys += key > floor;
        }
    }
    return n_keys;
}

void topk_row(const TopkScan& scan, const Sizes& s, const float* row, float* values, int64_t* indices, Workspace& w) {
    const int64_t n_whole = s.d_sae / block_width;
    bool nan = scan.group_maxima(row, n_whole, w.maxima.get());
    if (n_whole < s.n_blocks) {
        std::fill(w.tail, w.tail + block_width, -std::numeric_limits<float>::infinity());
        std::copy(row + n_whole * block_width, row + s.d_sae, w.tail);
        nan |= scan.group_maxima(w.tail, 1, w.maxima.get() + n_whole * block_groups);
    }
    if (nan) {
        std::fill(values, values + s.k, std::numeric_limits<float>::quiet_NaN());
        for (int64_t i = 0; i < s.k; ++i) indices[i] = i;
        return;
    }
    const float bound = s.k <= s.n_folded * block_groups
                            ? scan.bound_of_kth(w.maxima.get(), s.n_blocks, s.k, w.folded.get(), w.order.get(),
                                                s.n_folded)
                            : -std::numeric_limits<float>::infinity();
    int64_t n_keys = collect(scan, s, row, bound, w);
    int64_t* keys = w.keys.get();
    if (n_keys <= max_ranked) {
        scan.rank(keys, n_keys, w.ranks);
        for (int64_t i = 0; i < n_keys; ++i) {
            if (w.ranks[i] >= s.k) continue;
            values[w.ranks[i]] = relu_of_key(keys[i]);
            indices[w.ranks[i]] = index_of_key(keys[i]);
        }
        return;
    }
    if (n_keys > s.k) keep_largest(keys, n_keys, s.k);
    std::sort(keys, keys + s.k, std::greater<int64_t>());
    for (int64_t i = 0; i < s.k; ++i) {
        values[i] = relu_of_key(keys[i]);
        indices[i] = index_of_key(keys[i]);
    }
}

}  // namespace
}  // namespace csae

int csae_topk_rows(const float* pre_acts, int64_t pre_acts_stride, int64_t n, int64_t d_sae, int64_t k, float* values,
                   int64_t values_stride, int64_t* indices, int64_t indices_stride, int n_threads) {
    if (n < 0 || k < 1 || k > d_sae || d_sae > std::numeric_limits<int32_t>::max() || n_threads < 1) {
        return csae_bad_argument;
    }
    if (n == 0) return csae_ok;
    if (pre_acts == nullptr || values == nullptr || indices == nullptr || pre_acts_stride < 0) return csae_bad_argument;
    if (n > 1 && (values_stride < k || indices_stride < k)) return csae_bad_argument;
    try {
        const csae::Sizes sizes(d_sae, k);
        // A thread for less than this many values costs more than it saves.
        n_threads = static_cast<int>(std::min<int64_t>({n_threads, n, 1 + n * d_sae / 65536}));
        std::unique_ptr<std::unique_ptr<csae::Workspace>[]> workspaces(new std::unique_ptr<csae::Workspace>[n_threads]);
        for (int i = 0; i < n_threads; ++i) workspaces[i].reset(new csae::Workspace(sizes));
        const csae::TopkScan& scan = csae::topk_scan();
        const int64_t piece = std::max<int64_t>(1, std::min<int64_t>(32, n / (4 * n_threads)));
        csae::parallel_for(n, piece, n_threads, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                csae::topk_row(scan, sizes, pre_acts + i * pre_acts_stride, values + i * values_stride,
                               indices + i * indices_stride, *workspaces[thread]);
            }
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
