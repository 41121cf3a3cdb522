// Look-back attention on one tile of queries and keys, in each instruction set.
//
// A tile is 64 queries by 64 keys, row-major. Tiles begin at multiples of 64, so the one whose queries are its keys
// is the last that a query sees, and half of it is of use: row r needs columns before r only. `diagonal_columns` is
// how many are computed; what lies beyond is never read.
#pragma once

#include <cstdint>

namespace csae {

constexpr int64_t tile_size = 64;

// Rows are worked on in groups of this many; matrices have zeros where the last group is not full.
constexpr int64_t row_group = 8;

// No register holds more floats.
constexpr int64_t max_lanes = 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Up to 64 rows of d numbers. One that does not take part or does not exist is read as zeros: so nothing that is
// hidden, NaN or not, gets into a sum.
struct Rows {
    const float* x;
    int64_t stride, count, d;
    const uint8_t* mask;  // [count] or null

    bool take_part(int64_t r) const { return r < count && (mask == nullptr || mask[r] != 0); }
};

// Rows that will be read soon, the last one added first. `product` brings them into the cache, a few lines at a time:
// it leaves memory idle, while packing them does nothing but wait for it.
struct Soon {
    Rows rows[5];
    int64_t n = 0, column = 0;

    void add(const Rows& of) {
        if (of.count > 0 && of.d > 0) rows[n++] = of;
    }

    void fetch(int64_t lines) {
        for (; n > 0 && lines > 0; --lines) {
            Rows& of = rows[n - 1];
            __builtin_prefetch(of.x + column);
            column += 16;
            if (column < of.d) continue;
            column = 0;
            of.x += of.stride;
            if (--of.count == 0) --n;
        }
    }
};

// Of a product whose rows, columns or terms are those of a diagonal tile: what is of use.
enum class Part { all, columns_to_row, terms_to_row, terms_from_row };

// c [m, n] = a [m, p] * b [p, n], or += where `add`. m is a multiple of row_group, n of the number of lanes.
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
    Soon* soon = nullptr;  // fetched meanwhile
};

// The pairs of a tile: `logs` [-r + c] is the log of the distance between row r and column c. Row r sees the columns
// from first[r] to last[r] whose `out_of_mask` is 0 and not -1; all columns where `open`.
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

    // to [64, width] = scale * from, zero in the columns from d on. Returns whether all of it is finite.
    bool (*pack)(const Rows& from, float scale, float* to, int64_t width);

    // from [64, d] -> to [d, 64], with zeros up to a whole number of registers of d.
    void (*transpose)(const Rows& from, float* to);

    // to [count, d] = scale[r] * rows[r] of [64, width]
    void (*unpack)(const float* rows, int64_t width, const float* scale, float* to, int64_t stride, int64_t count,
                   int64_t d);

    void (*product)(const Product& product);

    // One step of the running softmax. Turns <q, k> into exp(score - maximum), and brings `maximum` [rows], `sum`
    // [rows, lanes] (in any lane) and `out` [rows, width], which are relative to the maximum, up to date.
    void (*weigh)(const Pairs& pairs, float* scores, float* maximum, float* sum, float* out, int64_t width);

    // delta[r] = <a_r, b_r> for a [64, width], added in the order in which `product` adds: where one weight is 1, the
    // gradient of its score is then 0 to the last bit, and not a rounding error that a large query makes larger.
    void (*dots)(const float* a, int64_t width, const Rows& b, float* delta);

    // Turns <q, k> into the weights exp(score - lse), and <grad_out, v>, the gradient of the weights, into that of
    // the scores. Returns the sum of the latter times the log of the distance.
    float (*weigh_back)(const Pairs& pairs, float* scores, float* d_weights, const float* lse, const float* delta);
};

const AttentionTiles& attention_tiles();

}  // namespace csae
