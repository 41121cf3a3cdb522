// One vector register of W floats. GCC and clang turn its arithmetic into the instructions of the function that it is
// inlined into.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace csae {

template <int W>
struct Register {
    typedef float Floats __attribute__((vector_size(W * sizeof(float))));
    typedef uint32_t Bits __attribute__((vector_size(W * sizeof(uint32_t))));
    Floats x;
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

}  // namespace csae
