// Matrix products in float32, on matrix units that multiply bfloat16.
//
// A float has 24 bits and a bfloat16 8, so a float is exactly the sum of three of them, x1 + x2 + x3, each at most
// 2^-8 of the one before. Of the nine products of two such sums the six largest are summed, in float: x1y1, x1y2, x2y1,
// x1y3, x3y1, x2y2. The other three are at most 2^-23 of x y together, 2^-27 mostly, and of either sign: no more than
// what rounding x y to a float takes.
//
// The smaller matrix is split first, all of it, by all threads. Then each thread takes parts of the larger one, so many
// lines and so much of k that they stay in L2, splits them, and goes over the smaller one, which comes from L2 or L3.
// Both lie in panels: 32 rows of a or 32 columns of b, for each 32 of k their three parts. Two panels give a square of
// 32 by 32 sums, in four tiles: 24 products of tiles for 14 that are loaded. An instruction sums 32 products before it
// adds them to what is there; with fewer roundings among large numbers, sums come out more exact than those that add
// one product after the other. What a thread splits is decided by chance, but not in which order a sum is made.
//
// Costs 12 m n k operations in bfloat16, reads a and b once, and writes 1.5 times their bytes. Two threads of a Xeon
// with AMX multiply 4.6 T a second on random numbers in L2 (zeros need less power: 5.9 T): 1.6 ms for m = 2048, n = 576,
// k = 512. Splitting is 11 instructions for each 16 numbers, so it is bound by memory: most of what is to be split is
// fetched while the units multiply. Measured there, alternating with torch.mm: 2.2 ms for that one, and 4.0; where k is
// 2048, m = 576 and n = 512, 3.1 ms, and 4.2: there both matrices are large, and the smaller one comes from L3.
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

// Of 32 numbers along k, number p is paired with number p + 16: so a pair is made without a shuffle.
struct alignas(64) Tile {
    uint32_t pairs[tile * tile];  // the lower half first
};

// What a panel has for 32 of k: its two tiles of x1, of x2, of x3.
struct Step {
    Tile parts[n_parts][2];
};

// The parts that are multiplied: the largest product last, and each time one of the two stays loaded.
struct Term {
    int a, b;
};
constexpr Term terms[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

// Of the larger matrix a thread splits so much at a time, 1 MB at most: numbers of k, and panels.
constexpr int64_t most_k = 576, most_panels = 9;

// At 2^127 and above x1 might be infinite.
constexpr uint32_t too_large = 0x7F000000u;

// 32 by 16 numbers: line l at l * stride, its second half at `second` from there. Along a line goes k (second = 16),
// or it is for one number of k (second = 16 strides).
struct Source {
    const float* numbers;
    int64_t stride, second;
};

// Memory that is read soon: so many rows of bytes, each of them fetched to L2 before, some lines at a time.
struct Ahead {
    const char* row;
    int64_t stride, bytes, rows, lines_a_step, at;

    void fetch_some() {
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
    // One tile of each part, which lie 2 apart: a row of pairs for each line, or a column. Returns the bits of the
    // largest magnitude.
    uint32_t (*split)(const Source& from, bool columns, Tile* parts);
    // The square of two panels, or so much more. Meanwhile memory is fetched.
    void (*multiply)(const Step* a, const Step* b, int64_t steps, bool more, float* sums, int64_t stride, Ahead& some,
                     Ahead& other);
};

// Line l of each part as pairs.
template <int W>
CSAE_INLINE void split_line(const float* first, const float* second, uint32_t* const* pairs, Integers<W>& largest) {
    Register<W> low = load<W>(first), high = load<W>(second);
    for (const auto& x : {bits_of(low).x & 0x7FFFFFFFu, bits_of(high).x & 0x7FFFFFFFu}) {
        largest.x = x > largest.x ? x : largest.x;
    }
    for (int part = 0; part < n_parts; ++part) {
        // To the nearest; the last part is exact as it is.
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

void multiply_portable(const Step* a, const Step* b, int64_t steps, bool more, float* sums, int64_t stride, Ahead&,
                       Ahead&) {
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

// --- matrix units ------------------------------------------------------------------------------------------

#if CSAE_HAS_AMX

// Four numbers of each of four rows, which are 4 rows apart.
CSAE_AMX CSAE_INLINE __m512i quarters_of(const uint32_t* from) {
    const __m128i* at = reinterpret_cast<const __m128i*>(from);
    __m512i all = _mm512_broadcast_i32x4(_mm_load_si128(at));
    all = _mm512_mask_broadcast_i32x4(all, 0x00F0, _mm_load_si128(at + 16));
    all = _mm512_mask_broadcast_i32x4(all, 0x0F00, _mm_load_si128(at + 32));
    return _mm512_mask_broadcast_i32x4(all, 0xF000, _mm_load_si128(at + 48));
}

// Loads bring rows together that are 4 apart, so half of the shuffles are left to do.
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
                           Ahead& some, Ahead& other) {
    const int64_t stride_bytes = stride * 4;
    // A store of a tile takes 1000 cycles where there was none for 1700, so there is one every 800.
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
        some.fetch_some();
        LOAD_B(1);
        MULTIPLY();
        LOAD_A(1);
        if (s % 2 == 1) _tile_stored(5, unused.pairs, 64);
        MULTIPLY();
        LOAD_B(0);
        MULTIPLY();
        other.fetch_some();
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

// One of the two matrices, as lines [n, k] whatever its strides are: rows of a, columns of b.
struct Operand {
    const float* numbers;
    int64_t stride, stride_k, n, k;
    bool is_b;
    const Units& units;

    // Tile h of a step: lines i and on, numbers c and on of k.
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

    // What is read to split panels first to last - 1 from number c of k, or nothing.
    Ahead ahead(int64_t first, int64_t last, int64_t c, int64_t steps) const {
        const int64_t lines = std::min(n, last * side) - first * side, width = std::min(k - c, steps * depth);
        if (lines <= 0) return {nullptr, 0, 0, 0, 0, 0};
        const char* from = reinterpret_cast<const char*>(numbers + first * side * stride + c * stride_k);
        return stride_k == 1 ? Ahead{from, stride * 4, width * 4, lines, 0, 0}
                             : Ahead{from, stride_k * 4, lines * 4, width, 0, 0};
    }

    // Two tiles of each part. The same place in the panel or the step after is fetched: it is split soon.
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

    // Panels first to last - 1 with numbers c to c + steps * 32 - 1 of k, in the order in which they lie in memory.
    // Each panel is `panel_steps` long.
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

    // The larger one is split a part at a time.
    bool a_in_parts() const { return a.n >= b.n; }

    float* square_of(int64_t i, int64_t j) const {
        return a_in_parts() ? out + i * side * out_stride + j * side : out + j * side * out_stride + i * side;
    }

    void fetch_square(const float* sums) const {
        for (int64_t r = 0; r < side; ++r) {
            __builtin_prefetch(sums + r * out_stride, 1);
            __builtin_prefetch(sums + r * out_stride + tile, 1);
        }
    }

    // Panel i of the one by panel j of the other.
    void multiply(int64_t i, int64_t j, const Step* of_one, const Step* of_other, int64_t steps, bool more, Ahead& some,
                  Ahead& other) const {
        const Step *of_a = a_in_parts() ? of_one : of_other, *of_b = a_in_parts() ? of_other : of_one;
        float* const sums = square_of(i, j);
        const int64_t rows = std::min(side, a.n - (a_in_parts() ? i : j) * side);
        const int64_t columns = std::min(side, b.n - (a_in_parts() ? j : i) * side);
        if (rows == side && columns == side) {
            units.multiply(of_a, of_b, steps, more, sums, out_stride, some, other);
        } else {
            alignas(64) float square[side * side] = {};
            for (int64_t r = 0; more && r < rows; ++r) std::copy_n(sums + r * out_stride, columns, square + r * side);
            units.multiply(of_a, of_b, steps, more, square, side, some, other);
            for (int64_t r = 0; r < rows; ++r) std::copy_n(square + r * side, columns, sums + r * out_stride);
        }
    }

    // Panels first to last - 1 of the one, `steps` each, by n_whole of the other, of which each is whole_steps long.
    void multiply_part(int64_t first, int64_t last, const Step* part, const Step* whole, int64_t n_whole, int64_t steps,
                       int64_t whole_steps, bool more, Ahead next_part) const {
        const int64_t lines = static_cast<int64_t>(sizeof(Step)) / 64;
        next_part.lines_a_step = 2 * side / n_whole + 1;
        for (int64_t j = 0; j < n_whole; ++j) {
            const Step* of_whole = whole + j * whole_steps;
            Ahead next_panel{reinterpret_cast<const char*>(of_whole + whole_steps),
                             0,
                             steps * lines * 64,
                             j + 1 < n_whole,
                             lines / (last - first) + 1,
                             0};
            for (int64_t i = first; i < last; ++i) {
                if (i + 1 < last) {
                    fetch_square(square_of(i + 1, j));
                } else if (j + 1 < n_whole) {
                    fetch_square(square_of(first, j + 1));
                }
                multiply(i, j, part + (i - first) * steps, of_whole, steps, more, next_part, next_panel);
            }
        }
    }

    // Whether all numbers were in range.
    bool run(int n_threads) const {
        const Operand &one = a_in_parts() ? a : b, &other = a_in_parts() ? b : a;
        const int64_t k = a.k, all_steps = (k + depth - 1) / depth;
        const int64_t n_blocks = (k + most_k - 1) / most_k;
        const int64_t block = (all_steps + n_blocks - 1) / n_blocks;
        const int64_t n_one = panels_of(one.n), n_other = panels_of(other.n);
        // As many parts for each thread.
        const int64_t turns = (n_one + n_threads * most_panels - 1) / (n_threads * most_panels);
        const int64_t part = (n_one + n_threads * turns - 1) / (n_threads * turns);
        const int64_t n_parts_of_one = (n_one + part - 1) / part;
        const int64_t n_workers = std::min<int64_t>(n_threads, n_parts_of_one);
        std::unique_ptr<Step[]> whole(new Step[n_other * all_steps]);
        std::unique_ptr<Step[]> rooms(new Step[n_workers * part * block]);
        std::atomic<uint32_t> largest_of_one{0}, largest_of_other{0};

        const bool by_panels = other.stride_k == 1;
        const int64_t pieces = by_panels ? n_other : all_steps;
        // Some in a row, as each fetches what the next one reads.
        const int64_t in_a_row = std::max<int64_t>(1, pieces / (int64_t{4} * n_threads));
        parallel_for(pieces, in_a_row, n_threads, [&](int, int64_t begin, int64_t end) {
            raise(largest_of_other,
                  by_panels ? other.split(begin, end, 0, all_steps, whole.get() + begin * all_steps, all_steps)
                            : other.split(0, n_other, begin * depth, end - begin, whole.get() + begin, all_steps));
        });
        if (largest_of_other >= too_large) return false;

        std::atomic<int64_t> next_free{n_workers};
        parallel_for(n_workers, 1, static_cast<int>(n_workers), [&](int thread, int64_t here, int64_t) {
            Step* const room = rooms.get() + thread * part * block;
            units.begin();
            while (here < n_parts_of_one) {
                // Taken early, to be fetched meanwhile.
                const int64_t next = next_free.fetch_add(1, std::memory_order_relaxed);
                const int64_t first = here * part, last = std::min(n_one, first + part);
                for (int64_t s = 0; s < all_steps; s += block) {
                    const int64_t steps = std::min(block, all_steps - s), after = s + block;
                    raise(largest_of_one, one.split(first, last, s * depth, steps, room, steps));
                    const Ahead next_part = after < all_steps ? one.ahead(first, last, after * depth, block)
                                                              : one.ahead(next * part, (next + 1) * part, 0, block);
                    multiply_part(first, last, room, whole.get() + s, n_other, steps, all_steps, s > 0, next_part);
                }
                here = next;
            }
            units.end();
        });
        if (largest_of_one >= too_large) return false;
        const double one_most = from_bits(Integers<1>{{largest_of_one.load()}}).x[0];
        const double other_most = from_bits(Integers<1>{{largest_of_other.load()}}).x[0];
        return one_most * other_most * static_cast<double>(k) < 0x1p127;
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
