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

#include "attention/attention_head.h"
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
    Lines keys;           // [n_tiles, 64, head_width]
    Lines key_columns;    // [n_tiles, head_width, 64]
    Lines value_columns;  // [n_tiles, value_width, 64]
    std::unique_ptr<bool[]> finite_keys;
    std::unique_ptr<TileOfKeys[]> in_mask;
    Lines d_k;   // [n_tiles, 64, head_width]
    Lines d_v;   // [n_tiles, 64, value_width]
    Lines q;     // [64, head_width], times scale
    Lines d_q;   // [64, head_width]
    Lines grad;  // [64, value_width]
    alignas(64) float scores[tile_size * tile_size], d_scores[tile_size * tile_size];
    float lse[tile_size], delta[tile_size];
    TileOfQueries queries;
    Soon soon;

    explicit BackwardSpace(const Attention& of)
        : keys(of.n_tiles * tile_size * of.head_width),
          key_columns(of.n_tiles * of.head_width * tile_size),
          value_columns(of.n_tiles * of.value_width * tile_size),
          finite_keys(new bool[of.n_tiles]),
          in_mask(new TileOfKeys[of.n_tiles]),
          d_k(of.n_tiles * tile_size * of.head_width),
          d_v(of.n_tiles * tile_size * of.value_width),
          q(tile_size * of.head_width),
          d_q(tile_size * of.head_width),
          grad(tile_size * of.value_width) {}
};

void pack_keys(const Attention& of, int64_t b, int64_t h, int64_t tile, BackwardSpace& w) {
    const Rows keys = of.rows(of.k, of.d_head, b, h, tile), values = of.rows(of.v, of.d_value, b, h, tile);
    w.in_mask[tile].set(of, b, tile);
    w.finite_keys[tile] = of.tiles.pack(keys, 1.0f, w.keys.get() + tile * tile_size * of.head_width, of.head_width);
    of.tiles.transpose(keys, w.key_columns.get() + tile * of.head_width * tile_size);
    of.tiles.transpose(values, w.value_columns.get() + tile * of.value_width * tile_size);
    std::fill_n(w.d_k.get() + tile * tile_size * of.head_width, tile_size * of.head_width, 0.0f);
    std::fill_n(w.d_v.get() + tile * tile_size * of.value_width, tile_size * of.value_width, 0.0f);
}

// All that the tile reads of the tensors, the first last.
void expect(const Attention& of, const Gradients& g, int64_t b, int64_t h, int64_t tile, Soon& soon) {
    soon.add(of.rows(g.out, of.d_value, b, h, tile));
    soon.add(of.rows(g.grad_out, of.d_value, b, h, tile));
    soon.add(of.rows(of.q, of.d_head, b, h, tile));
    soon.add(of.rows(of.v, of.d_value, b, h, tile));
    soon.add(of.rows(of.k, of.d_head, b, h, tile));
}

// c += a^T b for a tile a of queries by keys, or over the visible pairs only.
void add_to_keys(const Attention& of, const Pairs& pairs, const float* a, const float* b, bool finite, float* c,
                 int64_t width, Soon& soon) {
    if (!finite) return visible_product(pairs, a, true, b, c, width);
    of.tiles.product({a, 1, tile_size, b, width, c, width, pairs.diagonal ? pairs.rows : tile_size, width, pairs.rows,
                      pairs.diagonal ? Part::terms_from_row : Part::all, true, &soon});
}

// Writes out[t] = scale * rows[r] of the tile.
void unpack(const Attention& of, int64_t b, int64_t h, int64_t tile, const float* rows, int64_t width, int64_t d,
            float scale, float* out) {
    float scales[tile_size];
    std::fill_n(scales, tile_size, scale);
    of.tiles.unpack(rows, width, scales, out + ((b * of.T + tile * tile_size) * of.H + h) * d, of.H * d, of.count(tile),
                    d);
}

// The tile's part of d_slope and d_null is added to them.
void attend_back(const Attention& of, const Gradients& g, int64_t b, int64_t h, int64_t tile, BackwardSpace& w,
                 double& d_slope, double& d_null) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(of.d_head));
    w.queries.set(of, b, tile);
    const int64_t rows = w.queries.rows;
    const Rows q = of.rows(of.q, of.d_head, b, h, tile);
    const Rows grad = of.rows(g.grad_out, of.d_value, b, h, tile), out = of.rows(g.out, of.d_value, b, h, tile);
    const bool finite_q = of.tiles.pack(q, scale, w.q.get(), of.head_width);
    const bool finite_grad = of.tiles.pack(grad, 1.0f, w.grad.get(), of.value_width);
    std::fill_n(w.d_q.get(), tile_size * of.head_width, 0.0f);
    std::fill_n(w.lse, tile_size, 0.0f);
    // A query that is out of the mask has no gradient: its row is zero already, and `out` may be anything there.
    of.tiles.dots(w.grad.get(), of.value_width, out, w.delta);
    for (int64_t r = 0; r < out.count; ++r) {
        w.lse[r] = g.lse[(b * of.H + h) * of.T + tile * tile_size + r];
        if (out.take_part(r)) d_null -= std::exp(of.null[h] - w.lse[r]) * w.delta[r];
    }

    for (int64_t i = w.queries.first_tile; i <= tile; ++i) {
        const Pairs pairs = w.queries.with(of, h, i, w.in_mask[i]);
        const Part part = pairs.diagonal ? Part::columns_to_row : Part::all;
        const float* keys = w.keys.get() + i * tile_size * of.head_width;
        of.tiles.product({w.q.get(), of.head_width, 1, w.key_columns.get() + i * of.head_width * tile_size, tile_size,
                          w.scores, tile_size, rows, tile_size, of.d_head, part, false, &w.soon});
        of.tiles.product({w.grad.get(), of.value_width, 1, w.value_columns.get() + i * of.value_width * tile_size,
                          tile_size, w.d_scores, tile_size, rows, tile_size, of.d_value, part, false, &w.soon});
        d_slope -= of.tiles.weigh_back(pairs, w.scores, w.d_scores, w.lse, w.delta);
        add_to_keys(of, pairs, w.scores, w.grad.get(), finite_grad, w.d_v.get() + i * tile_size * of.value_width,
                    of.value_width, w.soon);
        add_to_keys(of, pairs, w.d_scores, w.q.get(), finite_q, w.d_k.get() + i * tile_size * of.head_width,
                    of.head_width, w.soon);
        if (w.finite_keys[i]) {
            of.tiles.product({w.d_scores, tile_size, 1, keys, of.head_width, w.d_q.get(), of.head_width, rows,
                              of.head_width, tile_size, pairs.diagonal ? Part::terms_to_row : Part::all, true,
                              &w.soon});
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
        // Several heads in a row, so that a thread knows what it will read next; few, so that all threads stay busy.
        const int64_t piece = std::max<int64_t>(1, n_heads / (8 * int64_t{n_threads}));
        csae::parallel_for(n_heads, piece, n_threads, [&](int thread, int64_t begin, int64_t end) {
            csae::BackwardSpace& w = *spaces[thread];
            for (int64_t head = begin; head < end; ++head) {
                const int64_t b = head / of.H, h = head % of.H;
                for (int64_t tile = 0; tile < of.n_tiles; ++tile) {
                    const int64_t next_head = tile + 1 < of.n_tiles ? head : head + 1;
                    const int64_t next_tile = tile + 1 < of.n_tiles ? tile + 1 : 0;
                    w.soon = csae::Soon();
                    if (next_head < end) csae::expect(of, g, next_head / of.H, next_head % of.H, next_tile, w.soon);
                    csae::pack_keys(of, b, h, tile, w);
                    csae::attend_back(of, g, b, h, tile, w, slopes[head], nulls[head]);
                }
                for (int64_t tile = 0; tile < of.n_tiles; ++tile) {
                    const int64_t row = tile * csae::tile_size;
                    csae::unpack(of, b, h, tile, w.d_k.get() + row * of.head_width, of.head_width, of.d_head, 1.0f,
                                 d_k);
                    csae::unpack(of, b, h, tile, w.d_v.get() + row * of.value_width, of.value_width, of.d_value, 1.0f,
                                 d_v);
                }
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
