#include "rows/adam_row.h"

#include <cmath>

#include "simd/isa.h"

namespace csae {
namespace {

// The least divisor of a row, so that a row of zeros stays zero.
constexpr float least_norm = 1e-12f;

template <int W>
CSAE_INLINE Register<W> square_root(const Register<W>& a) {
    Register<W> root;
    for (int l = 0; l < W; ++l) root.x[l] = __builtin_sqrtf(a.x[l]);
    return root;
}

template <int W>
CSAE_INLINE float total(const Register<W>& a) {
    float sum = 0;
    for (int l = 0; l < W; ++l) sum += a.x[l];
    return sum;
}

// lowbias32 of C. Wellons' hash-prospector.
template <class Bits>
CSAE_INLINE void mix(Bits& x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
}

// Stochastic rounding of moments to bfloat16: 16 random bits are added to the 16 that are cut off. The random bits are
// a hash of the step's seed and the element's index in the table.
template <int W>
struct RandomBits {
    Integers<W> place;
    uint32_t seed;

    inline __attribute__((always_inline)) RandomBits(uint32_t first_place, uint32_t seed_) : seed(seed_) {
        for (int l = 0; l < W; ++l) place.x[l] = first_place + static_cast<uint32_t>(l);
        mix(seed);
    }
    inline __attribute__((always_inline)) Integers<W> bits(int64_t c) const {
        Integers<W> x = {(place.x + static_cast<uint32_t>(c)) ^ seed};
        mix(x.x);
        x.x >>= 16;
        return x;
    }
};

template <int W>
CSAE_INLINE void store_moment(float* p, const Register<W>& moment, const RandomBits<W>&, int64_t) {
    store(p, moment);
}

template <int W>
CSAE_INLINE void store_moment(BFloat16* p, const Register<W>& moment, const RandomBits<W>& random, int64_t c) {
    store_rounded(p, moment, random.bits(c));
}

// Adds <a, b> of columns [c, end) to sum, W columns at a time; returns the first column that is left.
template <int W>
CSAE_INLINE int64_t dot(const float* a, const float* b, int64_t c, int64_t end, float& sum) {
    Register<W> sums[4] = {};
    for (; c + 4 * W <= end; c += 4 * W) {
        for (int r = 0; r < 4; ++r) sums[r].x += load<W>(a + c + r * W).x * load<W>(b + c + r * W).x;
    }
    for (; c + W <= end; c += W) sums[0].x += load<W>(a + c).x * load<W>(b + c).x;
    sum += total(Register<W>{(sums[0].x + sums[1].x) + (sums[2].x + sums[3].x)});
    return c;
}

template <int W>
CSAE_INLINE int64_t scale(float* a, int64_t c, int64_t end, float factor) {
    for (; c + W <= end; c += W) store(a + c, Register<W>{load<W>(a + c).x * factor});
    return c;
}

struct Row {
    float dot;      // <gradient, param>, to project the gradient; 0 if the row is not a unit row
    float squares;  // sum of squares of the updated row
};

template <int W, class M>
CSAE_INLINE int64_t update(const csae_adam& step, float* param, M* exp_avg, M* exp_avg_sq, const float* gradient,
                           int64_t c, int64_t end, uint32_t place, Row& row) {
    const RandomBits<W> first(place, step.seed), second(place, step.seed + 0x9E3779B9u);
    Register<W> squares = {};
    for (; c + W <= end; c += W) {
        Register<W> w = load<W>(param + c), m = load<W>(exp_avg + c), v = load<W>(exp_avg_sq + c);
        const Register<W> g = {load<W>(gradient + c).x - row.dot * w.x};
        m.x += (g.x - m.x) * step.one_minus_beta1;
        v.x = v.x * step.beta2 + g.x * g.x * step.one_minus_beta2;
        w.x -= step.step_size * m.x / (square_root(v).x * step.correction + step.eps);
        store_moment(exp_avg + c, m, first, c);
        store_moment(exp_avg_sq + c, v, second, c);
        store(param + c, w);
        squares.x += w.x * w.x;
    }
    row.squares += total(squares);
    return c;
}

template <int W, class M>
CSAE_INLINE void adam_row(const csae_adam& step, float* param, M* exp_avg, M* exp_avg_sq, const float* gradient,
                          int64_t d, uint32_t place, bool unit_row) {
    Row row = {0, 0};
    if (unit_row) dot<1>(gradient, param, dot<W>(gradient, param, 0, d, row.dot), d, row.dot);
    const int64_t rest = update<W>(step, param, exp_avg, exp_avg_sq, gradient, 0, d, place, row);
    update<1>(step, param, exp_avg, exp_avg_sq, gradient, rest, d, place, row);
    if (!unit_row) return;
    const float norm = std::sqrt(row.squares);
    const float factor = 1 / (norm < least_norm ? least_norm : norm);  // NaN if the norm is NaN
    scale<1>(param, scale<W>(param, 0, d, factor), d, factor);
}

#define CSAE_ADAM_ROW(NAME, TARGET, W)                                                                                 \
    template <class M>                                                                                                 \
    TARGET void NAME(const csae_adam& step, float* param, M* exp_avg, M* exp_avg_sq, const float* gradient, int64_t d, \
                     uint32_t place, bool unit_row) {                                                                  \
        adam_row<W>(step, param, exp_avg, exp_avg_sq, gradient, d, place, unit_row);                                   \
    }

CSAE_ADAM_ROW(portable, , 4)
#if CSAE_X86
CSAE_ADAM_ROW(avx2, CSAE_AVX2, 8)
CSAE_ADAM_ROW(avx512, CSAE_AVX512, 16)
#endif

}  // namespace

template <class M>
AdamRow<M> adam_row() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return avx512<M>;
    if (current_isa() == Isa::avx2) return avx2<M>;
#endif
    return portable<M>;
}

template AdamRow<float> adam_row();
template AdamRow<BFloat16> adam_row();

}  // namespace csae
