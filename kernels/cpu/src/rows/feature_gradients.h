// The rows of factored gradients, summed one feature at a time: an SpMM with the CSR matrix csae_pairs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "csae_cpu.h"
#include "parallel.h"

namespace csae {

struct FreeAligned {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};
// Floats that start at a cache line.
using Floats = std::unique_ptr<float[], FreeAligned>;
inline Floats allocate_floats(int64_t count) {
    return Floats(
        static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

class FeatureGradients {
public:
    // Checks its arguments, sets status(), and sums the parts of long runs. May throw std::bad_alloc.
    FeatureGradients(const csae_pairs& pairs, std::vector<csae_gradient> tables, int n_threads);

    // If it is not csae_ok, nothing else may be called.
    int status() const { return status_; }

    // Calls use(table, feature, gradient [d]) for each table and each feature (with_pairs_only: each feature with
    // pairs), in any thread.
    template <class Use>
    void for_each(bool with_pairs_only, Use&& use) {
        parallel_for(n_pieces_, 1, n_threads_, [&](int thread, int64_t piece, int64_t) {
            const int64_t begin = first_feature(piece), end = first_feature(piece + 1);
            float* gradient = scratch(thread);
            for (size_t table = 0; table < tables_.size(); ++table) {
                for (int64_t f = begin; f < end; ++f) {
                    if (with_pairs_only && pairs_.ends[f] == pairs_.ends[f + 1]) continue;
                    sum(table, f, end, gradient, scratch(thread) + width_);
                    use(table, f, gradient);
                }
            }
        });
    }

private:
    struct LongRun {
        int64_t feature, first_part;  // first_part: an index into the parts of all long runs
    };

    int check() const;
    void sum_parts();
    void sum(size_t table, int64_t feature, int64_t end, float* gradient, float* weights) const;
    void sum_part(const csae_gradient& factors, int64_t begin, int64_t end, int64_t next_end, float* weights,
                  float* sum) const;
    int64_t first_feature(int64_t piece) const;
    float* scratch(int thread) const { return scratch_.get() + thread * scratch_size_; }

    csae_pairs pairs_;
    std::vector<csae_gradient> tables_;
    int n_threads_, status_;
    int64_t n_pieces_, width_ = 0, scratch_size_ = 0;
    Floats scratch_;  // [threads, width_ + part_size]: a gradient, then weights
    std::vector<LongRun> long_runs_;
    std::vector<Floats> part_sums_;  // for each table [parts of all long runs, d]
};

}  // namespace csae
