// For each feature the weighted sum of the rows in which it is active: the transpose of gather_sum.
//
// The n * k pairs (row, feature) are sorted by feature, rows in order, by counting. Then each feature's sum is one
// thread's, in that order, so nothing depends on the number of threads and no atomics on floats are needed.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "csae_cpu.h"
#include "parallel.h"
#include "row_sums.h"

namespace csae {
namespace {

// A part of the rows is counted and placed by one thread; each part has a counter for every feature.
constexpr int64_t max_parts = 8;
constexpr int64_t pairs_of_part = 16384;

struct Pairs {
    std::unique_ptr<int64_t[]> start;   // [d_sae + 1]: where the pairs of a feature begin
    std::unique_ptr<int64_t[]> row;     // [n * k]
    std::unique_ptr<float[]> value;     // [n * k]
};

// False where an index is outside of [0, d_sae).
bool sort_by_feature(const float* values, int64_t values_stride, const int64_t* indices, int64_t indices_stride,
                     int64_t n, int64_t k, int64_t d_sae, int n_threads, Pairs& pairs) {
    const int64_t n_parts = std::max<int64_t>(1, std::min({max_parts, int64_t{n_threads}, n * k / pairs_of_part}));
    const auto first_row = [=](int64_t part) { return n * part / n_parts; };
    std::unique_ptr<int64_t[]> place(new int64_t[static_cast<size_t>(n_parts * d_sae)]());
    std::atomic<bool> good{true};
    parallel_for(n_parts, 1, n_threads, [&](int, int64_t part, int64_t) {
        int64_t* count = place.get() + part * d_sae;
        for (int64_t i = first_row(part); i < first_row(part + 1); ++i) {
            const int64_t* features = indices + i * indices_stride;
            if (!all_below(features, k, d_sae)) {
                good.store(false, std::memory_order_relaxed);
                return;
            }
            for (int64_t j = 0; j < k; ++j) ++count[features[j]];
        }
    });
    if (!good) return false;
    int64_t total = 0;
    for (int64_t f = 0; f < d_sae; ++f) {
        pairs.start[f] = total;
        for (int64_t part = 0; part < n_parts; ++part) {
            const int64_t count = place[part * d_sae + f];
            place[part * d_sae + f] = total;
            total += count;
        }
    }
    pairs.start[d_sae] = total;
    parallel_for(n_parts, 1, n_threads, [&](int, int64_t part, int64_t) {
        int64_t* next = place.get() + part * d_sae;
        for (int64_t i = first_row(part); i < first_row(part + 1); ++i) {
            for (int64_t j = 0; j < k; ++j) {
                const int64_t at = next[indices[i * indices_stride + j]]++;
                pairs.row[at] = i;
                pairs.value[at] = values[i * values_stride + j];
            }
        }
    });
    return true;
}

void sum_features(const Pairs& pairs, const float* rows, int64_t rows_stride, int64_t d_sae, int64_t d, float* out,
                  int64_t out_stride, int n_threads) {
    const RowSums& sums = row_sums();
    const int64_t* start = pairs.start.get();
    // Pieces of equal work: a row to add costs about as much as a row to write.
    const auto work_before = [=](int64_t f) { return start[f] + f; };
    const int64_t n_pieces = std::min<int64_t>(d_sae, n_threads == 1 ? 1 : int64_t{16} * n_threads);
    const int64_t work = work_before(d_sae);
    const auto first_feature = [=](int64_t piece) {
        const int64_t wanted = work * piece / n_pieces;
        int64_t low = 0, high = d_sae;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (work_before(middle) < wanted) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    };
    parallel_for(n_pieces, 1, n_threads, [&](int, int64_t piece, int64_t) {
        const int64_t end = first_feature(piece + 1);
        for (int64_t f = first_feature(piece); f < end; ++f) {
            float* sum = out + f * out_stride;
            const int64_t count = start[f + 1] - start[f];
            if (count == 0) {
                std::fill(sum, sum + d, 0.0f);
                continue;
            }
            const int64_t next_count = f + 1 < end ? start[f + 2] - start[f + 1] : 0;
            sums.weighted_sum(rows, rows_stride, d, pairs.row.get() + start[f], pairs.value.get() + start[f], count,
                              pairs.row.get() + start[f + 1], std::min<int64_t>(next_count, 64), sum);
        }
    });
}

}  // namespace
}  // namespace csae

int csae_feature_sum(const float* values, int64_t values_stride, const int64_t* indices, int64_t indices_stride,
                     int64_t n, int64_t k, const float* rows, int64_t rows_stride, int64_t d_sae, int64_t d, float* out,
                     int64_t out_stride, int n_threads) {
    if (n < 0 || k < 0 || d_sae < 0 || d < 0 || n_threads < 1) return csae_bad_argument;
    if (values_stride < 0 || indices_stride < 0 || rows_stride < 0 || (d_sae > 1 && out_stride < d)) {
        return csae_bad_argument;
    }
    if ((d_sae * d > 0 && out == nullptr) || (n * k > 0 && (values == nullptr || indices == nullptr))) {
        return csae_bad_argument;
    }
    if (n * d > 0 && rows == nullptr) return csae_bad_argument;
    // What is empty may be null, which must not be stepped through, not even to stay unread.
    if (k == 0) values_stride = indices_stride = 0;
    if (d == 0) rows_stride = out_stride = 0;
    try {
        csae::Pairs pairs;
        pairs.start.reset(new int64_t[static_cast<size_t>(d_sae) + 1]);
        pairs.row.reset(new int64_t[static_cast<size_t>(n * k)]);
        pairs.value.reset(new float[static_cast<size_t>(n * k)]);
        if (!csae::sort_by_feature(values, values_stride, indices, indices_stride, n, k, d_sae, n_threads, pairs)) {
            return csae_bad_index;
        }
        if (d_sae > 0) csae::sum_features(pairs, rows, rows_stride, d_sae, d, out, out_stride, n_threads);
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
