// Look-back attention by an online softmax, a tile at a time: FlashAttention (Dao et al. 2022, arXiv 2205.14135). The
// online softmax starts from the null score.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "attention/attention_head.h"
#include "parallel.h"

namespace csae {
namespace {

// A thread's workspace: the packed keys and values of one window and head, up to the current tile, and that tile.
struct ForwardSpace {
    AlignedFloats keys;    // [n_tiles, head_width, 64]
    AlignedFloats values;  // [n_tiles, 64, value_width]
    std::unique_ptr<bool[]> finite_values;
    std::unique_ptr<TileOfKeys[]> in_mask;
    AlignedFloats packed;  // [64, head_width]
    AlignedFloats out;     // [64, value_width]
    alignas(64) float scores[tile_size * tile_size];
    float maximum[tile_size], sum[tile_size * max_lanes], share[tile_size];
    TileOfQueries queries;

    explicit ForwardSpace(const Attention& attention)
        : keys(attention.n_tiles * attention.head_width * tile_size),
          values(attention.n_tiles * tile_size * attention.value_width),
          finite_values(new bool[attention.n_tiles]),
          in_mask(new TileOfKeys[attention.n_tiles]),
          packed(tile_size * attention.head_width),
          out(tile_size * attention.value_width) {}
};

void pack_keys(const Attention& attention, int64_t b, int64_t h, int64_t tile, ForwardSpace& space) {
    space.in_mask[tile].set(attention, b, tile);
    attention.tiles.transpose(attention.rows(attention.k, attention.d_head, b, h, tile),
                              space.keys.get() + tile * attention.head_width * tile_size);
    space.finite_values[tile] =
        attention.tiles.pack(attention.rows(attention.v, attention.d_value, b, h, tile), 1.0f,
                             space.values.get() + tile * tile_size * attention.value_width, attention.value_width);
}

void attend(const Attention& attention, int64_t b, int64_t h, int64_t tile, ForwardSpace& space, float* out,
            float* lse) {
    const int64_t lanes = attention.tiles.lanes;
    const float null = attention.null[h], scale = 1.0f / std::sqrt(static_cast<float>(attention.d_head));
    space.queries.set(attention, b, tile);
    const int64_t rows = space.queries.rows;
    attention.tiles.pack(attention.rows(attention.q, attention.d_head, b, h, tile), scale, space.packed.get(),
                         attention.head_width);
    std::fill(space.out.get(), space.out.get() + tile_size * attention.value_width, 0.0f);
    std::fill(space.maximum, space.maximum + tile_size, null);
    std::fill(space.sum, space.sum + tile_size * lanes, 0.0f);
    const float one = std::isfinite(null) ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    for (int64_t r = 0; r < rows; ++r) space.sum[r * lanes] = null == -INFINITY ? 0.0f : one;

    for (int64_t i = space.queries.first_tile; i <= tile; ++i) {
        const Pairs pairs = space.queries.with(attention, h, i, space.in_mask[i]);
        const float* values = space.values.get() + i * tile_size * attention.value_width;
        attention.tiles.product({space.packed.get(), attention.head_width, 1,
                                 space.keys.get() + i * attention.head_width * tile_size, tile_size, space.scores,
                                 tile_size, rows, tile_size, attention.d_head,
                                 pairs.diagonal ? Part::columns_to_row : Part::all, false});
        attention.tiles.weigh(pairs, space.scores, space.maximum, space.sum, space.out.get(), attention.value_width);
        if (space.finite_values[i]) {
            attention.tiles.product({space.scores, tile_size, 1, values, attention.value_width, space.out.get(),
                                     attention.value_width, rows, attention.value_width, tile_size,
                                     pairs.diagonal ? Part::terms_to_row : Part::all, true});
        } else {
            visible_product(pairs, space.scores, false, values, space.out.get(), attention.value_width);
        }
    }

    for (int64_t r = 0; r < attention.count(tile); ++r) {
        const int64_t t = tile * tile_size + r;
        float sum = 0;
        for (int64_t l = 0; l < lanes; ++l) sum += space.sum[r * lanes + l];
        space.share[r] = 1.0f / sum;
        lse[(b * attention.H + h) * attention.T + t] = space.maximum[r] + std::log(sum);
    }
    attention.tiles.unpack(space.out.get(), attention.value_width, space.share,
                           out + ((b * attention.T + tile * tile_size) * attention.H + h) * attention.d_value,
                           attention.H * attention.d_value, attention.count(tile), attention.d_value);
}

}  // namespace
}  // namespace csae

int csae_lookback_forward(const csae_attention* given, float* out, float* lse, int n_threads) {
    if (given == nullptr || !csae::good(*given) || n_threads < 1) return csae_bad_argument;
    const int64_t n_heads = given->B * given->H;
    if (n_heads * given->T == 0) return csae_ok;
    if (lse == nullptr || (given->d_value > 0 && out == nullptr)) return csae_bad_argument;
    try {
        const csae::Attention attention(*given);
        // With few heads, several threads share the queries of a head; each of them packs the keys for itself.
        const int64_t parts = std::min(attention.n_tiles, (int64_t{2} * n_threads - 1) / n_heads + 1);
        const int64_t n_spaces = std::min<int64_t>(n_threads, n_heads * parts);
        std::unique_ptr<std::unique_ptr<csae::ForwardSpace>[]> spaces(
            new std::unique_ptr<csae::ForwardSpace>[static_cast<size_t>(n_spaces)]);
        for (int64_t i = 0; i < n_spaces; ++i) spaces[i].reset(new csae::ForwardSpace(attention));
        csae::parallel_for(n_heads * parts, 1, n_threads, [&](int thread, int64_t item, int64_t) {
            csae::ForwardSpace& space = *spaces[thread];
            const int64_t b = item / parts / attention.H, h = item / parts % attention.H;
            int64_t packed = 0;
            for (int64_t tile = item % parts; tile < attention.n_tiles; tile += parts) {
                for (; packed <= tile; ++packed) csae::pack_keys(attention, b, h, packed, space);
                csae::attend(attention, b, h, tile, space, out, lse);
            }
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
