// Rows of floats as bfloat16, how long each is, and how long what the rounding took from it.
//
// Reads each float once. Sums are in float, 16 or fewer lanes, which is off by less than one part in 2^10; squares
// below 2^-126 may be lost.
#include <algorithm>
#include <cmath>

#include "csae_cpu.h"
#include "isa.h"
#include "parallel.h"
#include "register.h"

namespace csae {
namespace {

template <int W>
CSAE_INLINE void round_row(const float* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    Register<W> squares = {}, differences = {};
    int64_t c = 0;
    for (; c + W <= d; c += W) {
        const Register<W> x = load<W>(row + c);
        store(rounded + c, x);
        const auto difference = x.x - load<W>(rounded + c).x;
        squares.x += x.x * x.x;
        differences.x += difference * difference;
    }
    float square = 0, difference = 0;
    for (int l = 0; l < W; ++l) {
        square += squares.x[l];
        difference += differences.x[l];
    }
    for (; c < d; ++c) {
        const Register<1> x = load<1>(row + c);
        store(rounded + c, x);
        const float here = x.x[0] - load<1>(rounded + c).x[0];
        square += x.x[0] * x.x[0];
        difference += here * here;
    }
    length = std::sqrt(square);
    error = std::sqrt(difference);
}

using RoundRow = void (*)(const float*, int64_t, BFloat16*, float&, float&);

void round_portable(const float* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    round_row<4>(row, d, rounded, length, error);
}

#if CSAE_X86
CSAE_AVX2 void round_avx2(const float* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    round_row<8>(row, d, rounded, length, error);
}

CSAE_AVX512 void round_avx512(const float* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    round_row<16>(row, d, rounded, length, error);
}
#endif

RoundRow round_here() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return round_avx512;
    if (current_isa() == Isa::avx2) return round_avx2;
#endif
    return round_portable;
}

}  // namespace
}  // namespace csae

int csae_round_rows(const float* rows, int64_t rows_stride, int64_t n, int64_t d, void* rounded,
                    int64_t rounded_stride, float* lengths, float* errors, int n_threads) {
    if (n < 0 || d < 0 || rows_stride < 0 || n_threads < 1 || (n > 1 && rounded_stride < d)) return csae_bad_argument;
    if (n == 0) return csae_ok;
    if (lengths == nullptr || errors == nullptr) return csae_bad_argument;
    if (d > 0 && (rows == nullptr || rounded == nullptr)) return csae_bad_argument;
    if (d == 0) rows_stride = rounded_stride = 0;
    const csae::RoundRow round = csae::round_here();
    auto* out = static_cast<csae::BFloat16*>(rounded);
    const int64_t piece = std::max<int64_t>(1, 16384 / (d + 1));
    csae::parallel_for(n, piece, n_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            round(rows + i * rows_stride, d, out + i * rounded_stride, lengths[i], errors[i]);
        }
    });
    return csae_ok;
}
