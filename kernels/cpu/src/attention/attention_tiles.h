// Look-back attention on one tile of queries and keys, in each instruction set.
//
// A tile is 64 queries by 64 keys, row-major. Tiles begin at multiples of 64. The last tile that a query sees is the
// diagonal one, where queries and keys are the same positions. Its row r needs only the columns before r;
// `diagonal_columns` of them are computed, and the others are never read.
#pragma once

#include <cstdint>

namespace csae {

constexpr int64_t tile_size = 64;

// Rows are computed in groups of this many; matrices are padded with zeros to whole groups.
constexpr int64_t row_group = 8;

// Most floats in a register of any instruction set.
constexpr int64_t max_lanes = 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Up to 64 rows of d numbers. Masked rows and rows beyond `count` are read as zeros, so that nothing of them, not even
// NaN, gets into a sum.
struct Rows {
    const float* x;
    int64_t stride, count, d;
    const uint8_t* mask;  // [count] or null

    bool take_part(int64_t r) const { return r < count && (mask == nullptr || mask[r] != 0); }
};

// Rows to prefetch, the last added first. `product` prefetches a few cache lines at a time, because memory is idle
// then; packing the rows later would only wait for memory.
struct PrefetchQueue {
    Rows rows[5];
    int64_t n = 0, column = 0;

    void add(const Rows& more) {
        if (more.count > 0 && more.d > 0) rows[n++] = more;
    }

    void fetch(int64_t lines) {
        for (; n > 0 && lines > 0; --lines) {
            Rows& current = rows[n - 1];
            __builtin_prefetch(current.x + column);
            column += 16;
            if (column < current.d) continue;
            column = 0;
            current.x += current.stride;
            if (--current.count == 0) --n;
        }
    }
};

// The part of a product that is needed if its rows, columns or terms are those of a diagonal tile.
enum class Part { all, columns_to_row, terms_to_row, terms_from_row };

// c [m, n] = a [m, p] * b [p, n], or += if `add`. m is a multiple of row_group, n of the number of lanes. a_row,
// a_column, b_row, c_row: strides.
struct Product {
    const float* a;
    int64_t a_row, a_column;
    const float* b;
    int64_t b_row;
    float* c;
    int64_t c_row;
    int64_t m, n, p;
    Part part;
    bool add;
    PrefetchQueue* prefetch = nullptr;  // rows to prefetch meanwhile
};

// The pairs (query, key) of a tile. logs[c - r] is the log of the distance between row r and column c. If `open`, all
// pairs are visible; otherwise row r sees the columns from first[r] to last[r] with out_of_mask 0.
struct Pairs {
    const float* logs;
    float slope;
    int64_t rows;
    bool diagonal, open;
    const float *first, *last;  // [tile_size]
    const float* out_of_mask;   // [tile_size]

    bool visible(int64_t r, int64_t c) const {
        const auto column = static_cast<float>(c);
        return open || (column >= first[r] && column <= last[r] && out_of_mask[c] == 0);
    }
};

struct AttentionTiles {
    int64_t lanes;

    // to [64, width] = scale * from, zero from column d on. Returns whether all numbers are finite.
    bool (*pack)(const Rows& from, float scale, float* to, int64_t width);

    // from [64, d] -> to [d, 64], with zeros for the rows of `to` up to a whole number of registers.
    void (*transpose)(const Rows& from, float* to);

    // to [count, d] = scale[r] * rows[r] of [64, width]
    void (*unpack)(const float* rows, int64_t width, const float* scale, float* to, int64_t stride, int64_t count,
                   int64_t d);

    void (*product)(const Product& product);

    // One step of the online softmax. Replaces <q, k> by exp(score - maximum), and updates `maximum` [rows], `sum`
    // [rows, lanes] (partial sums) and `out` [rows, width], rescaled to the new maximum.
    void (*weigh)(const Pairs& pairs, float* scores, float* maximum, float* sum, float* out, int64_t width);

    // delta[r] = <a_r, b_r> for a [64, width], summed in the order in which `product` sums. If one weight is 1, the
    // gradient of its score, <grad, v> - delta, is then exactly 0, and not a rounding error that a large query
    // amplifies.
    void (*dots)(const float* a, int64_t width, const Rows& b, float* delta);

    // Replaces <q, k> by the weights exp(score - lse), and the gradient of the weights, <grad_out, v>, by that of the
    // scores. Returns the tile's term of -d_slope: the sum over pairs of the latter times the log of the distance.
    float (*weigh_back)(const Pairs& pairs, float* scores, float* d_weights, const float* lse, const float* delta);
};

const AttentionTiles& attention_tiles();

}  // namespace csae
