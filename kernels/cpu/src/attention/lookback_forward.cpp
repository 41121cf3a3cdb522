// Look-back attention with a running softmax, a tile at a time: FlashAttention (Dao et al. 2022, arXiv 2205.14135)
// with the null slot as where the softmax starts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "attention/attention_head.h"
#include "parallel.h"

namespace csae {
namespace {

// The keys and values of one window and head, up to the tile that is needed, and the tile at work.
struct ForwardSpace {
    Lines keys;    // [n_tiles, head_width, 64]
    Lines values;  // [n_tiles, 64, value_width]
    std::unique_ptr<bool[]> finite_values;
    std::unique_ptr<TileOfKeys[]> in_mask;
    Lines packed;  // [64, head_width]
    Lines out;     // [64, value_width]
    alignas(64) float scores[tile_size * tile_size];
    float maximum[tile_size], sum[tile_size * max_lanes], share[tile_size];
    TileOfQueries queries;

    explicit ForwardSpace(const Attention& of)
        : keys(of.n_tiles * of.head_width * tile_size),
          values(of.n_tiles * tile_size * of.value_width),
          finite_values(new bool[of.n_tiles]),
          in_mask(new TileOfKeys[of.n_tiles]),
          packed(tile_size * of.head_width),
          out(tile_size * of.value_width) {}
};

void pack_keys(const Attention& of, int64_t b, int64_t h, int64_t tile, ForwardSpace& w) {
    w.in_mask[tile].set(of, b, tile);
    of.tiles.transpose(of.rows(of.k, of.d_head, b, h, tile), w.keys.get() + tile * of.head_width * tile_size);
    w.finite_values[tile] = of.tiles.pack(of.rows(of.v, of.d_value, b, h, tile), 1.0f,
                                          w.values.get() + tile * tile_size * of.value_width, of.value_width);
}

void attend(const Attention& of, int64_t b, int64_t h, int64_t tile, ForwardSpace& w, float* out, float* lse) {
    const int64_t lanes = of.tiles.lanes;
    const float null = of.null[h], scale = 1.0f / std::sqrt(static_cast<float>(of.d_head));
    w.queries.set(of, b, tile);
    const int64_t rows = w.queries.rows;
    of.tiles.pack(of.rows(of.q, of.d_head, b, h, tile), scale, w.packed.get(), of.head_width);
    std::fill(w.out.get(), w.out.get() + tile_size * of.value_width, 0.0f);
    std::fill(w.maximum, w.maximum + tile_size, null);
    std::fill(w.sum, w.sum + tile_size * lanes, 0.0f);
    const float one = std::isfinite(null) ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    for (int64_t r = 0; r < rows; ++r) w.sum[r * lanes] = null == -INFINITY ? 0.0f : one;

    for (int64_t i = w.queries.first_tile; i <= tile; ++i) {
        const Pairs pairs = w.queries.with(of, h, i, w.in_mask[i]);
        const float* values = w.values.get() + i * tile_size * of.value_width;
        of.tiles.product({w.packed.get(), of.head_width, 1, w.keys.get() + i * of.head_width * tile_size, tile_size,
                          w.scores, tile_size, rows, tile_size, of.d_head,
                          pairs.diagonal ? Part::columns_to_row : Part::all, false});
        of.tiles.weigh(pairs, w.scores, w.maximum, w.sum, w.out.get(), of.value_width);
        if (w.finite_values[i]) {
            of.tiles.product({w.scores, tile_size, 1, values, of.value_width, w.out.get(), of.value_width, rows,
                              of.value_width, tile_size, pairs.diagonal ? Part::terms_to_row : Part::all, true});
        } else {
            visible_product(pairs, w.scores, false, values, w.out.get(), of.value_width);
        }
    }

    for (int64_t r = 0; r < of.count(tile); ++r) {
        const int64_t t = tile * tile_size + r;
        float sum = 0;
        for (int64_t l = 0; l < lanes; ++l) sum += w.sum[r * lanes + l];
        w.share[r] = 1.0f / sum;
        lse[(b * of.H + h) * of.T + t] = w.maximum[r] + std::log(sum);
    }
    of.tiles.unpack(w.out.get(), of.value_width, w.share, out + ((b * of.T + tile * tile_size) * of.H + h) * of.d_value,
                    of.H * of.d_value, of.count(tile), of.d_value);
}

}  // namespace
}  // namespace csae

int csae_lookback_forward(const csae_attention* given, float* out, float* lse, int n_threads) {
    if (given == nullptr || !csae::good(*given) || n_threads < 1) return csae_bad_argument;
    const int64_t n_heads = given->B * given->H;
    if (n_heads * given->T == 0) return csae_ok;
    if (lse == nullptr || (given->d_value > 0 && out == nullptr)) return csae_bad_argument;
    try {
        const csae::Attention of(*given);
        // The queries of one head go to several threads only where there are few heads: each makes its own keys.
        const int64_t parts = std::min(of.n_tiles, (int64_t{2} * n_threads - 1) / n_heads + 1);
        const int64_t n_spaces = std::min<int64_t>(n_threads, n_heads * parts);
        std::unique_ptr<std::unique_ptr<csae::ForwardSpace>[]> spaces(
            new std::unique_ptr<csae::ForwardSpace>[static_cast<size_t>(n_spaces)]);
        for (int64_t i = 0; i < n_spaces; ++i) spaces[i].reset(new csae::ForwardSpace(of));
        csae::parallel_for(n_heads * parts, 1, n_threads, [&](int thread, int64_t item, int64_t) {
            csae::ForwardSpace& w = *spaces[thread];
            const int64_t b = item / parts / of.H, h = item / parts % of.H;
            int64_t packed = 0;
            for (int64_t tile = item % parts; tile < of.n_tiles; tile += parts) {
                for (; packed <= tile; ++packed) csae::pack_keys(of, b, h, packed, w);
                csae::attend(of, b, h, tile, w, out, lse);
            }
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
