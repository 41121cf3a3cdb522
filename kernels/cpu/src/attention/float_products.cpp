// A bf16x3 GEMM: matrix products of float32 on matrix units that multiply bfloat16 (AMX). Henry et al. 2019 (arXiv
// 1904.06376) name it after its three parts; Triton and XLA call it bf16x6, after its six products.
//
// A float has 24 significant bits and a bfloat16 has 8, so a float is exactly the sum of three bfloat16, x1 + x2 + x3,
// each at most 2^-8 of the one before. Of the nine products of two such sums the six largest are computed, and summed
// in float: x1y1, x1y2, x2y1, x1y3, x3y1, x2y2. The other three are at most 2^-23 of x y together, mostly 2^-27, and of
// either sign: no more than the rounding error of x y as a float.
//
// First all threads split the smaller matrix, all of it. Then each thread takes parts of the larger matrix, small
// enough in rows and in k to stay in L2; it splits a part and multiplies it by the whole smaller matrix, which comes
// from L2 or L3. Split matrices are stored in panels of 32 rows of a, or 32 columns of b: for each 32 of k, their three
// parts. The product of two panels is a square of 32 x 32 sums in four AMX tiles: 24 tile products for 14 tile loads
// for each 32 of k. One instruction sums 32 products before it adds them to the accumulator. That makes fewer roundings
// among large numbers, so sums are more exact than when products are added one by one. Which thread splits a part is
// not deterministic; the order of each sum is fixed.
//
// Operations: 12 m n k in bfloat16. Bytes: a and b are read once, and 1.5 times their bytes are written. Floor: two
// threads of a Xeon with AMX multiply 4.6 T a second on random numbers in L2 (5.9 T on zeros, which need less power):
// 1.6 ms for m = 2048, n = 576, k = 512. Splitting takes 11 instructions for 16 numbers, so it is bound by memory; most
// of its input is prefetched during the products. Measured there, alternating with torch.mm: 2.2 ms against 4.0 for
// that shape; 3.1 ms against 4.2 for k = 2048, m = 576, n = 512, where both matrices are large and the smaller one
// comes from L3.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "csae_cpu.h"
#include "parallel.h"
#include "simd/isa.h"
#include "simd/matrix_units.h"
#include "simd/register.h"

namespace csae {
namespace {

constexpr int64_t n_parts = 3;

// A tile of pairs along k. Of 32 numbers, number p is paired with number p + 16, because that needs no shuffle.
struct alignas(64) Tile {
    uint32_t pairs[tile * tile];  // the lower half first
};

// 32 of k of a panel: two tiles of each of x1, x2, x3.
struct Step {
    Tile parts[n_parts][2];
};

// The pairs of parts that are multiplied. The largest product is last; consecutive pairs share a part, which stays
// loaded.
struct Term {
    int a, b;
};
constexpr Term terms[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

// The most of the larger matrix that a thread splits at a time: numbers of k, and panels. 1 MB in all.
constexpr int64_t most_k = 576, most_panels = 9;

// The bits of 2^127: for numbers of that size or more, x1 might round to infinity.
constexpr uint32_t too_large = 0x7F000000u;

// 16 lines of 32 numbers. Line l is at l * stride, and its second 16 numbers are `second` further. If k is contiguous,
// a line goes along k (second = 16). Otherwise a line has one number of k, and its second half another (second = 16
// strides).
struct Source {
    const float* numbers;
    int64_t stride, second;
};

// Prefetches rows of bytes to L2, a few cache lines a step.
struct Prefetch {
    const char* row;
    int64_t stride, bytes, rows, lines_a_step, at;

    void step() {
        for (int64_t line = 0; line < lines_a_step && rows > 0; ++line) {
            __builtin_prefetch(row + at, 0, 2);
            at += 64;
            if (at >= bytes) {
                at = 0;
                row += stride;
                --rows;
            }
        }
    }
};

struct Units {
    void (*begin)();
    void (*end)();
    // Splits `from` into a tile of each part, 2 apart in `parts`. A line becomes a row of pairs, or a column. Returns
    // the bits of the largest magnitude.
    uint32_t (*split)(const Source& from, bool columns, Tile* parts);
    // sums [32, 32] = the product of two panels, or += if `more`. Prefetches meanwhile.
    void (*multiply)(const Step* a, const Step* b, int64_t steps, bool more, float* sums, int64_t stride,
                     Prefetch& next_part, Prefetch& next_panel);
};

// Splits 2 W numbers, and stores each part as W pairs.
template <int W>
CSAE_INLINE void split_line(const float* first, const float* second, uint32_t* const* pairs, Integers<W>& largest) {
    Register<W> low = load<W>(first), high = load<W>(second);
    for (const auto& x : {bits_of(low).x & 0x7FFFFFFFu, bits_of(high).x & 0x7FFFFFFFu}) {
        largest.x = x > largest.x ? x : largest.x;
    }
    for (int part = 0; part < n_parts; ++part) {
        // Rounded to the nearest; the last part is exact.
        const Integers<W> low_part{(bits_of(low).x + 0x8000u) & 0xFFFF0000u};
        const Integers<W> high_part{(bits_of(high).x + 0x8000u) & 0xFFFF0000u};
        const auto both = low_part.x >> 16 | high_part.x;
        std::memcpy(pairs[part], &both, sizeof both);
        low.x -= from_bits(low_part).x;
        high.x -= from_bits(high_part).x;
    }
}

template <int W>
CSAE_INLINE uint32_t split_lines(const Source& from, Tile* parts, int64_t parts_apart) {
    Integers<W> largest = {};
    for (int64_t l = 0; l < tile; ++l) {
        const float* line = from.numbers + l * from.stride;
        for (int64_t c = 0; c < tile; c += W) {
            uint32_t* pairs[n_parts];
            for (int part = 0; part < n_parts; ++part) pairs[part] = parts[part * parts_apart].pairs + l * tile + c;
            split_line<W>(line + c, line + from.second + c, pairs, largest);
        }
    }
    uint32_t most = 0;
    for (int l = 0; l < W; ++l) most = std::max<uint32_t>(most, largest.x[l]);
    return most;
}

// --- portable ----------------------------------------------------------------------------------------------

uint32_t split_portable(const Source& from, bool columns, Tile* parts) {
    const uint32_t largest = split_lines<4>(from, parts, 2);
    if (columns) {
        for (int part = 0; part < n_parts; ++part) {
            uint32_t* pairs = parts[2 * part].pairs;
            for (int64_t i = 0; i < tile; ++i) {
                for (int64_t j = 0; j < i; ++j) std::swap(pairs[i * tile + j], pairs[j * tile + i]);
            }
        }
    }
    return largest;
}

float number(uint32_t upper_half) { return from_bits(Integers<1>{{upper_half & 0xFFFF0000u}}).x[0]; }

void multiply_portable(const Step* a, const Step* b, int64_t steps, bool more, float* sums, int64_t stride, Prefetch&,
                       Prefetch&) {
    for (int64_t i = 0; i < side; ++i) {
        for (int64_t j = 0; j < side; ++j) {
            float sum = more ? sums[i * stride + j] : 0;
            for (int64_t s = 0; s < steps; ++s) {
                for (const Term& term : terms) {
                    const uint32_t* row = a[s].parts[term.a][i / tile].pairs + i % tile * tile;
                    const uint32_t* column = b[s].parts[term.b][j / tile].pairs + j % tile;
                    float low = 0, high = 0;
                    for (int64_t p = 0; p < tile; ++p) {
                        low += number(row[p] << 16) * number(column[p * tile] << 16);
                        high += number(row[p]) * number(column[p * tile]);
                    }
                    sum += low + high;
                }
            }
            sums[i * stride + j] = sum;
        }
    }
}

constexpr Units portable = {no_units, no_units, split_portable, multiply_portable};

// --- AMX ---------------------------------------------------------------------------------------------------

#if CSAE_HAS_AMX

// Four numbers of each of rows 0, 4, 8, 12.
CSAE_AMX CSAE_INLINE __m512i quarters_of(const uint32_t* from) {
    const __m128i* at = reinterpret_cast<const __m128i*>(from);
    __m512i all = _mm512_broadcast_i32x4(_mm_load_si128(at));
    all = _mm512_mask_broadcast_i32x4(all, 0x00F0, _mm_load_si128(at + 16));
    all = _mm512_mask_broadcast_i32x4(all, 0x0F00, _mm_load_si128(at + 32));
    return _mm512_mask_broadcast_i32x4(all, 0xF000, _mm_load_si128(at + 48));
}

// Transposes 16 x 16. Each load combines rows that are 4 apart, which saves half of the shuffles.
CSAE_AMX CSAE_INLINE void transpose(const Tile& from, Tile& to) {
    for (int64_t c = 0; c < tile; c += 4) {
        const __m512i x0 = quarters_of(from.pairs + c), x1 = quarters_of(from.pairs + tile + c);
        const __m512i x2 = quarters_of(from.pairs + 2 * tile + c), x3 = quarters_of(from.pairs + 3 * tile + c);
        const __m512i y0 = _mm512_unpacklo_epi32(x0, x1), y1 = _mm512_unpackhi_epi32(x0, x1);
        const __m512i y2 = _mm512_unpacklo_epi32(x2, x3), y3 = _mm512_unpackhi_epi32(x2, x3);
        uint32_t* at = to.pairs + c * tile;
        _mm512_store_si512(at, _mm512_unpacklo_epi64(y0, y2));
        _mm512_store_si512(at + tile, _mm512_unpackhi_epi64(y0, y2));
        _mm512_store_si512(at + 2 * tile, _mm512_unpacklo_epi64(y1, y3));
        _mm512_store_si512(at + 3 * tile, _mm512_unpackhi_epi64(y1, y3));
    }
}

CSAE_AMX uint32_t split_amx(const Source& from, bool columns, Tile* parts) {
    if (!columns) return split_lines<16>(from, parts, 2);
    Tile rows[n_parts];
    const uint32_t largest = split_lines<16>(from, rows, 1);
    for (int part = 0; part < n_parts; ++part) transpose(rows[part], parts[2 * part]);
    return largest;
}

CSAE_AMX void multiply_amx(const Step* a, const Step* b, int64_t steps, bool more, float* sums, int64_t stride,
                           Prefetch& next_part, Prefetch& next_panel) {
    const int64_t stride_bytes = stride * 4;
    // A tile store takes 1000 cycles if the last one was 1700 cycles ago, so there is a dummy store every 800.
    Tile unused;
    float* const below = sums + tile * stride;
    if (more) {
        _tile_loadd(0, sums, stride_bytes);
        _tile_loadd(1, sums + tile, stride_bytes);
        _tile_loadd(2, below, stride_bytes);
        _tile_loadd(3, below + tile, stride_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
#define LOAD_A(part)                               \
    _tile_loadd(4, a[s].parts[part][0].pairs, 64); \
    _tile_loadd(5, a[s].parts[part][1].pairs, 64)
#define LOAD_B(part)                               \
    _tile_loadd(6, b[s].parts[part][0].pairs, 64); \
    _tile_loadd(7, b[s].parts[part][1].pairs, 64)
#define MULTIPLY()           \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)
    for (int64_t s = 0; s < steps; ++s) {  // in the order of `terms`
        LOAD_A(0);
        LOAD_B(2);
        MULTIPLY();
        next_part.step();
        LOAD_B(1);
        MULTIPLY();
        LOAD_A(1);
        if (s % 2 == 1) _tile_stored(5, unused.pairs, 64);
        MULTIPLY();
        LOAD_B(0);
        MULTIPLY();
        next_panel.step();
        LOAD_A(2);
        MULTIPLY();
        LOAD_A(0);
        MULTIPLY();
    }
#undef LOAD_A
#undef LOAD_B
#undef MULTIPLY
    _tile_stored(0, sums, stride_bytes);
    _tile_stored(1, sums + tile, stride_bytes);
    _tile_stored(2, below, stride_bytes);
    _tile_stored(3, below + tile, stride_bytes);
}

constexpr Units amx = {begin_amx, end_amx, split_amx, multiply_amx};

#endif

const Units& units() {
#if CSAE_HAS_AMX
    if (current_isa() == Isa::amx) return amx;
#endif
    return portable;
}

// -----------------------------------------------------------------------------------------------------------

int64_t panels_of(int64_t lines) { return (lines + side - 1) / side; }

// One of the two matrices, as n lines of k numbers: rows of a, or columns of b.
struct Operand {
    const float* numbers;
    int64_t stride, stride_k, n, k;
    bool is_b;
    const Units& units;

    // Splits lines i .. i + 16 and numbers c .. c + 32 of k into tile h of a step. Pads with zeros.
    uint32_t split_tile(int64_t i, int64_t c, Step& step, int h) const {
        Tile* const parts = &step.parts[0][h];
        const bool along_k = stride_k == 1;
        const int64_t lines = std::clamp<int64_t>(n - i, 0, tile), width = std::min(k - c, depth);
        Source from = along_k ? Source{numbers + i * stride + c, stride, tile}
                              : Source{numbers + c * stride_k + i, stride_k, tile * stride_k};
        float padded[tile * depth];
        if (lines < tile || width < depth) {
            std::fill_n(padded, tile * depth, 0.0f);
            const int64_t padded_stride = along_k ? depth : 1, padded_stride_k = along_k ? 1 : tile;
            for (int64_t l = 0; l < lines; ++l) {
                for (int64_t p = 0; p < width; ++p) {
                    padded[l * padded_stride + p * padded_stride_k] = numbers[(i + l) * stride + (c + p) * stride_k];
                }
            }
            from = along_k ? Source{padded, depth, tile} : Source{padded, tile, tile * tile};
        }
        return units.split(from, along_k == is_b, parts);
    }

    // A prefetch of what `split` reads for panels first .. last from number c of k; empty if there are none.
    Prefetch ahead(int64_t first, int64_t last, int64_t c, int64_t steps) const {
        const int64_t lines = std::min(n, last * side) - first * side, width = std::min(k - c, steps * depth);
        if (lines <= 0) return {nullptr, 0, 0, 0, 0, 0};
        const char* from = reinterpret_cast<const char*>(numbers + first * side * stride + c * stride_k);
        return stride_k == 1 ? Prefetch{from, stride * 4, width * 4, lines, 0, 0}
                             : Prefetch{from, stride_k * 4, lines * 4, width, 0, 0};
    }

    // Splits one step of a panel. Prefetches the same place in the next panel or step, which is split soon after.
    uint32_t split_step(int64_t panel, int64_t c, Step& step) const {
        const int64_t i = panel * side, row = stride_k == 1 ? stride : stride_k;
        const float* next = numbers + (i * stride + c * stride_k) + side * row;
        if (stride_k == 1 ? i + 2 * side <= n : c + 2 * depth <= k) {
            for (int64_t l = 0; l < side; ++l) {
                __builtin_prefetch(next + l * row, 0, 2);
                __builtin_prefetch(next + l * row + tile, 0, 2);
            }
        }
        const uint32_t first = split_tile(i, c, step, 0), second = split_tile(i + tile, c, step, 1);
        return std::max(first, second);
    }

    // Splits numbers c .. c + steps * 32 of k of panels first .. last, in memory order. A panel has room for
    // panel_steps.
    uint32_t split(int64_t first, int64_t last, int64_t c, int64_t steps, Step* panels, int64_t panel_steps) const {
        uint32_t largest = 0;
        const auto split_at = [&](int64_t panel, int64_t s) {
            Step& step = panels[(panel - first) * panel_steps + s];
            largest = std::max(largest, split_step(panel, c + s * depth, step));
        };
        if (stride_k == 1) {
            for (int64_t panel = first; panel < last; ++panel) {
                for (int64_t s = 0; s < steps; ++s) split_at(panel, s);
            }
        } else {
            for (int64_t s = 0; s < steps; ++s) {
                for (int64_t panel = first; panel < last; ++panel) split_at(panel, s);
            }
        }
        return largest;
    }
};

void raise(std::atomic<uint32_t>& to, uint32_t value) {
    uint32_t now = to.load(std::memory_order_relaxed);
    while (now < value && !to.compare_exchange_weak(now, value, std::memory_order_relaxed)) {
    }
}

struct Product {
    Operand a, b;
    float* out;
    int64_t out_stride;
    const Units& units;

    // The larger matrix is split a part at a time.
    bool a_is_larger() const { return a.n >= b.n; }

    float* square_of(int64_t i, int64_t j) const {
        return a_is_larger() ? out + i * side * out_stride + j * side : out + j * side * out_stride + i * side;
    }

    void fetch_square(const float* sums) const {
        for (int64_t r = 0; r < side; ++r) {
            __builtin_prefetch(sums + r * out_stride, 1);
            __builtin_prefetch(sums + r * out_stride + tile, 1);
        }
    }

    // Multiplies panel i of the larger matrix by panel j of the smaller.
    void multiply(int64_t i, int64_t j, const Step* larger_panel, const Step* smaller_panel, int64_t steps, bool more,
                  Prefetch& next_part, Prefetch& next_panel) const {
        const Step *panel_a = a_is_larger() ? larger_panel : smaller_panel,
                   *panel_b = a_is_larger() ? smaller_panel : larger_panel;
        float* const sums = square_of(i, j);
        const int64_t rows = std::min(side, a.n - (a_is_larger() ? i : j) * side);
        const int64_t columns = std::min(side, b.n - (a_is_larger() ? j : i) * side);
        if (rows == side && columns == side) {
            units.multiply(panel_a, panel_b, steps, more, sums, out_stride, next_part, next_panel);
        } else {
            alignas(64) float square[side * side] = {};
            for (int64_t r = 0; more && r < rows; ++r) std::copy_n(sums + r * out_stride, columns, square + r * side);
            units.multiply(panel_a, panel_b, steps, more, square, side, next_part, next_panel);
            for (int64_t r = 0; r < rows; ++r) std::copy_n(square + r * side, columns, sums + r * out_stride);
        }
    }

    // Multiplies panels first .. last of the larger matrix, `steps` long, by all n_smaller panels of the smaller
    // matrix, which are smaller_steps apart.
    void multiply_part(int64_t first, int64_t last, const Step* part, const Step* smaller_panels, int64_t n_smaller,
                       int64_t steps, int64_t smaller_steps, bool more, Prefetch next_part) const {
        const int64_t lines = static_cast<int64_t>(sizeof(Step)) / 64;
        next_part.lines_a_step = 2 * side / n_smaller + 1;
        for (int64_t j = 0; j < n_smaller; ++j) {
            const Step* smaller_panel = smaller_panels + j * smaller_steps;
            Prefetch next_panel{reinterpret_cast<const char*>(smaller_panel + smaller_steps),
                                0,
                                steps * lines * 64,
                                j + 1 < n_smaller,
                                lines / (last - first) + 1,
                                0};
            for (int64_t i = first; i < last; ++i) {
                if (i + 1 < last) {
                    fetch_square(square_of(i + 1, j));
                } else if (j + 1 < n_smaller) {
                    fetch_square(square_of(first, j + 1));
                }
                multiply(i, j, part + (i - first) * steps, smaller_panel, steps, more, next_part, next_panel);
            }
        }
    }

    // Computes the product. Returns false if a number was out of range.
    bool run(int n_threads) const {
        const Operand &larger = a_is_larger() ? a : b, &smaller = a_is_larger() ? b : a;
        const int64_t k = a.k, all_steps = (k + depth - 1) / depth;
        const int64_t n_blocks = (k + most_k - 1) / most_k;
        const int64_t block = (all_steps + n_blocks - 1) / n_blocks;
        const int64_t n_larger = panels_of(larger.n), n_smaller = panels_of(smaller.n);
        // All threads get the same number of parts.
        const int64_t turns = (n_larger + n_threads * most_panels - 1) / (n_threads * most_panels);
        const int64_t part = (n_larger + n_threads * turns - 1) / (n_threads * turns);
        const int64_t n_larger_parts = (n_larger + part - 1) / part;
        const int64_t n_workers = std::min<int64_t>(n_threads, n_larger_parts);
        std::unique_ptr<Step[]> smaller_panels(new Step[n_smaller * all_steps]);
        std::unique_ptr<Step[]> rooms(new Step[n_workers * part * block]);
        std::atomic<uint32_t> max_in_larger{0}, max_in_smaller{0};

        const bool by_panels = smaller.stride_k == 1;
        const int64_t pieces = by_panels ? n_smaller : all_steps;
        // Several consecutive pieces, because each prefetches what the next one reads.
        const int64_t in_a_row = std::max<int64_t>(1, pieces / (int64_t{4} * n_threads));
        parallel_for(pieces, in_a_row, n_threads, [&](int, int64_t begin, int64_t end) {
            raise(max_in_smaller, by_panels ? smaller.split(begin, end, 0, all_steps,
                                                            smaller_panels.get() + begin * all_steps, all_steps)
                                            : smaller.split(0, n_smaller, begin * depth, end - begin,
                                                            smaller_panels.get() + begin, all_steps));
        });
        if (max_in_smaller >= too_large) return false;

        std::atomic<int64_t> next_free{n_workers};
        parallel_for(n_workers, 1, static_cast<int>(n_workers), [&](int thread, int64_t here, int64_t) {
            Step* const room = rooms.get() + thread * part * block;
            units.begin();
            while (here < n_larger_parts) {
                // The next part is taken early, so that it can be prefetched.
                const int64_t next = next_free.fetch_add(1, std::memory_order_relaxed);
                const int64_t first = here * part, last = std::min(n_larger, first + part);
                for (int64_t s = 0; s < all_steps; s += block) {
                    const int64_t steps = std::min(block, all_steps - s), after = s + block;
                    raise(max_in_larger, larger.split(first, last, s * depth, steps, room, steps));
                    const Prefetch next_part = after < all_steps
                                                   ? larger.ahead(first, last, after * depth, block)
                                                   : larger.ahead(next * part, (next + 1) * part, 0, block);
                    multiply_part(first, last, room, smaller_panels.get() + s, n_smaller, steps, all_steps, s > 0,
                                  next_part);
                }
                here = next;
            }
            units.end();
        });
        if (max_in_larger >= too_large) return false;
        const double larger_max = from_bits(Integers<1>{{max_in_larger.load()}}).x[0];
        const double smaller_max = from_bits(Integers<1>{{max_in_smaller.load()}}).x[0];
        return larger_max * smaller_max * static_cast<double>(k) < 0x1p127;
    }
};

}  // namespace
}  // namespace csae

int csae_multiply(const float* a, int64_t a_row_stride, int64_t a_column_stride, const float* b, int64_t b_row_stride,
                  int64_t b_column_stride, int64_t m, int64_t n, int64_t k, float* out, int64_t out_stride,
                  int n_threads) {
    if (m < 0 || n < 0 || k < 0 || n_threads < 1 || (m > 1 && out_stride < n)) return csae_bad_argument;
    if (a_row_stride < 0 || a_column_stride < 0 || b_row_stride < 0 || b_column_stride < 0) return csae_bad_argument;
    if (a_row_stride != 1 && a_column_stride != 1) return csae_bad_argument;
    if (b_row_stride != 1 && b_column_stride != 1) return csae_bad_argument;
    if (m == 0 || n == 0) return csae_ok;
    if (out == nullptr || (k > 0 && (a == nullptr || b == nullptr))) return csae_bad_argument;
    if (k == 0) {
        for (int64_t i = 0; i < m; ++i) std::fill_n(out + i * out_stride, n, 0.0f);
        return csae_ok;
    }
    try {
        const csae::Units& units = csae::units();
        const csae::Operand rows{a, a_row_stride, a_column_stride, m, k, false, units};
        const csae::Operand columns{b, b_column_stride, b_row_stride, n, k, true, units};
        const csae::Product product{rows, columns, out, out_stride, units};
        return product.run(n_threads) ? csae_ok : csae_out_of_range;
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
}
