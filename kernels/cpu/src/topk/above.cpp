// What is above a threshold: the entries of each row that lie in a band, largest first, up to k of them.
//
// A band is floor < v, and v < ceiling if there is one, for each column; floor >= 0. Rows come as tiles of
// pre-activations in float32 (csae_above_add, csae_above_finish), or as candidates whose upper bounds in bfloat16 are
// not below a threshold (csae_topk_add_products), which are computed again in float32 (csae_above_settle). Unlike the
// k largest, these need no list that is pruned again and again: an entry is in or out by itself, but in rows with
// more than k.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "csae_cpu.h"
#include "parallel.h"
#include "rows/row_sums.h"
#include "simd/isa.h"
#include "topk/topk_list.h"
#include "topk/topk_scan.h"

#if CSAE_X86
#if !defined(__clang__)
// GCC's own header leaves the unused operand of some intrinsics uninitialised on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace csae {
namespace {

// Fewest values that are worth a thread of their own.
constexpr int64_t values_per_thread = 65536;

bool inside(const csae_band& band, int64_t c, float x) {
    return x > band.floor[c] && (band.ceiling == nullptr || x < band.ceiling[c]);
}

// A bit for each of 64 columns that is above its floor, or NaN.
using Above = uint64_t (*)(const Sums& row, const float* floor);

uint64_t above_portable(const Sums& row, const float* floor) {
    // Compilers vectorise this loop, and not the one below that shifts.
    int32_t any = 0;
    for (int64_t c = 0; c < block_width; ++c) {
        const float x = at<1>(row, c).x[0];
        any |= (x > floor[c]) | (x != x);
    }
    uint64_t bits = 0;
    for (int64_t c = 0; any != 0 && c < block_width; ++c) {
        const float x = at<1>(row, c).x[0];
        bits |= static_cast<uint64_t>((x > floor[c]) | (x != x)) << c;
    }
    return bits;
}

#if CSAE_X86
// Columns that are prefetched ahead.
constexpr int64_t ahead = 512;

CSAE_AVX2 uint64_t above_avx2(const Sums& row, const float* floor) {
    row.fetch(ahead);
    uint64_t bits = 0;
    for (int c = 0; c < block_width; c += 8) {
        const __m256 x = (__m256)at<8>(row, c).x, above = _mm256_cmp_ps(x, _mm256_loadu_ps(floor + c), _CMP_GT_OQ);
        const int here = _mm256_movemask_ps(_mm256_or_ps(above, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
        bits |= static_cast<uint64_t>(static_cast<uint32_t>(here)) << c;
    }
    return bits;
}

CSAE_AVX512 uint64_t above_avx512(const Sums& row, const float* floor) {
    row.fetch(ahead);
    uint64_t bits = 0;
    for (int c = 0; c < block_width; c += 16) {
        const __m512 x = (__m512)at<16>(row, c).x;
        const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_loadu_ps(floor + c), _CMP_GT_OQ);
        const auto here = static_cast<uint32_t>(above | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
        bits |= static_cast<uint64_t>(here) << c;
    }
    return bits;
}
#endif

Above above_here() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return above_avx512;
    if (current_isa() == Isa::avx2) return above_avx2;
#endif
    return above_portable;
}

// A row whose columns are being added, 64 at a time.
struct Row {
    const TopkScan& scan;
    Above above;
    Candidates candidates;
    float threshold;
    int64_t k, limit;

    // existing: a bit for each existing column of the block. Returns whether one of them is NaN.
    bool add(const Sums& block, const csae_band& band, uint64_t existing, int64_t first_column) {
        uint64_t hits = above(block, band.floor) & existing;
        if (hits == 0) return false;
        if (candidates.count > limit) threshold = candidates.prune(scan, k);
        for (uint64_t left = hits; left != 0; left &= left - 1) {
            const int64_t c = __builtin_ctzll(left);
            const float x = at<1>(block, c).x[0];
            const bool out = x < threshold || (band.ceiling != nullptr && x >= band.ceiling[c]);
            hits ^= static_cast<uint64_t>(out) << c;
        }
        return candidates.append(block, hits, first_column);
    }
};

// The last columns of a row, padded to a whole block.
struct Tail {
    float row[block_width] = {}, bias[block_width] = {}, floor[block_width] = {}, ceiling[block_width] = {};
};

void add(const TopkScan& scan, Above above, const csae_topk& to, int64_t i, const Sums& row, const csae_band& band,
         int64_t width, int64_t first_column) {
    if (to.count[i] == broken) return;
    Row here{scan, above, Candidates(to, i), to.threshold[i], to.k, to.capacity - block_width};
    const int64_t whole = width / block_width * block_width, rest = width - whole;
    const bool bounded = band.ceiling != nullptr;
    bool nan = false;
    for (int64_t c = 0; c < whole && !nan; c += block_width) {
        nan = here.add(row.from(c), {band.floor + c, bounded ? band.ceiling + c : nullptr}, ~uint64_t{0},
                       first_column + c);
    }
    if (rest > 0 && !nan) {
        Tail tail;
        std::copy_n(row.row + whole, rest, tail.row);
        std::copy_n(row.bias + whole, rest, tail.bias);
        std::copy_n(band.floor + whole, rest, tail.floor);
        if (bounded) std::copy_n(band.ceiling + whole, rest, tail.ceiling);
        nan = here.add({tail.row, tail.bias}, {tail.floor, bounded ? tail.ceiling : nullptr}, (uint64_t{1} << rest) - 1,
                       first_column + whole);
    }
    to.threshold[i] = here.threshold;
    to.count[i] = nan ? broken : static_cast<int32_t>(here.candidates.count);
}

// The first k of the sorted keys, then zeros.
void write(const int64_t* keys, int64_t n, int64_t k, float* values, int64_t* indices) {
    const int64_t here = std::min(n, k);
    for (int64_t j = 0; j < here; ++j) {
        values[j] = value_of_key(keys[j]);
        indices[j] = column_of_key(keys[j]);
    }
    std::fill(values + here, values + k, 0.0f);
    std::fill(indices + here, indices + k, int64_t{0});
}

void finish(const TopkScan& scan, const csae_topk& best, int64_t i, float* values, int64_t* indices,
            KeySorter& sorter) {
    Candidates candidates(best, i);
    if (candidates.count == broken) {
        std::fill(values, values + best.k, std::numeric_limits<float>::quiet_NaN());
        for (int64_t j = 0; j < best.k; ++j) indices[j] = j;
        return;
    }
    if (candidates.count > best.k) candidates.prune(scan, best.k);
    write(sorter.sort(scan, candidates, candidates.count), candidates.count, best.k, values, indices);
}

struct Workspace {
    KeySorter sorter;
    std::unique_ptr<int64_t[]> columns;
    std::unique_ptr<float[]> exact;

    explicit Workspace(int64_t n) : sorter(n), columns(new int64_t[n]), exact(new float[n]) {}
};

template <class T>
struct Settle {
    const csae_topk& best;
    const csae_band& band;
    int64_t k;
    float start;
    bool of_values;
    const T* table;
    int64_t table_stride, d_sae, d;
    const float* bias;
    const TopkScan& scan;
    const RowSums<T>& sums;

    // Returns whether the row is settled. Sets `good` to false if a column is outside of the table.
    bool row(int64_t i, const float* x, float* values, int64_t* indices, Workspace& w, bool& good) const {
        Candidates candidates(best, i);
        if (candidates.count == broken) return false;
        float threshold = best.threshold[i];
        if (candidates.count > best.k) threshold = candidates.prune(scan, best.k);
        const bool pruned = !(threshold <= start);
        if (pruned && !of_values) return false;
        const int64_t n = candidates.count;
        std::copy_n(candidates.columns, n, w.columns.get());
        if (!all_below(w.columns.get(), n, d_sae)) {
            good = false;
            return false;
        }
        sums.dots(table, table_stride, d, w.columns.get(), n, x, w.exact.get());
        int64_t found = 0;
        for (int64_t j = 0; j < n; ++j) {
            const int64_t column = w.columns[j];
            const float exact = w.exact[j] + bias[column];
            if (std::isnan(exact)) return false;
            w.sorter.keys[found] = key_of(ordered(exact), column);
            found += inside(band, column, exact);
        }
        const int64_t* keys = w.sorter.sort(scan, found);
        // Columns that were pruned away have a bound below the threshold.
        if (pruned && (found < k || value_of_key(keys[k - 1]) < threshold)) return false;
        write(keys, found, k, values, indices);
        return true;
    }
};

bool valid(const csae_band* band) { return band != nullptr && band->floor != nullptr; }

}  // namespace
}  // namespace csae

int csae_above_add(const csae_topk* best, const csae_band* band, const float* pre_acts, int64_t pre_acts_stride,
                   const float* bias, int64_t width, int64_t first_column, int n_threads) {
    if (!csae::addable(best, width, first_column) || pre_acts_stride < 0 || n_threads < 1) return csae_bad_argument;
    const int64_t n = best->n;
    if (n == 0 || width == 0) return csae_ok;
    if (!csae::valid(band) || pre_acts == nullptr || bias == nullptr) return csae_bad_argument;
    n_threads = static_cast<int>(std::min<int64_t>({n_threads, n, 1 + n * width / csae::values_per_thread}));
    const csae::TopkScan& scan = csae::topk_scan();
    const csae::Above above = csae::above_here();
    csae::parallel_for(n, csae::piece_of(n, n_threads), n_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            csae::add(scan, above, *best, i, {pre_acts + i * pre_acts_stride, bias}, *band, width, first_column);
        }
    });
    return csae_ok;
}

int csae_above_finish(const csae_topk* best, float* values, int64_t values_stride, int64_t* indices,
                      int64_t indices_stride, int n_threads) {
    if (best == nullptr || !csae::possible(best, 0) || n_threads < 1) return csae_bad_argument;
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

int csae_above_settle(const csae_topk* best, const csae_band* band, int64_t k, float start, int of_values,
                      const float* x, int64_t x_stride, const void* table, int64_t table_stride, int64_t d_sae,
                      int64_t d, int type, const float* bias, float* values, int64_t values_stride, int64_t* indices,
                      int64_t indices_stride, uint8_t* settled, int n_threads) {
    if (best == nullptr || !csae::possible(best, 0) || n_threads < 1) return csae_bad_argument;
    if (k < 1 || k > best->k || d_sae < k || d < 1 || x_stride < 0 || table_stride < 0) return csae_bad_argument;
    if (type != csae_float32 && type != csae_bfloat16) return csae_bad_argument;
    const int64_t n = best->n;
    if (n == 0) return csae_ok;
    if (!csae::valid(band) || x == nullptr || table == nullptr || bias == nullptr) return csae_bad_argument;
    if (values == nullptr || indices == nullptr || settled == nullptr) return csae_bad_argument;
    if (n > 1 && (values_stride < k || indices_stride < k)) return csae_bad_argument;
    std::atomic<bool> good{true};
    try {
        n_threads = static_cast<int>(std::min<int64_t>(n_threads, n));
        std::unique_ptr<std::unique_ptr<csae::Workspace>[]> workspaces(new std::unique_ptr<csae::Workspace>[n_threads]);
        for (int i = 0; i < n_threads; ++i) workspaces[i].reset(new csae::Workspace(best->k));
        const auto run = [&](auto* typed) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
            const csae::Settle<T> settle{*best,        *band, k, start, of_values != 0,    typed,
                                         table_stride, d_sae, d, bias,  csae::topk_scan(), csae::row_sums<T>()};
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

int csae_cut(float* values, int64_t values_stride, int64_t* indices, int64_t indices_stride, int64_t n, int64_t k,
             int64_t budget, float* threshold) {
    if (n < 0 || k < 0 || budget < 0 || threshold == nullptr) return csae_bad_argument;
    *threshold = 0;
    if (n == 0 || k == 0) return csae_ok;
    if (values == nullptr || indices == nullptr) return csae_bad_argument;
    if (n > 1 && (values_stride < k || indices_stride < k)) return csae_bad_argument;
    if (k > std::numeric_limits<int64_t>::max() / n) return csae_bad_argument;
    try {
        std::unique_ptr<float[]> positive(new float[n * k]);
        int64_t found = 0;
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < k; ++j) {
                positive[found] = values[i * values_stride + j];
                if (!(positive[found] > 0)) break;
                ++found;
            }
        }
        int64_t ties = 0;
        float border = budget == 0 ? std::numeric_limits<float>::infinity() : 0.0f;
        if (budget > 0 && budget <= found) {
            float* const last = positive.get() + budget - 1;
            std::nth_element(positive.get(), last, positive.get() + found, std::greater<float>());
            *threshold = border = *last;
            ties = std::count(positive.get(), last + 1, border);
        }
        for (int64_t i = 0; i < n; ++i) {
            float* const row = values + i * values_stride;
            int64_t kept = 0;
            while (kept < k && row[kept] > border) ++kept;
            while (kept < k && row[kept] == border && ties > 0) ++kept, --ties;
            if (kept < k && std::isnan(row[kept])) continue;
            std::fill(row + kept, row + k, 0.0f);
            std::fill(indices + i * indices_stride + kept, indices + i * indices_stride + k, int64_t{0});
        }
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
