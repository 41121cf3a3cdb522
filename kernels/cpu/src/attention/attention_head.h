// What look-back attention reads of one window and head, brought into tiles.
#pragma once

#include <cstdint>
#include <memory>

#include "attention/attention_tiles.h"
#include "csae_cpu.h"

namespace csae {

// The tensors of a call. Widths are d_head and d_value rounded up to whole registers.
struct Attention {
    csae_heads q, k, v;
    const float *slope, *null;
    const uint8_t* mask;    // [B, T] or null
    const int32_t* starts;  // [B, T] or null
    int64_t B, T, H, d_head, d_value;
    const AttentionTiles& tiles;
    int64_t n_tiles, head_width, value_width;
    std::unique_ptr<float[]> logs;  // log(n_tiles * 64 - i), 0 where that is not positive

    // May throw std::bad_alloc.
    Attention(const csae_attention& given);

    // A tile of one window and head.
    Rows rows(const csae_heads& of, int64_t d, int64_t b, int64_t h, int64_t tile) const {
        const float* x = of.x + b * of.stride_b + h * of.stride_h + tile * tile_size * of.stride_t;
        return {x, of.stride_t, count(tile), d, mask_of(b, tile)};
    }
    int64_t count(int64_t tile) const { return T - tile * tile_size < tile_size ? T - tile * tile_size : tile_size; }
    const uint8_t* mask_of(int64_t b, int64_t tile) const { return mask ? mask + b * T + tile * tile_size : nullptr; }
};

// What has no columns may be null, which must not be stepped through, not even to stay unread.
inline csae_heads standing_if_null(const csae_heads& heads) { return heads.x == nullptr ? csae_heads{} : heads; }

// Numbers from the start of a cache line on: a register of them that lay in two lines would cost as much as two.
class Lines {
public:
    // May throw std::bad_alloc.
    explicit Lines(int64_t n) : lines(new Line[static_cast<size_t>(round_up(n, 16) / 16)]) {}
    float* get() const { return reinterpret_cast<float*>(lines.get()); }

private:
    struct alignas(64) Line {
        float x[16];
    };
    std::unique_ptr<Line[]> lines;
};

bool good(const csae_attention& given);
bool good(const csae_heads& heads, const csae_attention& of, int64_t d);

// Which of 64 keys take part.
struct TileOfKeys {
    float out_of_mask[tile_size];  // 0 or -1
    bool all;
    void set(const Attention& of, int64_t b, int64_t tile);
};

// Where the documents of 64 queries begin; after all keys for a query that does not take part or does not exist.
struct TileOfQueries {
    int64_t tile, rows;  // rows: a multiple of row_group
    int64_t start[tile_size];
    int64_t first_tile;                       // no query sees a key before this tile
    int64_t latest_start;                     // all queries see all earlier keys from here on
    float first[tile_size], last[tile_size];  // for the pairs that were made last

    void set(const Attention& of, int64_t b, int64_t tile);
    Pairs with(const Attention& of, int64_t h, int64_t key_tile, const TileOfKeys& keys);
};

// c [rows, width] += a [64, 64] * b [64, width] over the pairs that see each other only; with `transposed`, += a^T * b.
// It is for a b with NaN or infinity in it: 0 times that is not 0.
void visible_product(const Pairs& pairs, const float* a, bool transposed, const float* b, float* c, int64_t width);

}  // namespace csae
