#include "attention/attention_tiles.h"

#include <limits>

#include "simd/exponential.h"
#include "simd/isa.h"
#include "simd/register.h"

namespace csae {
namespace {

// Rows that are prefetched ahead while packing, and cache lines while a block of a product is computed. With more, the
// prefetches wait for each other.
constexpr int64_t rows_ahead = 12, lines_of_block = 8;

template <int W>
CSAE_INLINE void scale_row(const float* row, int64_t d, float scale, float* to) {
    int64_t c = 0;
    for (; c + W <= d; c += W) store<W>(to + c, {scale * load<W>(row + c).x});
    if constexpr (W > 1) scale_row<W / 2>(row + c, d - c, scale, to + c);
}

template <int W>
CSAE_INLINE bool all_finite(const float* x, int64_t n) {
    Integers<W> any = {};
    // The addition carries into the sign bit only if the exponent is all ones: NaN or infinity.
    for (int64_t i = 0; i < n; i += W) any.x |= (bits_of(load<W>(x + i)).x & 0x7FFFFFFFu) + 0x00800000u;
    uint32_t bits = 0;
    for (int l = 0; l < W; ++l) bits |= any.x[l];
    return bits >> 31 == 0;
}

// The hardware does not prefetch these rows, because each is often on another page.
CSAE_INLINE void fetch_row(const Rows& rows, int64_t r) {
    if (r >= rows.count) return;
    for (int64_t c = 0; c < rows.d; c += 16) __builtin_prefetch(rows.x + r * rows.stride + c);
}

template <int W>
CSAE_INLINE bool pack(const Rows& from, float scale, float* to, int64_t width) {
    for (int64_t r = 0; r < tile_size; ++r) {
        fetch_row(from, r + rows_ahead);
        const int64_t d = from.take_part(r) ? from.d : 0;
        scale_row<W>(from.x + r * from.stride, d, scale, to + r * width);
        for (int64_t c = d; c < width; ++c) to[r * width + c] = 0.0f;
    }
    return all_finite<W>(to, tile_size * width);
}

template <int W>
CSAE_INLINE void unpack(const float* rows, int64_t width, const float* scale, float* to, int64_t stride, int64_t count,
                        int64_t d) {
    for (int64_t r = 0; r < count; ++r) {
        fetch_row({to, stride, count, d, nullptr}, r + rows_ahead);
        scale_row<W>(rows + r * width, d, scale[r], to + r * stride);
    }
}

// W rows and columns of `from`, transposed: x[i] is column c + i. One round interleaves the first half of the rows with
// the second half. That rotates the bits of the index (row, column) by one place, so log2(W) rounds exchange row and
// column.
template <int W>
CSAE_INLINE void load_transposed(const Rows& from, int64_t r, int64_t c, Register<W>* x) {
    for (int i = 0; i < W; ++i) {
        x[i] = Register<W>{};
        if (!from.take_part(r + i)) continue;
        const float* row = from.x + (r + i) * from.stride + c;
        if (c + W <= from.d) {
            x[i] = load<W>(row);
        } else {
            std::memcpy(&x[i].x, row, static_cast<size_t>(from.d - c) * sizeof(float));
        }
    }
    for (int bit = 1; bit < W; bit *= 2) {
        Register<W> mixed[W];
        for (int i = 0; i < W / 2; ++i) {
            mixed[2 * i] = interleave<W, 0>(x[i], x[i + W / 2]);
            mixed[2 * i + 1] = interleave<W, W / 2>(x[i], x[i + W / 2]);
        }
        for (int i = 0; i < W; ++i) x[i] = mixed[i];
    }
}

template <int W>
CSAE_INLINE void transpose(const Rows& from, float* to) {
    for (int64_t r = 0; r < tile_size; r += W) {
        for (int i = 0; i < W; ++i) fetch_row(from, r + W + i);
        for (int64_t c = 0; c < from.d; c += W) {
            Register<W> columns[W];
            load_transposed<W>(from, r, c, columns);
            for (int i = 0; i < W; ++i) store<W>(to + (c + i) * tile_size + r, columns[i]);
        }
    }
}

template <int W>
CSAE_INLINE void dots(const float* a, int64_t width, const Rows& b, float* delta) {
    for (int64_t r = 0; r < tile_size; r += W) {
        for (int i = 0; i < W; ++i) fetch_row(b, r + W + i);
        Register<W> sum = {};
        for (int64_t c = 0; c < b.d; c += W) {
            Register<W> columns_a[W], columns_b[W];
            load_transposed<W>({a, width, tile_size, width, nullptr}, r, c, columns_a);
            load_transposed<W>(b, r, c, columns_b);
            for (int i = 0; i < W; ++i) sum.x += columns_a[i].x * columns_b[i].x;
        }
        store<W>(delta + r, sum);
    }
}

template <int W>
CSAE_INLINE float largest_of(const Register<W>& r) {
    if constexpr (W == 1) {
        return r.x[0];
    } else {
        Register<W / 2> low, high;
        std::memcpy(&low.x, &r.x, sizeof low.x);
        std::memcpy(&high.x, reinterpret_cast<const char*>(&r.x) + sizeof low.x, sizeof high.x);
        return largest_of<W / 2>({low.x > high.x ? low.x : high.x});
    }
}

template <int W>
CSAE_INLINE int64_t diagonal_columns(int64_t row) {
    return round_up(row / row_group * row_group + row_group, W);
}

// R rows and V registers of columns of a product, with the sums in registers.
template <int W, int R, int V>
CSAE_INLINE void product_block(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                               int64_t c_row, int64_t p, bool add) {
    Register<W> sum[R][V] = {};
    if (add) {
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) sum[r][v] = load<W>(c + r * c_row + v * W);
        }
    }
    for (int64_t i = 0; i < p; ++i, a += a_column, b += b_row) {
        Register<W> row[V];
        for (int v = 0; v < V; ++v) row[v] = load<W>(b + v * W);
        for (int r = 0; r < R; ++r) {
            const float factor = a[r * a_row];
            for (int v = 0; v < V; ++v) sum[r][v].x += factor * row[v].x;
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store<W>(c + r * c_row + v * W, sum[r][v]);
    }
}

template <int W, int R>
CSAE_INLINE void product(const Product& task) {
    static_assert(row_group % R == 0, "a block of rows is within a group");
    for (int64_t m = 0; m < task.m; m += R) {
        const int64_t group = m / row_group * row_group;
        const int64_t n = task.part == Part::columns_to_row ? diagonal_columns<W>(m) : task.n;
        const int64_t from = task.part == Part::terms_from_row ? group : 0;
        const int64_t to = task.part == Part::terms_to_row ? group + row_group : task.p;
        const float* a = task.a + m * task.a_row + from * task.a_column;
        const float* b = task.b + from * task.b_row;
        float* c = task.c + m * task.c_row;
        int64_t column = 0;
        for (; column + 2 * W <= n; column += 2 * W) {
            if (task.prefetch != nullptr) task.prefetch->fetch(lines_of_block);
            product_block<W, R, 2>(a, task.a_row, task.a_column, b + column, task.b_row, c + column, task.c_row,
                                   to - from, task.add);
        }
        for (; column < n; column += W) {
            product_block<W, R, 1>(a, task.a_row, task.a_column, b + column, task.b_row, c + column, task.c_row,
                                   to - from, task.add);
        }
    }
}

// Keeps x in the lanes of columns [c, c + W) that row r sees, and replaces the others by `hidden`. It selects by a
// single comparison of floats, because GCC 12 compiles a comparison of integers, and `&` of two comparisons, lane by
// lane.
template <int W>
CSAE_INLINE void hide(const Pairs& pairs, int64_t r, int64_t c, const Register<W>& hidden, Register<W>& x) {
    Register<W> column;
    for (int l = 0; l < W; ++l) column.x[l] = static_cast<float>(l);
    column.x += static_cast<float>(c);
    // Each of since_first, to_last and key is negative if it hides the column.
    const Register<W> since_first = {column.x - pairs.first[r]}, to_last = {pairs.last[r] - column.x};
    const Register<W> within = {since_first.x < to_last.x ? since_first.x : to_last.x};
    const Register<W> key = load<W>(pairs.out_of_mask + c);
    const Register<W> seen = {within.x < key.x ? within.x : key.x};
    x.x = seen.x >= Register<W>{}.x ? x.x : hidden.x;
}

// Replaces <q, k> by the scores. largest_of_row[r] = the larger of maximum[r] and the row's scores.
template <int W>
CSAE_INLINE void make_scores(const Pairs& pairs, float* scores, const float* maximum, float* largest_of_row) {
    const Register<W> hidden = broadcast<W>(-std::numeric_limits<float>::infinity());
    for (int64_t r = 0; r < pairs.rows; ++r) {
        const int64_t columns = pairs.diagonal ? diagonal_columns<W>(r) : tile_size;
        float* row = scores + r * tile_size;
        Register<W> largest = broadcast<W>(maximum[r]);
        for (int64_t c = 0; c < columns; c += W) {
            Register<W> score = {load<W>(row + c).x - pairs.slope * load<W>(pairs.logs - r + c).x};
            if (!pairs.open) hide<W>(pairs, r, c, hidden, score);
            store<W>(row + c, score);
            largest.x = score.x > largest.x ? score.x : largest.x;
        }
        largest_of_row[r] = largest_of<W>(largest);
    }
}

template <int W>
CSAE_INLINE void weigh(const Pairs& pairs, float* scores, float* maximum, float* sum, float* out, int64_t width) {
    const Register<W> lowest = broadcast<W>(-std::numeric_limits<float>::infinity());
    const Register<W> zero = {};
    float now[tile_size] = {}, origin[tile_size], shrink[tile_size];
    make_scores<W>(pairs, scores, maximum, now);
    for (int64_t r = 0; r < pairs.rows; r += W) {
        const Register<W> largest = load<W>(now + r), before = load<W>(maximum + r);
        // If nothing is visible and null is -inf, subtract 0: exp(-inf - 0) is 0, and exp(-inf + inf) would be NaN.
        const Register<W> from = {largest.x == lowest.x ? zero.x : largest.x};
        store<W>(origin + r, from);
        // An unchanged maximum gives 1 even if it is infinite, where exp(inf - inf) would be NaN.
        store<W>(shrink + r, {before.x == largest.x ? broadcast<W>(1.0f).x : exp_of<W>({before.x - from.x}).x});
        store<W>(maximum + r, largest);
    }
    for (int64_t r = 0; r < pairs.rows; ++r) {
        const int64_t columns = pairs.diagonal ? diagonal_columns<W>(r) : tile_size;
        float *row = scores + r * tile_size, *to = out + r * width;
        Register<W> total = {load<W>(sum + r * W).x * shrink[r]};
        if (shrink[r] != 1.0f) {
            for (int64_t c = 0; c < width; c += W) store<W>(to + c, {load<W>(to + c).x * shrink[r]});
        }
        for (int64_t c = 0; c < columns; c += W) {
            const Register<W> weight = exp_of<W>({load<W>(row + c).x - origin[r]});
            store<W>(row + c, weight);
            total.x += weight.x;
        }
        store<W>(sum + r * W, total);
    }
}

template <int W>
CSAE_INLINE float weigh_back(const Pairs& pairs, float* scores, float* d_weights, const float* lse,
                             const float* delta) {
    const Register<W> none = {};
    Register<W> total = {};
    for (int64_t r = 0; r < pairs.rows; ++r) {
        const int64_t columns = pairs.diagonal ? diagonal_columns<W>(r) : tile_size;
        float *row = scores + r * tile_size, *d_row = d_weights + r * tile_size;
        for (int64_t c = 0; c < columns; c += W) {
            const Register<W> log = load<W>(pairs.logs - r + c);
            // In the same order as in `weigh`, so that it rounds alike: a large score's rounding error changes its
            // weight.
            const Register<W> score = {load<W>(row + c).x - pairs.slope * log.x};
            Register<W> weight = exp_of<W>({score.x - lse[r]});
            Register<W> d_score = {weight.x * (load<W>(d_row + c).x - delta[r])};
            if (!pairs.open) {
                hide<W>(pairs, r, c, none, weight);
                hide<W>(pairs, r, c, none, d_score);
            }
            store<W>(row + c, weight);
            store<W>(d_row + c, d_score);
            total.x += d_score.x * log.x;
        }
    }
    float sum = 0;
    for (int l = 0; l < W; ++l) sum += total.x[l];
    return sum;
}

#define CSAE_ATTENTION_TILES(NAME, TARGET, W, R)                                                               \
    TARGET bool pack_##NAME(const Rows& from, float scale, float* to, int64_t width) {                         \
        return pack<W>(from, scale, to, width);                                                                \
    }                                                                                                          \
    TARGET void transpose_##NAME(const Rows& from, float* to) { transpose<W>(from, to); }                      \
    TARGET void unpack_##NAME(const float* rows, int64_t width, const float* scale, float* to, int64_t stride, \
                              int64_t count, int64_t d) {                                                      \
        unpack<W>(rows, width, scale, to, stride, count, d);                                                   \
    }                                                                                                          \
    TARGET void product_##NAME(const Product& task) { product<W, R>(task); }                                   \
    TARGET void weigh_##NAME(const Pairs& pairs, float* scores, float* maximum, float* sum, float* out,        \
                             int64_t width) {                                                                  \
        weigh<W>(pairs, scores, maximum, sum, out, width);                                                     \
    }                                                                                                          \
    TARGET void dots_##NAME(const float* a, int64_t width, const Rows& b, float* delta) {                      \
        dots<W>(a, width, b, delta);                                                                           \
    }                                                                                                          \
    TARGET float weigh_back_##NAME(const Pairs& pairs, float* scores, float* d_weights, const float* lse,      \
                                   const float* delta) {                                                       \
        return weigh_back<W>(pairs, scores, d_weights, lse, delta);                                            \
    }                                                                                                          \
    constexpr AttentionTiles                                                                                   \
        NAME = {W,           pack_##NAME,      transpose_##NAME, unpack_##NAME, product_##NAME, weigh_##NAME,  \
                dots_##NAME, weigh_back_##NAME};

CSAE_ATTENTION_TILES(portable, , 4, 4)
#if CSAE_X86
CSAE_ATTENTION_TILES(avx2, CSAE_AVX2, 8, 4)
CSAE_ATTENTION_TILES(avx512, CSAE_AVX512, 16, 8)
#endif

}  // namespace

const AttentionTiles& attention_tiles() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return avx512;
    if (current_isa() == Isa::avx2) return avx2;
#endif
    return portable;
}

}  // namespace csae
