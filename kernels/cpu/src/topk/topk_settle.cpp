// The exact k largest of each row, from candidates that were found by upper bounds in bfloat16.
//
// The K > k candidates are the columns with the largest upper bounds (csae_topk_add_products); all other columns have a
// bound below the row's threshold. Candidates are computed again in float32, in the order of their bounds, until the
// next bound is below the k-th largest value so far. Then no later candidate can be among the k largest. If the
// threshold is not above that value either, no other column can, and the result is that of a product in float32.
// Otherwise the row is reported as not settled.
//
// Bytes for each row of x: K' d numbers of the table, for the K' candidates that are computed: k and a few.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>

#include "csae_cpu.h"
#include "parallel.h"
#include "rows/row_sums.h"
#include "topk/topk_list.h"
#include "topk/topk_scan.h"

namespace csae {
namespace {

// Candidates that are computed before the next bound is checked.
constexpr int64_t at_a_time = 4;

struct Workspace {
    KeySorter sorter;
    std::unique_ptr<int64_t[]> columns;
    std::unique_ptr<float[]> bounds, exact, largest;

    explicit Workspace(int64_t n)
        : sorter(n), columns(new int64_t[n]), bounds(new float[n]), exact(new float[n]), largest(new float[n]) {}
};

template <class T>
struct Settle {
    const csae_topk& best;
    int64_t k;
    const T* table;
    int64_t table_stride, d_sae, d;
    const float* bias;
    const TopkScan& scan;
    const RowSums<T>& sums;

    void multiply(const float* x, Workspace& w, int64_t first, int64_t count) const {
        sums.dots(table, table_stride, d, w.columns.get() + first, count, x, w.exact.get() + first);
        for (int64_t j = first; j < first + count; ++j) w.exact[j] = (w.exact[j] + bias[w.columns[j]]) + 0.0f;
    }

    // Returns whether the row is settled. Sets `good` to false if a column is outside of the table.
    bool row(int64_t i, const float* x, float* values, int64_t* indices, Workspace& w, bool& good) const {
        Candidates candidates(best, i);
        if (candidates.count < k) return false;  // too few, or broken by a NaN bound
        float threshold = best.threshold[i];
        if (candidates.count > best.k) best.threshold[i] = threshold = candidates.prune(scan, best.k);
        const int64_t n = candidates.count;
        const int64_t* sorted = w.sorter.sort(scan, candidates, n);
        for (int64_t j = 0; j < n; ++j) {
            w.columns[j] = column_of_key(sorted[j]);
            w.bounds[j] = value_of_key(sorted[j]);
        }
        if (!all_below(w.columns.get(), n, d_sae)) {
            good = false;
            return false;
        }
        // A heap of the k largest so far, the smallest of them on top.
        float* const largest = w.largest.get();
        int64_t done = 0;
        while (done < n && !(done >= k && w.bounds[done] < largest[0])) {
            const int64_t more = done == 0 ? k : std::min(at_a_time, n - done);
            multiply(x, w, done, more);
            for (int64_t j = done; j < done + more; ++j) {
                if (std::isnan(w.exact[j])) return false;
                if (j >= k && w.exact[j] > largest[0]) {
                    std::pop_heap(largest, largest + k, std::greater<float>());
                    largest[k - 1] = w.exact[j];
                    std::push_heap(largest, largest + k, std::greater<float>());
                }
            }
            if (done == 0) {
                std::copy_n(w.exact.get(), k, largest);
                std::make_heap(largest, largest + k, std::greater<float>());
            }
            done += more;
        }
        if (!(threshold <= largest[0])) return false;
        for (int64_t j = 0; j < done; ++j) w.sorter.keys[j] = key_of(ordered(w.exact[j]), w.columns[j]);
        const int64_t* keys = w.sorter.sort(scan, done);
        for (int64_t j = 0; j < k; ++j) {
            values[j] = std::max(value_of_key(keys[j]), 0.0f);
            indices[j] = column_of_key(keys[j]);
        }
        return true;
    }
};

}  // namespace
}  // namespace csae

int csae_topk_settle(const csae_topk* best, int64_t k, const float* x, int64_t x_stride, const void* table,
                     int64_t table_stride, int64_t d_sae, int64_t d, int type, const float* bias, float* values,
                     int64_t values_stride, int64_t* indices, int64_t indices_stride, uint8_t* settled, int n_threads) {
    if (best == nullptr || !csae::possible(best, 0) || n_threads < 1) return csae_bad_argument;
    if (k < 1 || k >= best->k || d_sae < best->k || d < 1 || x_stride < 0 || table_stride < 0) return csae_bad_argument;
    if (type != csae_float32 && type != csae_bfloat16) return csae_bad_argument;
    const int64_t n = best->n;
    if (n == 0) return csae_ok;
    if (x == nullptr || table == nullptr || bias == nullptr) return csae_bad_argument;
    if (values == nullptr || indices == nullptr || settled == nullptr) return csae_bad_argument;
    if (n > 1 && (values_stride < k || indices_stride < k)) return csae_bad_argument;
    std::atomic<bool> good{true};
    try {
        n_threads = static_cast<int>(std::min<int64_t>(n_threads, n));
        std::unique_ptr<std::unique_ptr<csae::Workspace>[]> workspaces(new std::unique_ptr<csae::Workspace>[n_threads]);
        for (int i = 0; i < n_threads; ++i) workspaces[i].reset(new csae::Workspace(best->k));
        const auto run = [&](auto* typed) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
            const csae::Settle<T> settle{
                *best, k, typed, table_stride, d_sae, d, bias, csae::topk_scan(), csae::row_sums<T>()};
            csae::parallel_for(n, csae::piece_of(n, n_threads), n_threads, [&](int thread, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    bool here = true;
                    settled[i] = settle.row(i, x + i * x_stride, values + i * values_stride,
                                            indices + i * indices_stride, *workspaces[thread], here);
                    if (!here) good.store(false, std::memory_order_relaxed);
                }
            });
        };
        if (type == csae_float32) {
            run(static_cast<const float*>(table));
        } else {
            run(static_cast<const csae::BFloat16*>(table));
        }
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return good ? csae_ok : csae_bad_index;
}
