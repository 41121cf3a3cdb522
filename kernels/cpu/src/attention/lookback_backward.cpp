// The gradients of look-back attention. The weights are recomputed from lse, the log of the softmax's denominator.
//
// With w(t, j) = exp(score(t, j) - lse_t), w(t, null) = exp(null - lse_t), delta_t = <out_t, grad_t> and
// ds(t, j) = w(t, j) (<grad_t, v_j> - delta_t):
//     dq_t = scale sum_j ds(t, j) k_j;  dk_j = scale sum_t ds(t, j) q_t;  dv_j = sum_t w(t, j) grad_t;
//     dslope = -sum ds(t, j) log(t - j);  dnull = -sum_t w(t, null) delta_t
// One thread does a whole head, so the order of each sum is fixed.
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

// A thread's workspace: one window and head, and the current tile.
struct BackwardSpace {
    AlignedFloats keys;           // [n_tiles, 64, head_width]
    AlignedFloats key_columns;    // [n_tiles, head_width, 64]
    AlignedFloats value_columns;  // [n_tiles, value_width, 64]
    std::unique_ptr<bool[]> finite_keys;
    std::unique_ptr<TileOfKeys[]> in_mask;
    AlignedFloats d_k;   // [n_tiles, 64, head_width]
    AlignedFloats d_v;   // [n_tiles, 64, value_width]
    AlignedFloats q;     // [64, head_width], times scale
    AlignedFloats d_q;   // [64, head_width]
    AlignedFloats grad;  // [64, value_width]
    alignas(64) float scores[tile_size * tile_size], d_scores[tile_size * tile_size];
    float lse[tile_size], delta[tile_size];
    TileOfQueries queries;
    PrefetchQueue prefetch;

    explicit BackwardSpace(const Attention& attention)
        : keys(attention.n_tiles * tile_size * attention.head_width),
          key_columns(attention.n_tiles * attention.head_width * tile_size),
          value_columns(attention.n_tiles * attention.value_width * tile_size),
          finite_keys(new bool[attention.n_tiles]),
          in_mask(new TileOfKeys[attention.n_tiles]),
          d_k(attention.n_tiles * tile_size * attention.head_width),
          d_v(attention.n_tiles * tile_size * attention.value_width),
          q(tile_size * attention.head_width),
          d_q(tile_size * attention.head_width),
          grad(tile_size * attention.value_width) {}
};

void pack_keys(const Attention& attention, int64_t b, int64_t h, int64_t tile, BackwardSpace& space) {
    const Rows keys = attention.rows(attention.k, attention.d_head, b, h, tile),
               values = attention.rows(attention.v, attention.d_value, b, h, tile);
    space.in_mask[tile].set(attention, b, tile);
    space.finite_keys[tile] = attention.tiles.pack(
        keys, 1.0f, space.keys.get() + tile * tile_size * attention.head_width, attention.head_width);
    attention.tiles.transpose(keys, space.key_columns.get() + tile * attention.head_width * tile_size);
    attention.tiles.transpose(values, space.value_columns.get() + tile * attention.value_width * tile_size);
    std::fill_n(space.d_k.get() + tile * tile_size * attention.head_width, tile_size * attention.head_width, 0.0f);
    std::fill_n(space.d_v.get() + tile * tile_size * attention.value_width, tile_size * attention.value_width, 0.0f);
}

// Queues all rows that the tile reads. What is read first is added last.
void queue_tile(const Attention& attention, const Gradients& grads, int64_t b, int64_t h, int64_t tile,
                PrefetchQueue& prefetch) {
    prefetch.add(attention.rows(grads.out, attention.d_value, b, h, tile));
    prefetch.add(attention.rows(grads.grad_out, attention.d_value, b, h, tile));
    prefetch.add(attention.rows(attention.q, attention.d_head, b, h, tile));
    prefetch.add(attention.rows(attention.v, attention.d_value, b, h, tile));
    prefetch.add(attention.rows(attention.k, attention.d_head, b, h, tile));
}

// c += a^T b for a tile a of queries by keys; over visible pairs only if b is not finite.
void add_to_keys(const Attention& attention, const Pairs& pairs, const float* a, const float* b, bool finite, float* c,
                 int64_t width, PrefetchQueue& prefetch) {
    if (!finite) return visible_product(pairs, a, true, b, c, width);
    attention.tiles.product({a, 1, tile_size, b, width, c, width, pairs.diagonal ? pairs.rows : tile_size, width,
                             pairs.rows, pairs.diagonal ? Part::terms_from_row : Part::all, true, &prefetch});
}

// Writes out[t] = scale * rows[r] for the rows of the tile.
void unpack(const Attention& attention, int64_t b, int64_t h, int64_t tile, const float* rows, int64_t width, int64_t d,
            float scale, float* out) {
    float scales[tile_size];
    std::fill_n(scales, tile_size, scale);
    attention.tiles.unpack(rows, width, scales, out + ((b * attention.T + tile * tile_size) * attention.H + h) * d,
                           attention.H * d, attention.count(tile), d);
}

// Backward for one tile of queries. Adds its terms to d_slope and d_null.
void attend_back(const Attention& attention, const Gradients& grads, int64_t b, int64_t h, int64_t tile,
                 BackwardSpace& space, double& d_slope, double& d_null) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(attention.d_head));
    space.queries.set(attention, b, tile);
    const int64_t rows = space.queries.rows;
    const Rows q = attention.rows(attention.q, attention.d_head, b, h, tile);
    const Rows grad = attention.rows(grads.grad_out, attention.d_value, b, h, tile),
               out = attention.rows(grads.out, attention.d_value, b, h, tile);
    const bool finite_q = attention.tiles.pack(q, scale, space.q.get(), attention.head_width);
    const bool finite_grad = attention.tiles.pack(grad, 1.0f, space.grad.get(), attention.value_width);
    std::fill_n(space.d_q.get(), tile_size * attention.head_width, 0.0f);
    std::fill_n(space.lse, tile_size, 0.0f);
    // A masked query's row of space.grad is zero, so its delta is 0 whatever `out` holds there.
    attention.tiles.dots(space.grad.get(), attention.value_width, out, space.delta);
    for (int64_t r = 0; r < out.count; ++r) {
        space.lse[r] = grads.lse[(b * attention.H + h) * attention.T + tile * tile_size + r];
        if (out.take_part(r)) d_null -= std::exp(attention.null[h] - space.lse[r]) * space.delta[r];
    }

    for (int64_t i = space.queries.first_tile; i <= tile; ++i) {
        const Pairs pairs = space.queries.with(attention, h, i, space.in_mask[i]);
        const Part part = pairs.diagonal ? Part::columns_to_row : Part::all;
        const float* keys = space.keys.get() + i * tile_size * attention.head_width;
        attention.tiles.product(
            {space.q.get(), attention.head_width, 1, space.key_columns.get() + i * attention.head_width * tile_size,
             tile_size, space.scores, tile_size, rows, tile_size, attention.d_head, part, false, &space.prefetch});
        attention.tiles.product({space.grad.get(), attention.value_width, 1,
                                 space.value_columns.get() + i * attention.value_width * tile_size, tile_size,
                                 space.d_scores, tile_size, rows, tile_size, attention.d_value, part, false,
                                 &space.prefetch});
        d_slope -= attention.tiles.weigh_back(pairs, space.scores, space.d_scores, space.lse, space.delta);
        add_to_keys(attention, pairs, space.scores, space.grad.get(), finite_grad,
                    space.d_v.get() + i * tile_size * attention.value_width, attention.value_width, space.prefetch);
        add_to_keys(attention, pairs, space.d_scores, space.q.get(), finite_q,
                    space.d_k.get() + i * tile_size * attention.head_width, attention.head_width, space.prefetch);
        if (space.finite_keys[i]) {
            attention.tiles.product({space.d_scores, tile_size, 1, keys, attention.head_width, space.d_q.get(),
                                     attention.head_width, rows, attention.head_width, tile_size,
                                     pairs.diagonal ? Part::terms_to_row : Part::all, true, &space.prefetch});
        } else {
            visible_product(pairs, space.d_scores, false, keys, space.d_q.get(), attention.head_width);
        }
    }
    unpack(attention, b, h, tile, space.d_q.get(), attention.head_width, attention.d_head, scale, grads.d_q);
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
        const csae::Attention attention(*given);
        const csae::Gradients grads = {
            csae::zero_strides_if_null(*grad_out), csae::zero_strides_if_null(*out), lse, d_q, d_k, d_v};
        const std::unique_ptr<double[]> slopes(new double[static_cast<size_t>(n_heads)]());
        const std::unique_ptr<double[]> nulls(new double[static_cast<size_t>(n_heads)]());
        const int64_t n_spaces = std::min<int64_t>(n_threads, n_heads);
        std::unique_ptr<std::unique_ptr<csae::BackwardSpace>[]> spaces(
            new std::unique_ptr<csae::BackwardSpace>[static_cast<size_t>(n_spaces)]);
        for (int64_t i = 0; i < n_spaces; ++i) spaces[i].reset(new csae::BackwardSpace(attention));
        // Several heads a piece, so that a thread can prefetch the next; not many, so that all threads stay busy.
        const int64_t piece = std::max<int64_t>(1, n_heads / (8 * int64_t{n_threads}));
        csae::parallel_for(n_heads, piece, n_threads, [&](int thread, int64_t begin, int64_t end) {
            csae::BackwardSpace& space = *spaces[thread];
            for (int64_t head = begin; head < end; ++head) {
                const int64_t b = head / attention.H, h = head % attention.H;
                for (int64_t tile = 0; tile < attention.n_tiles; ++tile) {
                    const int64_t next_head = tile + 1 < attention.n_tiles ? head : head + 1;
                    const int64_t next_tile = tile + 1 < attention.n_tiles ? tile + 1 : 0;
                    space.prefetch = csae::PrefetchQueue();
                    if (next_head < end)
                        csae::queue_tile(attention, grads, next_head / attention.H, next_head % attention.H, next_tile,
                                         space.prefetch);
                    csae::pack_keys(attention, b, h, tile, space);
                    csae::attend_back(attention, grads, b, h, tile, space, slopes[head], nulls[head]);
                }
                for (int64_t tile = 0; tile < attention.n_tiles; ++tile) {
                    const int64_t row = tile * csae::tile_size;
                    csae::unpack(attention, b, h, tile, space.d_k.get() + row * attention.head_width,
                                 attention.head_width, attention.d_head, 1.0f, d_k);
                    csae::unpack(attention, b, h, tile, space.d_v.get() + row * attention.value_width,
                                 attention.value_width, attention.d_value, 1.0f, d_v);
                }
            }
        });
        for (int64_t h = 0; h < attention.H; ++h) {
            double slope = 0, null = 0;
            for (int64_t b = 0; b < attention.B; ++b) {
                slope += slopes[b * attention.H + h];
                null += nulls[b * attention.H + h];
            }
            d_slope[h] = static_cast<float>(slope);
            d_null[h] = static_cast<float>(null);
        }
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
