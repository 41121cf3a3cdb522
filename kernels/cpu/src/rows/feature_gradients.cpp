#include "rows/feature_gradients.h"

#include <atomic>
#include <limits>
#include <type_traits>

#include "rows/row_sums.h"

namespace csae {
namespace {

// Longer runs are cut into parts of this many pairs (split-k), so that a feature that fires on nearly every token is
// not left to a single thread. The cuts depend on nothing else, so sums have the same bits for any number of threads.
constexpr int64_t part_size = 1024;

constexpr int64_t checked_at_once = 16384;

int64_t rounded_up(int64_t size) { return (size + 15) / 16 * 16; }

bool good(const csae_pairs& pairs) {
    if (pairs.n_pairs < 0 || pairs.d_sae < 0 || pairs.ends == nullptr) return false;
    return pairs.n_pairs == 0 || (pairs.order != nullptr && pairs.tokens != nullptr);
}

bool good(const csae_gradient& factors, const csae_pairs& pairs) {
    if (factors.n < 0 || factors.d < 0 || factors.rows_stride < 0) return false;
    if (factors.type != csae_float32 && factors.type != csae_bfloat16) return false;
    return (pairs.n_pairs == 0 || factors.weights != nullptr) &&
           (factors.n * factors.d == 0 || factors.rows != nullptr);
}

}  // namespace

FeatureGradients::FeatureGradients(const csae_pairs& pairs, std::vector<csae_gradient> tables, int n_threads)
    : pairs_(pairs), tables_(std::move(tables)), n_threads_(n_threads), status_(csae_bad_argument) {
    if (n_threads < 1 || !good(pairs)) return;
    for (csae_gradient& factors : tables_) {
        if (!good(factors, pairs)) return;
        // An empty matrix may be a null pointer, and pointer arithmetic on null is undefined.
        if (factors.d == 0) factors.rows_stride = 0;
        width_ = std::max(width_, rounded_up(factors.d));
    }
    n_pieces_ = std::min<int64_t>(pairs.d_sae, n_threads == 1 ? 1 : int64_t{16} * n_threads);
    // No more threads than there are pieces, or parts of long runs, because each has its own scratch memory.
    const int64_t most_parts = 2 * pairs.n_pairs / part_size * static_cast<int64_t>(tables_.size());
    n_threads_ = static_cast<int>(std::min<int64_t>(n_threads, std::max({int64_t{1}, n_pieces_, most_parts})));
    status_ = check();
    if (status_ != csae_ok) return;
    scratch_size_ = width_ + part_size;
    scratch_ = allocate_floats(n_threads_ * scratch_size_);
    sum_parts();
}

int FeatureGradients::check() const {
    const int64_t *ends = pairs_.ends, d_sae = pairs_.d_sae;
    bool ascend = ends[0] == 0 && ends[d_sae] <= pairs_.n_pairs;
    for (int64_t f = 0; f < d_sae; ++f) ascend &= ends[f] <= ends[f + 1];
    if (!ascend) return csae_bad_index;
    int64_t n_rows = std::numeric_limits<int64_t>::max();
    for (const csae_gradient& factors : tables_) n_rows = std::min(n_rows, factors.n);
    std::atomic<bool> inside{true};
    parallel_for(ends[d_sae], checked_at_once, n_threads_, [&](int, int64_t begin, int64_t end) {
        if (!all_below(pairs_.order + begin, end - begin, pairs_.n_pairs) ||
            !all_below(pairs_.tokens + begin, end - begin, n_rows)) {
            inside.store(false, std::memory_order_relaxed);
        }
    });
    return inside ? csae_ok : csae_bad_index;
}

void FeatureGradients::sum_parts() {
    struct Part {
        int64_t begin, end;
    };
    std::vector<Part> parts;
    for (int64_t f = 0; f < pairs_.d_sae; ++f) {
        const int64_t end = pairs_.ends[f + 1];
        if (end - pairs_.ends[f] <= part_size) continue;
        long_runs_.push_back({f, static_cast<int64_t>(parts.size())});
        for (int64_t p = pairs_.ends[f]; p < end; p += part_size) parts.push_back({p, std::min(p + part_size, end)});
    }
    const auto n_parts = static_cast<int64_t>(parts.size()), n_tables = static_cast<int64_t>(tables_.size());
    for (const csae_gradient& factors : tables_) part_sums_.push_back(allocate_floats(n_parts * factors.d));
    parallel_for(n_parts * n_tables, 1, n_threads_, [&](int thread, int64_t item, int64_t) {
        const csae_gradient& factors = tables_[static_cast<size_t>(item / n_parts)];
        const Part& part = parts[static_cast<size_t>(item % n_parts)];
        sum_part(factors, part.begin, part.end, part.end, scratch(thread) + width_,
                 part_sums_[static_cast<size_t>(item / n_parts)].get() + item % n_parts * factors.d);
    });
}

// Sums gradient [d] of the feature. Prefetches the rows of the next feature, if that is below `end`.
void FeatureGradients::sum(size_t table, int64_t feature, int64_t end, float* gradient, float* weights) const {
    const csae_gradient& factors = tables_[table];
    const int64_t first = pairs_.ends[feature], last = pairs_.ends[feature + 1];
    if (last - first <= part_size) {
        const int64_t next_end = feature + 1 < end ? pairs_.ends[feature + 2] : last;
        sum_part(factors, first, last, next_end, weights, gradient);
        return;
    }
    const auto run = std::lower_bound(long_runs_.begin(), long_runs_.end(), feature,
                                      [](const LongRun& a, int64_t f) { return a.feature < f; });
    const float* part = part_sums_[table].get() + run->first_part * factors.d;
    std::copy(part, part + factors.d, gradient);
    for (int64_t left = last - first - part_size; left > 0; left -= part_size) {
        part += factors.d;
        for (int64_t c = 0; c < factors.d; ++c) gradient[c] += part[c];
    }
}

void FeatureGradients::sum_part(const csae_gradient& factors, int64_t begin, int64_t end, int64_t next_end,
                                float* weights, float* sum) const {
    if (begin == end) {
        std::fill(sum, sum + factors.d, 0.0f);
        return;
    }
    for (int64_t p = begin; p < end; ++p) weights[p - begin] = factors.weights[pairs_.order[p]];
    const auto add = [&](auto* rows) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
        row_sums<T>().weighted_sum(rows, factors.rows_stride, factors.d, pairs_.tokens + begin, weights, end - begin,
                                   pairs_.tokens + end, std::min<int64_t>(next_end - end, 64), sum);
    };
    if (factors.type == csae_bfloat16) {
        add(static_cast<const BFloat16*>(factors.rows));
    } else {
        add(static_cast<const float*>(factors.rows));
    }
}

// The first feature of a piece. Pieces have equal work; adding a row costs about as much as using the sum.
int64_t FeatureGradients::first_feature(int64_t piece) const {
    const int64_t wanted = (pairs_.ends[pairs_.d_sae] + pairs_.d_sae) * piece / n_pieces_;
    int64_t low = 0, high = pairs_.d_sae;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (pairs_.ends[middle] + middle < wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace csae
