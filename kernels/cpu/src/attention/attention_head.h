// The inputs of look-back attention for one window and head, in tiles.
#pragma once

#include <cstdint>
#include <memory>

#include "attention/attention_tiles.h"
#include "csae_cpu.h"

namespace csae {

// The input of a call. head_width and value_width are d_head and d_value rounded up to whole registers.
struct Attention {
    csae_heads q, k, v;
    const float *slope, *null;
    const uint8_t* mask;    // [B, T] or null
    const int32_t* starts;  // [B, T] or null
    int64_t B, T, H, d_head, d_value;
    const AttentionTiles& tiles;
    int64_t n_tiles, head_width, value_width;
    std::unique_ptr<float[]> logs;  // [(n_tiles + 1) * 64]: log(n_tiles * 64 - i), or 0 from i = n_tiles * 64 on

    // May throw std::bad_alloc.
    Attention(const csae_attention& given);

    // The rows of a tile of one window and head.
    Rows rows(const csae_heads& heads, int64_t d, int64_t b, int64_t h, int64_t tile) const {
        const float* x = heads.x + b * heads.stride_b + h * heads.stride_h + tile * tile_size * heads.stride_t;
        return {x, heads.stride_t, count(tile), d, mask_of(b, tile)};
    }
    int64_t count(int64_t tile) const { return T - tile * tile_size < tile_size ? T - tile * tile_size : tile_size; }
    const uint8_t* mask_of(int64_t b, int64_t tile) const { return mask ? mask + b * T + tile * tile_size : nullptr; }
};

// An empty tensor may be a null pointer, and pointer arithmetic on null is undefined.
inline csae_heads zero_strides_if_null(const csae_heads& heads) { return heads.x == nullptr ? csae_heads{} : heads; }

// Floats that start at a cache line. A register load across two lines would cost as much as two loads.
class AlignedFloats {
public:
    // May throw std::bad_alloc.
    explicit AlignedFloats(int64_t n) : lines(new Line[static_cast<size_t>(round_up(n, 16) / 16)]) {}
    float* get() const { return reinterpret_cast<float*>(lines.get()); }

private:
    struct alignas(64) Line {
        float x[16];
    };
    std::unique_ptr<Line[]> lines;
};

bool good(const csae_attention& given);
bool good(const csae_heads& heads, const csae_attention& attention, int64_t d);

// The mask of 64 keys.
struct TileOfKeys {
    float out_of_mask[tile_size];  // 0 if the key is in the mask, else -1
    bool all;                      // all 64 are
    void set(const Attention& attention, int64_t b, int64_t tile);
};

// The range of keys that each of 64 queries may see.
struct TileOfQueries {
    int64_t tile, rows;                       // rows: a multiple of row_group
    int64_t start[tile_size];                 // of the document; past all keys if the query is masked or does not exist
    int64_t first_tile;                       // no query sees a key before this tile
    int64_t latest_start;                     // all queries see all keys from here up to their own position
    float first[tile_size], last[tile_size];  // for the last result of `with`

    void set(const Attention& attention, int64_t b, int64_t tile);
    Pairs with(const Attention& attention, int64_t h, int64_t key_tile, const TileOfKeys& keys);
};

// c [rows, width] += a [64, 64] * b [64, width] (transposed: a^T * b), over visible pairs only. For a b with NaN or
// infinity, where a weight of 0 would not hide a row.
void visible_product(const Pairs& pairs, const float* a, bool transposed, const float* b, float* c, int64_t width);

}  // namespace csae
