// Rows rounded to bfloat16, the norms of rows and of rounding errors; in rows, or in the paired layout of AMX.
//
// Reads each number once. Norms are summed in float, in 16 lanes or fewer, with a relative error below 2^-10; squares
// below 2^-126 may be lost.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "csae_cpu.h"
#include "parallel.h"
#include "simd/isa.h"
#include "simd/register.h"

namespace csae {
namespace {

template <int W, class T>
CSAE_INLINE void round_row(const T* row, int64_t d, BFloat16* rounded, float& length, float& error) {
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

template <class T>
using RoundRow = void (*)(const T*, int64_t, BFloat16*, float&, float&);

template <class T>
void round_portable(const T* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    round_row<4>(row, d, rounded, length, error);
}

#if CSAE_X86
template <class T>
CSAE_AVX2 void round_avx2(const T* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    round_row<8>(row, d, rounded, length, error);
}

template <class T>
CSAE_AVX512 void round_avx512(const T* row, int64_t d, BFloat16* rounded, float& length, float& error) {
    round_row<16>(row, d, rounded, length, error);
}
#endif

template <class T>
RoundRow<T> round_here() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return round_avx512<T>;
    if (current_isa() == Isa::avx2) return round_avx2<T>;
#endif
    return round_portable<T>;
}

// Rows of a block in the paired layout.
constexpr int64_t block_rows = 16;

// rows [16, width] -> pairs [width / 2, 16, 2]
void pair_up(const BFloat16* rows, int64_t width, BFloat16* pairs) {
    for (int64_t p = 0; p < width / 2; ++p) {
        for (int64_t r = 0; r < block_rows; ++r) {
            std::memcpy(pairs + 2 * (p * block_rows + r), rows + r * width + 2 * p, 2 * sizeof(BFloat16));
        }
    }
}

}  // namespace
}  // namespace csae

int csae_round_rows(const float* rows, int64_t rows_stride, int64_t n, int64_t d, void* rounded, int64_t rounded_stride,
                    float* lengths, float* errors, int n_threads) {
    if (n < 0 || d < 0 || rows_stride < 0 || n_threads < 1 || (n > 1 && rounded_stride < d)) return csae_bad_argument;
    if (n == 0) return csae_ok;
    if (lengths == nullptr || errors == nullptr) return csae_bad_argument;
    if (d > 0 && (rows == nullptr || rounded == nullptr)) return csae_bad_argument;
    if (d == 0) rows_stride = rounded_stride = 0;
    const csae::RoundRow<float> round = csae::round_here<float>();
    auto* out = static_cast<csae::BFloat16*>(rounded);
    const int64_t piece = std::max<int64_t>(1, 16384 / (d + 1));
    csae::parallel_for(n, piece, n_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            round(rows + i * rows_stride, d, out + i * rounded_stride, lengths[i], errors[i]);
        }
    });
    return csae_ok;
}

int csae_round_pairs(const void* rows, int64_t rows_stride, int64_t n, int64_t d, int type, const void* bias,
                     float unseen, float above, int64_t width, void* pairs, float* lengths, int n_threads) {
    if (n < 0 || d < 0 || rows_stride < 0 || n_threads < 1) return csae_bad_argument;
    if (width < d + 4 || width % 2 != 0 || (type != csae_float32 && type != csae_bfloat16)) return csae_bad_argument;
    if (n == 0) return csae_ok;
    if ((d > 0 && rows == nullptr) || bias == nullptr || pairs == nullptr || lengths == nullptr)
        return csae_bad_argument;
    using csae::BFloat16;
    using csae::block_rows;
    const int64_t n_blocks = (n + block_rows - 1) / block_rows, size = block_rows * width;
    n_threads = static_cast<int>(std::min<int64_t>(n_threads, n_blocks));
    try {
        std::unique_ptr<BFloat16[]> room(new BFloat16[n_threads * size]());
        const auto run = [&](const auto* typed) {
            using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
            const csae::RoundRow<T> round = csae::round_here<T>();
            const int64_t piece = std::max<int64_t>(1, 65536 / size);
            csae::parallel_for(n_blocks, piece, n_threads, [&](int thread, int64_t begin, int64_t end) {
                BFloat16* const block = room.get() + thread * size;
                for (int64_t b = begin; b < end; ++b) {
                    const int64_t here = std::min(block_rows, n - b * block_rows);
                    for (int64_t r = 0; r < here; ++r) {
                        const int64_t i = b * block_rows + r;
                        BFloat16* const row = block + r * width;
                        float error;
                        round(typed + i * rows_stride, d, row, lengths[i], error);
                        lengths[i] = (lengths[i] + unseen) * above;
                        std::copy_n(static_cast<const BFloat16*>(bias) + 2 * i, 2, row + d);
                        csae::store(row + d + 2, csae::Register<1>{lengths[i]});
                        csae::store(row + d + 3, csae::Register<1>{(error + unseen) * above});
                    }
                    std::fill(block + here * width, block + size, BFloat16{0});
                    csae::pair_up(block, width, static_cast<BFloat16*>(pairs) + b * size);
                }
            });
        };
        if (type == csae_float32) {
            run(static_cast<const float*>(rows));
        } else {
            run(static_cast<const BFloat16*>(rows));
        }
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
