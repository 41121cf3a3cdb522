#include "attention/attention_head.h"

#include <algorithm>
#include <cmath>

namespace csae {

Attention::Attention(const csae_attention& given)
    : q(given.q),
      k(given.k),
      v(zero_strides_if_null(given.v)),
      slope(given.slope),
      null(given.null),
      mask(given.mask),
      starts(given.starts),
      B(given.B),
      T(given.T),
      H(given.H),
      d_head(given.d_head),
      d_value(given.d_value),
      tiles(attention_tiles()),
      n_tiles(round_up(given.T, tile_size) / tile_size),
      head_width(round_up(given.d_head, tiles.lanes)),
      value_width(round_up(given.d_value, tiles.lanes)),
      logs(new float[static_cast<size_t>((n_tiles + 1) * tile_size)]) {
    const int64_t n = n_tiles * tile_size;
    for (int64_t i = 0; i < n; ++i) logs[i] = static_cast<float>(std::log(static_cast<double>(n - i)));
    std::fill(logs.get() + n, logs.get() + n + tile_size, 0.0f);
}

bool good(const csae_heads& heads, const csae_attention& attention, int64_t d) {
    if (heads.stride_b < 0 || heads.stride_t < 0 || heads.stride_h < 0) return false;
    return heads.x != nullptr || attention.B * attention.T * attention.H * d == 0;
}

bool good(const csae_attention& attention) {
    if (attention.B < 0 || attention.T < 0 || attention.H < 0 || attention.d_head < 1 || attention.d_value < 0)
        return false;
    if (attention.H > 0 && (attention.slope == nullptr || attention.null == nullptr)) return false;
    return good(attention.q, attention, attention.d_head) && good(attention.k, attention, attention.d_head) &&
           good(attention.v, attention, attention.d_value);
}

void TileOfKeys::set(const Attention& attention, int64_t b, int64_t tile) {
    const uint8_t* mask = attention.mask_of(b, tile);
    const int64_t count = attention.count(tile);
    all = count == tile_size;
    for (int64_t j = 0; j < tile_size; ++j) {
        out_of_mask[j] = j < count && (mask == nullptr || mask[j] != 0) ? 0.0f : -1.0f;
        all = all && out_of_mask[j] == 0;
    }
}

void TileOfQueries::set(const Attention& attention, int64_t b, int64_t tile_) {
    tile = tile_;
    rows = round_up(attention.count(tile), row_group);
    const uint8_t* mask = attention.mask_of(b, tile);
    const int64_t nowhere = attention.n_tiles * tile_size;
    int64_t earliest = nowhere;
    latest_start = 0;
    for (int64_t r = 0; r < tile_size; ++r) {
        if (r >= attention.count(tile) || (mask != nullptr && mask[r] == 0)) {
            start[r] = nowhere;
        } else {
            const int64_t begin =
                attention.starts == nullptr ? 0 : attention.starts[b * attention.T + tile * tile_size + r];
            start[r] = std::max<int64_t>(0, std::min(begin, nowhere));
        }
        earliest = std::min(earliest, start[r]);
        latest_start = std::max(latest_start, r < rows ? start[r] : 0);
    }
    first_tile = earliest / tile_size;
}

Pairs TileOfQueries::with(const Attention& attention, int64_t h, int64_t key_tile, const TileOfKeys& keys) {
    const int64_t key = key_tile * tile_size;
    const bool diagonal = key_tile == tile;
    for (int64_t r = 0; r < tile_size; ++r) {
        first[r] = static_cast<float>(std::max<int64_t>(0, std::min(start[r] - key, tile_size)));
        last[r] = static_cast<float>((diagonal ? r : tile_size) - 1);
    }
    const bool open = !diagonal && keys.all && latest_start <= key;
    const float* logs = attention.logs.get() + (attention.n_tiles - tile + key_tile) * tile_size;
    return {logs, attention.slope[h], rows, diagonal, open, first, last, keys.out_of_mask};
}

void visible_product(const Pairs& pairs, const float* a, bool transposed, const float* b, float* c, int64_t width) {
    for (int64_t r = 0; r < pairs.rows; ++r) {
        for (int64_t j = 0; j < tile_size; ++j) {
            if (!pairs.visible(r, j)) continue;
            const float factor = a[r * tile_size + j];
            const float* from = b + (transposed ? r : j) * width;
            float* to = c + (transposed ? j : r) * width;
            for (int64_t i = 0; i < width; ++i) to[i] += factor * from[i];
        }
    }
}

}  // namespace csae
