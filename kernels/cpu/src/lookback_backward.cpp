// The gradients of look-back attention: the weights are made again from the log of the softmax's denominator.
//
// With w(t, j) the weights, w(t, null) that of nothing, delta_t = <out_t, grad_t> and
// ds(t, j) = w(t, j) (<grad_t, v_j> - delta_t):
//     dq_t = scale sum_j ds(t, j) k_j;  dk_j = scale sum_t ds(t, j) q_t;  dv_j = sum_t w(t, j) grad_t;
//     dslope = -sum ds(t, j) log(t - j);  dnull = -sum_t w(t, null) delta_t
// A thread does a whole head, so each sum has one order.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "attention_head.h"
#include "parallel.h"

namespace csae {
namespace {

struct Gradients {
    csae_heads grad_out, out;
    const float* lse;
    float *d_q, *d_k, *d_v;
};

// One window and head, and the tile at work.
struct BackwardSpace {
    std::unique_ptr<float[]> keys;           // [n_tiles, 64, head_width]
    std::unique_ptr<float[]> key_columns;    // [n_tiles, d_head, 64]
    std::unique_ptr<float[]> value_columns;  // [n_tiles, d_value, 64]
    std::unique_ptr<bool[]> finite_keys;
    std::unique_ptr<TileOfKeys[]> in_mask;
    std::unique_ptr<float[]> d_k;   // [n_tiles, 64, head_width]
    std::unique_ptr<float[]> d_v;   // [n_tiles, 64, value_width]
    std::unique_ptr<float[]> q;     // [64, head_width], times scale
    std::unique_ptr<float[]> d_q;   // [64, head_width]
    std::unique_ptr<float[]> grad;  // [64, value_width]; before that, values
    std::unique_ptr<float[]> out;   // [64, value_width]
    float scores[tile_size * tile_size], d_scores[tile_size * tile_size];
    float lse[tile_size], delta[tile_size];
    TileOfQueries queries;

    explicit BackwardSpace(const Attention& of)
        : keys(new float[of.n_tiles * tile_size * of.head_width]),
          key_columns(new float[of.n_tiles * of.d_head * tile_size]),
          value_columns(new float[of.n_tiles * of.d_value * tile_size]),
          finite_keys(new bool[of.n_tiles]),
          in_mask(new TileOfKeys[of.n_tiles]),
          d_k(new float[of.n_tiles * tile_size * of.head_width]),
          d_v(new float[of.n_tiles * tile_size * of.value_width]),
          q(new float[tile_size * of.head_width]),
          d_q(new float[tile_size * of.head_width]),
          grad(new float[tile_size * of.value_width]),
          out(new float[tile_size * of.value_width]) {}
};

void pack_keys(const Attention& of, int64_t b, int64_t h, int64_t tile, BackwardSpace& w) {
    const uint8_t* mask = of.mask_of(b, tile);
    const int64_t count = of.count(tile);
    w.in_mask[tile].set(of, b, tile);
    float* keys = w.keys.get() + tile * tile_size * of.head_width;
    w.finite_keys[tile] =
        pack(of.rows(of.k, b, h, tile), of.k.stride_t, count, of.d_head, mask, 1.0f, keys, of.head_width);
    transpose(keys, of.head_width, of.d_head, w.key_columns.get() + tile * of.d_head * tile_size);
    pack(of.rows(of.v, b, h, tile), of.v.stride_t, count, of.d_value, mask, 1.0f, w.grad.get(), of.value_width);
    transpose(w.grad.get(), of.value_width, of.d_value, w.value_columns.get() + tile * of.d_value * tile_size);
    std::fill_n(w.d_k.get() + tile * tile_size * of.head_width, tile_size * of.head_width, 0.0f);
    std::fill_n(w.d_v.get() + tile * tile_size * of.value_width, tile_size * of.value_width, 0.0f);
}

// c += a^T b for a tile a of queries by keys, or over the visible pairs only.
void add_to_keys(const Attention& of, const Pairs& pairs, const float* a, const float* b, bool finite, float* c,
                 int64_t width) {
    if (!finite) return visible_product(pairs, a, true, b, c, width);
    of.tiles.product({a, 1, tile_size, b, width, c, width, pairs.diagonal ? pairs.rows : tile_size, width, pairs.rows,
                      pairs.diagonal ? Part::terms_from_row : Part::all, true});
}

// Writes out[t] = scale * rows[r] of the tile.
void unpack(const Attention& of, int64_t b, int64_t h, int64_t tile, const float* rows, int64_t width, int64_t d,
            float scale, float* out) {
    for (int64_t r = 0; r < of.count(tile); ++r) {
        float* to = out + ((b * of.T + tile * tile_size + r) * of.H + h) * d;
        for (int64_t c = 0; c < d; ++c) to[c] = scale * rows[r * width + c];
    }
}

// The tile's part of d_slope and d_null is added to them.
void attend_back(const Attention& of, const Gradients& g, int64_t b, int64_t h, int64_t tile, BackwardSpace& w,
                 double& d_slope, double& d_null) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(of.d_head));
    const int64_t count = of.count(tile);
    const uint8_t* mask = of.mask_of(b, tile);
    w.queries.set(of, b, tile);
    const int64_t rows = w.queries.rows;
    const bool finite_q =
        pack(of.rows(of.q, b, h, tile), of.q.stride_t, count, of.d_head, mask, scale, w.q.get(), of.head_width);
    const bool finite_grad = pack(of.rows(g.grad_out, b, h, tile), g.grad_out.stride_t, count, of.d_value, mask, 1.0f,
                                  w.grad.get(), of.value_width);
    std::fill_n(w.d_q.get(), tile_size * of.head_width, 0.0f);
    std::fill_n(w.lse, tile_size, 0.0f);
    // A query that is out of the mask has no gradient: its row is zero already, and `out` may be anything there.
    pack(of.rows(g.out, b, h, tile), g.out.stride_t, count, of.d_value, mask, 1.0f, w.out.get(), of.value_width);
    for (int64_t r = 0; r < rows; r += row_group) {
        of.tiles.dots(w.grad.get() + r * of.value_width, of.value_width, w.out.get() + r * of.value_width,
                      of.value_width, of.d_value, w.delta + r);
    }
    for (int64_t r = 0; r < count; ++r) {
        w.lse[r] = g.lse[(b * of.H + h) * of.T + tile * tile_size + r];
        if (mask == nullptr || mask[r] != 0) d_null -= std::exp(of.null[h] - w.lse[r]) * w.delta[r];
    }

    for (int64_t i = w.queries.first_tile; i <= tile; ++i) {
        const Pairs pairs = w.queries.with(of, h, i, w.in_mask[i]);
        const Part part = pairs.diagonal ? Part::columns_to_row : Part::all;
        const float* keys = w.keys.get() + i * tile_size * of.head_width;
        of.tiles.product({w.q.get(), of.head_width, 1, w.key_columns.get() + i * of.d_head * tile_size, tile_size,
                          w.scores, tile_size, rows, tile_size, of.d_head, part, false});
        of.tiles.product({w.grad.get(), of.value_width, 1, w.value_columns.get() + i * of.d_value * tile_size,
                          tile_size, w.d_scores, tile_size, rows, tile_size, of.d_value, part, false});
        d_slope -= of.tiles.weigh_back(pairs, w.scores, w.d_scores, w.lse, w.delta);
        add_to_keys(of, pairs, w.scores, w.grad.get(), finite_grad,
                    w.d_v.get() + i * tile_size * of.value_width, of.value_width);
        add_to_keys(of, pairs, w.d_scores, w.q.get(), finite_q, w.d_k.get() + i * tile_size * of.head_width,
                    of.head_width);
        if (w.finite_keys[i]) {
            of.tiles.product({w.d_scores, tile_size, 1, keys, of.head_width, w.d_q.get(), of.head_width, rows,
                              of.head_width, tile_size, pairs.diagonal ? Part::terms_to_row : Part::all, true});
        } else {
            visible_product(pairs, w.d_scores, false, keys, w.d_q.get(), of.head_width);
        }
    }
    unpack(of, b, h, tile, w.d_q.get(), of.head_width, of.d_head, scale, g.d_q);
}

}  // namespace
}  // namespace csae

int csae_lookback_backward(const csae_attention* given, const csae_heads* grad_out, const csae_heads* out,
                           const float* lse, float* d_q, float* d_k, float* d_v, float* d_slope, float* d_null,
                           int n_threads) {
    if (given == nullptr || !csae::good(*given) || n_threads < 1) return csae_bad_argument;
    if (grad_out == nullptr || !csae::good(*grad_out, *given, given->d_value)) return csae_bad_argument;
    if (out == nullptr || !csae::good(*out, *given, given->d_value)) return csae_bad_argument;
    if (given->H > 0 && (d_slope == nullptr || d_null == nullptr)) return csae_bad_argument;
    std::fill_n(d_slope, given->H, 0.0f);
    std::fill_n(d_null, given->H, 0.0f);
    const int64_t n_heads = given->B * given->H;
    if (n_heads * given->T == 0) return csae_ok;
    if (lse == nullptr || d_q == nullptr || d_k == nullptr) return csae_bad_argument;
    if (given->d_value > 0 && d_v == nullptr) return csae_bad_argument;
    try {
        const csae::Attention of(*given);
        const csae::Gradients g = {csae::standing_if_null(*grad_out), csae::standing_if_null(*out), lse, d_q, d_k, d_v};
        const std::unique_ptr<double[]> slopes(new double[static_cast<size_t>(n_heads)]());
        const std::unique_ptr<double[]> nulls(new double[static_cast<size_t>(n_heads)]());
        const int64_t n_spaces = std::min<int64_t>(n_threads, n_heads);
        std::unique_ptr<std::unique_ptr<csae::BackwardSpace>[]> spaces(
            new std::unique_ptr<csae::BackwardSpace>[static_cast<size_t>(n_spaces)]);
        for (int64_t i = 0; i < n_spaces; ++i) spaces[i].reset(new csae::BackwardSpace(of));
        csae::parallel_for(n_heads, 1, n_threads, [&](int thread, int64_t item, int64_t) {
            csae::BackwardSpace& w = *spaces[thread];
            const int64_t b = item / of.H, h = item % of.H;
            for (int64_t tile = 0; tile < of.n_tiles; ++tile) {
                csae::pack_keys(of, b, h, tile, w);
                csae::attend_back(of, g, b, h, tile, w, slopes[item], nulls[item]);
            }
            for (int64_t tile = 0; tile < of.n_tiles; ++tile) {
                csae::unpack(of, b, h, tile, w.d_k.get() + tile * csae::tile_size * of.head_width, of.head_width,
                             of.d_head, 1.0f, d_k);
                csae::unpack(of, b, h, tile, w.d_v.get() + tile * csae::tile_size * of.value_width, of.value_width,
                             of.d_value, 1.0f, d_v);
            }
        });
        for (int64_t h = 0; h < of.H; ++h) {
            double slope = 0, null = 0;
            for (int64_t b = 0; b < of.B; ++b) {
                slope += slopes[b * of.H + h];
                null += nulls[b * of.H + h];
            }
            d_slope[h] = static_cast<float>(slope);
            d_null[h] = static_cast<float>(null);
        }
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
