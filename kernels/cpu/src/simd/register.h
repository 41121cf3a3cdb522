// A vector register of W floats, in GCC's vector extensions. GCC and clang compile its arithmetic to the instruction
// set of the function that it is inlined into. Loads and stores convert from and to bfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "simd/isa.h"

namespace csae {

// bfloat16: the upper 16 bits of a float.
struct BFloat16 {
    uint16_t bits;
};

template <int W>
struct Register {
    typedef float Floats __attribute__((vector_size(W * sizeof(float))));
    typedef uint32_t Bits __attribute__((vector_size(W * sizeof(uint32_t))));
    Floats x;
};

// The same register as integers.
template <int W>
struct Integers {
    typedef uint32_t Bits __attribute__((vector_size(W * sizeof(uint32_t))));
    typedef uint16_t Halves __attribute__((vector_size(W * sizeof(uint16_t))));
    Bits x;
};

template <int W>
CSAE_INLINE Register<W> load(const float* p) {
    Register<W> r;
    std::memcpy(&r.x, p, sizeof r.x);
    return r;
}

template <int W>
CSAE_INLINE void store(float* p, const Register<W>& r) {
    std::memcpy(p, &r.x, sizeof r.x);
}

template <int W>
CSAE_INLINE Integers<W> bits_of(const Register<W>& r) {
    Integers<W> bits;
    std::memcpy(&bits.x, &r.x, sizeof bits.x);
    return bits;
}

template <int W>
CSAE_INLINE Register<W> from_bits(const Integers<W>& bits) {
    Register<W> r;
    std::memcpy(&r.x, &bits.x, sizeof r.x);
    return r;
}

// a[first], b[first], a[first + 1], b[first + 1], and so on.
template <int W, int first, int... L>
CSAE_INLINE Register<W> interleave(const Register<W>& a, const Register<W>& b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
    return {__builtin_shufflevector(a.x, b.x, (first + L / 2 + L % 2 * W)...)};
#else
    return {__builtin_shuffle(a.x, b.x, typename Register<W>::Bits{(first + L / 2 + L % 2 * W)...})};
#endif
}

template <int W, int first>
CSAE_INLINE Register<W> interleave(const Register<W>& a, const Register<W>& b) {
    return interleave<W, first>(a, b, std::make_integer_sequence<int, W>{});
}

template <int W>
CSAE_INLINE Register<W> load(const BFloat16* p) {
    typename Integers<W>::Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return from_bits(Integers<W>{__builtin_convertvector(halves, typename Integers<W>::Bits) << 16});
}

// As bfloat16, with rounding bits: `below` is added to the lower 16 bits before they are cut off. A NaN stays a NaN.
template <int W>
CSAE_INLINE void store_rounded(BFloat16* p, const Register<W>& r, const Integers<W>& below) {
    using Bits = typename Integers<W>::Bits;
    const Bits bits = bits_of(r).x;
    const Bits nan = (Bits)((bits & 0x7FFFFFFFu) > 0x7F800000u);
    const Bits rounded = (((bits + below.x) >> 16) & ~nan) | (0x7FC0u & nan);
    const auto halves = __builtin_convertvector(rounded, typename Integers<W>::Halves);
    std::memcpy(p, &halves, sizeof halves);
}

// As bfloat16, rounded to the nearest, ties to even.
template <int W>
CSAE_INLINE void store(BFloat16* p, const Register<W>& r) {
    store_rounded(p, r, Integers<W>{0x7FFFu + ((bits_of(r).x >> 16) & 1u)});
}

template <int W>
CSAE_INLINE float dot(const float* a, const float* b, int64_t d) {
    Register<W> sum = {};
    int64_t c = 0;
    for (; c + W <= d; c += W) sum.x += load<W>(a + c).x * load<W>(b + c).x;
    float total = 0;
    for (int l = 0; l < W; ++l) total += sum.x[l];
    for (; c < d; ++c) total += a[c] * b[c];
    return total;
}

}  // namespace csae
