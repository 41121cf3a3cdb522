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

    void (*product)(const Product& product);

    // One step of the running softmax. Turns <q, k> into exp(score - maximum), and brings `maximum` [rows], `sum`
    // [rows, lanes] (in any lane) and `out` [rows, width], which are relative to the maximum, up to date.
    void (*weigh)(const Pairs& pairs, float* scores, float* maximum, float* sum, float* out, int64_t width);

    // delta[r] = <a_r, b_r> for r < row_group, added in the order in which `product` adds: where one weight is 1, the
    // gradient of its score is then 0 to the last bit, and not a rounding error that a large query makes larger.
    void (*dots)(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t d, float* delta);

    // Turns <q, k> into the weights exp(score - lse), and <grad_out, v>, the gradient of the weights, into that of
    // the scores. Returns the sum of the latter times the log of the distance.
    float (*weigh_back)(const Pairs& pairs, float* scores, float* d_weights, const float* lse, const float* delta);
};

const AttentionTiles& attention_tiles();

}  // namespace csae
