// e^x of a register of floats.
#pragma once

#include "simd/register.h"

namespace csae {

template <int W>
CSAE_INLINE Register<W> broadcast(float x) {
    return {x - typename Register<W>::Floats{}};  // not +, which would turn -0.0 into 0.0
}

// e^x = 2^n e^r to 2 ulp, with the Taylor series of degree 7 for e^r, |r| <= log(2) / 2. Zero below -87, where float32
// would become denormal; infinity above 88.7; NaN stays NaN.
template <int W>
CSAE_INLINE Register<W> exp_of(const Register<W>& given) {
    typedef typename Register<W>::Floats Floats;
    typedef typename Register<W>::Bits Bits;
    const Floats high = broadcast<W>(89.0f).x;
    const Floats x = given.x > high ? high : given.x;
    // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
    const Floats shifted = x * 1.44269504f + 12582912.0f;
    const Floats n = shifted - 12582912.0f;
    // log(2) in two parts; the first has few bits, so that its product with n is exact (Cody and Waite).
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const Bits power = ((Bits)shifted + 127) << 23;
    return {given.x < -87.0f ? Floats{} : series * (Floats)power};
}

}  // namespace csae
