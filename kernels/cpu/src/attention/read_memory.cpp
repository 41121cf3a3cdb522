// Look-back attention of one position of each of B sequences to its memory of earlier positions: decoding with a
// key-value cache.
//
// A sequence's memory has a row for each position: the keys of all heads, then their values. All heads of a row are
// computed before the next row, so that memory is read once and sequentially: first the keys, for the scores, then the
// values.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "csae_cpu.h"
#include "parallel.h"
#include "simd/exponential.h"

namespace csae {
namespace {

// The sizes that the loops over a row's heads need.
struct Heads {
    int64_t H, d_head, d_value;
    float scale;
};

// scores[h * stride] = <q_h, key_h> * scale - slope_h * log of the distance, for each head of one row of memory.
template <int W>
CSAE_INLINE void score_row(const Heads& heads, const float* q, const float* keys, const float* slope, float log,
                           float* scores, int64_t stride) {
    for (int64_t h = 0; h < heads.H; ++h) {
        scores[h * stride] =
            dot<W>(q + h * heads.d_head, keys + h * heads.d_head, heads.d_head) * heads.scale - slope[h] * log;
    }
}

// scores [n] of one head -> the weights of a softmax over the scores and null. Pads scores to a multiple of W.
template <int W>
CSAE_INLINE void soften(float* scores, int64_t n, float null) {
    float maximum = null;
    for (int64_t i = 0; i < n; ++i) maximum = scores[i] > maximum || scores[i] != scores[i] ? scores[i] : maximum;
    for (int64_t i = n; i % W != 0; ++i) scores[i] = -std::numeric_limits<float>::infinity();
    const Register<W> shift = broadcast<W>(maximum);
    Register<W> sum = {};
    for (int64_t i = 0; i < n; i += W) {
        const Register<W> weight = exp_of<W>({load<W>(scores + i).x - shift.x});
        sum.x += weight.x;
        store<W>(scores + i, weight);
    }
    float total = std::exp(null - maximum);
    for (int l = 0; l < W; ++l) total += sum.x[l];
    const float share = 1 / total;
    for (int64_t i = 0; i < n; ++i) scores[i] *= share;
}

// out[h] += weights[h * stride] * values[h], for each head of one row of memory.
template <int W>
CSAE_INLINE void add_row(const Heads& heads, const float* weights, int64_t stride, const float* values, float* out) {
    for (int64_t h = 0; h < heads.H; ++h) {
        const float weight = weights[h * stride];
        const float* from = values + h * heads.d_value;
        float* to = out + h * heads.d_value;
        int64_t c = 0;
        for (; c + W <= heads.d_value; c += W) store<W>(to + c, {load<W>(to + c).x + weight * load<W>(from + c).x});
        for (; c < heads.d_value; ++c) to[c] += weight * from[c];
    }
}

// Attention of one sequence. rows [n]: the visible rows of memory; logs [n]: the logs of their distances; scores:
// scratch [H, stride].
template <int W>
CSAE_INLINE void read_one(const Heads& heads, const float* q, const float* memory, int64_t memory_stride,
                          const float* slope, const float* null, const int64_t* rows, const float* logs, int64_t n,
                          float* scores, int64_t stride, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        score_row<W>(heads, q, memory + rows[i] * memory_stride, slope, logs[i], scores + i, stride);
    }
    for (int64_t h = 0; h < heads.H; ++h) soften<W>(scores + h * stride, n, null[h]);
    std::fill(out, out + heads.H * heads.d_value, 0.0f);
    const float* values = memory + heads.H * heads.d_head;
    for (int64_t i = 0; i < n; ++i) add_row<W>(heads, scores + i, stride, values + rows[i] * memory_stride, out);
}

using ReadOne = void (*)(const Heads& heads, const float* q, const float* memory, int64_t memory_stride,
                         const float* slope, const float* null, const int64_t* rows, const float* logs, int64_t n,
                         float* scores, int64_t stride, float* out);

#define CSAE_READ_ONE(NAME, TARGET, W)                                                                         \
    TARGET void NAME(const Heads& heads, const float* q, const float* memory, int64_t memory_stride,           \
                     const float* slope, const float* null, const int64_t* rows, const float* logs, int64_t n, \
                     float* scores, int64_t stride, float* out) {                                              \
        read_one<W>(heads, q, memory, memory_stride, slope, null, rows, logs, n, scores, stride, out);         \
    }

CSAE_READ_ONE(portable, , 4)
#if CSAE_X86
CSAE_READ_ONE(avx2, CSAE_AVX2, 8)
CSAE_READ_ONE(avx512, CSAE_AVX512, 16)
#endif

ReadOne read_one_here() {
#if CSAE_X86
    if (current_isa() >= Isa::avx512) return avx512;
    if (current_isa() == Isa::avx2) return avx2;
#endif
    return portable;
}

// Most floats in a register of any instruction set.
constexpr int64_t padding = 16;

}  // namespace
}  // namespace csae

int csae_read_memory(const csae_memory* given, float* out, int64_t out_stride, int n_threads) {
    if (given == nullptr || n_threads < 1) return csae_bad_argument;
    const csae_memory args = *given;
    if (args.B < 0 || args.L < 0 || args.H < 0 || args.d_head < 1 || args.d_value < 0 || args.t < 0)
        return csae_bad_argument;
    if (args.q_stride < 0 || args.memory_stride_b < 0 || args.memory_stride_l < 0 || args.takes_part_stride < 0) {
        return csae_bad_argument;
    }
    if (args.B > 1 && out_stride < args.H * args.d_value) return csae_bad_argument;
    if (args.B * args.H == 0) return csae_ok;
    if (args.q == nullptr || args.slope == nullptr || args.null == nullptr || args.start == nullptr ||
        args.looks == nullptr) {
        return csae_bad_argument;
    }
    if (args.d_value > 0 && out == nullptr) return csae_bad_argument;
    if (args.t > 0 && args.L > 0 && (args.memory == nullptr || args.takes_part == nullptr)) return csae_bad_argument;
    const int64_t room = std::min(args.t, args.L);
    const int64_t stride = (room + csae::padding) / csae::padding * csae::padding;
    const csae::Heads heads = {args.H, args.d_head, args.d_value, 1 / std::sqrt(static_cast<float>(args.d_head))};
    const csae::ReadOne read_one = csae::read_one_here();
    if (n_threads > args.B) n_threads = static_cast<int>(args.B);
    try {
        // For each thread: the visible rows, the logs of their distances, and scores.
        std::unique_ptr<int64_t[]> rows(new int64_t[static_cast<size_t>(n_threads * room) + 1]);
        std::unique_ptr<float[]> logs(new float[static_cast<size_t>(n_threads * room) + 1]);
        std::unique_ptr<float[]> scores(new float[static_cast<size_t>(n_threads * args.H * stride)]);
        std::unique_ptr<float[]> log_of(new float[static_cast<size_t>(room) + 1]);
        for (int64_t distance = 1; distance <= room; ++distance) {
            log_of[distance] = std::log(static_cast<float>(distance));
        }
        csae::parallel_for(args.B, 1, n_threads, [&](int thread, int64_t b, int64_t) {
            int64_t* thread_rows = rows.get() + thread * room;
            float* thread_logs = logs.get() + thread * room;
            const uint8_t* takes_part = args.takes_part + b * args.takes_part_stride;
            int64_t n = 0;
            const int64_t first = std::max(args.t - room, args.start[b]);
            for (int64_t j = first; args.looks[b] && j < args.t; ++j) {
                const int64_t row = j % args.L;
                thread_rows[n] = row;
                thread_logs[n] = log_of[args.t - j];
                n += takes_part[row] != 0;
            }
            read_one(heads, args.q + b * args.q_stride, args.memory + b * args.memory_stride_b, args.memory_stride_l,
                     args.slope, args.null, thread_rows, thread_logs, n, scores.get() + thread * args.H * stride,
                     stride, out + b * out_stride);
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
