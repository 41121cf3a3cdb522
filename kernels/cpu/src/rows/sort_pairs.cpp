// A counting sort of pairs (feature, token) by feature.
#include <algorithm>
#include <memory>
#include <new>

#include "csae_cpu.h"
#include "parallel.h"

namespace csae {
namespace {

// Fewest pairs that are worth a thread of their own.
constexpr int64_t pairs_of_part = 32768;
constexpr int64_t max_parts = 8;

// first ? one : other, without a branch: compilers make a branch of ?:, and it would be unpredictable here.
inline int64_t* either(bool first, int64_t* one, int64_t* other) {
    const auto mask = -static_cast<uintptr_t>(first);
    return reinterpret_cast<int64_t*>((reinterpret_cast<uintptr_t>(one) & mask) |
                                      (reinterpret_cast<uintptr_t>(other) & ~mask));
}

// First each thread counts the keys of its share of the pairs. Then each thread goes through all pairs, in order, and
// places those with its share of the keys. Two threads that placed pairs of the same key would write to the same cache
// lines all the time.
//
// Inactive pairs take a branch: they come in runs, behind the lengths of codes, so it is predictable. A counter of them
// among the others would have to be stored and loaded again for each, which takes longer.
void sort_pairs(const int64_t* features, const int64_t* tokens, int64_t n_pairs, int64_t d_sae, int64_t* order,
                int64_t* sorted_tokens, int64_t* ends, int n_threads) {
    // At most 4 counters a pair, because counters have to be cleared and added up.
    const int64_t n_parts = std::max<int64_t>(
        1, std::min({max_parts, int64_t{n_threads}, n_pairs / pairs_of_part, 4 * n_pairs / (d_sae + 1)}));
    const auto share = [=](int64_t of, int64_t part) { return of * part / n_parts; };
    const auto active = [=](int64_t feature) { return static_cast<uint64_t>(feature) < static_cast<uint64_t>(d_sae); };
    std::unique_ptr<int64_t[]> counts(new int64_t[static_cast<size_t>(n_parts * d_sae)]());
    parallel_for(n_parts, 1, n_threads, [&](int, int64_t part, int64_t) {
        int64_t* count = counts.get() + part * d_sae;
        for (int64_t pair = share(n_pairs, part); pair < share(n_pairs, part + 1); ++pair) {
            if (active(features[pair])) ++count[features[pair]];
        }
    });
    int64_t n_active = 0;
    for (int64_t key = 0; key < d_sae; ++key) {
        ends[key] = n_active;
        for (int64_t part = 0; part < n_parts; ++part) n_active += counts[part * d_sae + key];
    }
    ends[d_sae] = n_active;
    int64_t* next = counts.get();
    std::copy(ends, ends + d_sae, next);
    parallel_for(n_parts, 1, n_threads, [&](int, int64_t part, int64_t) {
        // Each thread's share of the keys has about as many pairs. The last thread places the inactive pairs too.
        const auto key_at = [&](int64_t place) { return std::lower_bound(ends, ends + d_sae, place) - ends; };
        const bool is_last = part + 1 == n_parts;
        const int64_t first = key_at(share(n_active, part)), last = is_last ? d_sae : key_at(share(n_active, part + 1));
        // Active pairs of other threads are written to `nowhere`, which is faster than a branch.
        int64_t skipped = 0, nowhere, inactive = n_active;
        for (int64_t pair = 0; pair < n_pairs; ++pair) {
            const int64_t key = features[pair];
            if (!active(key)) {
                if (is_last) {
                    order[inactive] = pair;
                    sorted_tokens[inactive++] = tokens[pair];
                }
                continue;
            }
            const bool mine = (key >= first) & (key < last);
            const int64_t at = (*either(mine, next + key, &skipped))++;
            *either(mine, order + at, &nowhere) = pair;
            *either(mine, sorted_tokens + at, &nowhere) = tokens[pair];
        }
    });
}

}  // namespace
}  // namespace csae

int csae_sort_pairs(const int64_t* features, const int64_t* tokens, int64_t n_pairs, int64_t d_sae, int64_t* order,
                    int64_t* sorted_tokens, int64_t* ends, int n_threads) {
    if (n_pairs < 0 || d_sae < 0 || ends == nullptr || n_threads < 1) return csae_bad_argument;
    if (n_pairs > 0 && (features == nullptr || tokens == nullptr || order == nullptr || sorted_tokens == nullptr)) {
        return csae_bad_argument;
    }
    try {
        csae::sort_pairs(features, tokens, n_pairs, d_sae, order, sorted_tokens, ends, n_threads);
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
