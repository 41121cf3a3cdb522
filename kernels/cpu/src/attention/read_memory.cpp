// Look-back attention of one position of each of B sequences to the memory of the positions before it.
//
// A sequence's memory is a row a position: the keys of all heads, then their values. Rows are gone through in order,
// all heads of one at a time, so that memory is read once and straight ahead: keys first, for the scores, then values.
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

// What the loops over a row's heads need.
struct Heads {
    int64_t H, d_head, d_value;
    float scale;
};

// scores [H, stride], at column i: <q, key> * scale - slope * log of the distance.
template <int W>
CSAE_INLINE void score_row(const Heads& of, const float* q, const float* keys, const float* slope, float log,
                           float* scores, int64_t stride) {
    for (int64_t h = 0; h < of.H; ++h) {
        scores[h * stride] = dot<W>(q + h * of.d_head, keys + h * of.d_head, of.d_head) * of.scale - slope[h] * log;
    }
}

// scores [n] of one head -> the weights of a softmax that also runs over null. n is padded to a multiple of W.
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

// out [H, d_value] += weights [H, stride], at column i, times values.
template <int W>
CSAE_INLINE void add_row(const Heads& of, const float* weights, int64_t stride, const float* values, float* out) {
    for (int64_t h = 0; h < of.H; ++h) {
        const float weight = weights[h * stride];
        const float* from = values + h * of.d_value;
        float* to = out + h * of.d_value;
        int64_t c = 0;
        for (; c + W <= of.d_value; c += W) store<W>(to + c, {load<W>(to + c).x + weight * load<W>(from + c).x});
        for (; c < of.d_value; ++c) to[c] += weight * from[c];
    }
}

// rows [n]: which rows of memory are seen; logs [n]: of their distances; scores: scratch [H, stride].
template <int W>
CSAE_INLINE void read_one(const Heads& of, const float* q, const float* memory, int64_t memory_stride,
                          const float* slope, const float* null, const int64_t* rows, const float* logs, int64_t n,
                          float* scores, int64_t stride, float* out) {
    for (int64_t i = 0; i < n; ++i) {
        score_row<W>(of, q, memory + rows[i] * memory_stride, slope, logs[i], scores + i, stride);
    }
    for (int64_t h = 0; h < of.H; ++h) soften<W>(scores + h * stride, n, null[h]);
    std::fill(out, out + of.H * of.d_value, 0.0f);
    const float* values = memory + of.H * of.d_head;
    for (int64_t i = 0; i < n; ++i) add_row<W>(of, scores + i, stride, values + rows[i] * memory_stride, out);
}

using ReadOne = void (*)(const Heads& of, const float* q, const float* memory, int64_t memory_stride,
                         const float* slope, const float* null, const int64_t* rows, const float* logs, int64_t n,
                         float* scores, int64_t stride, float* out);

#define CSAE_READ_ONE(NAME, TARGET, W)                                                                                \
    TARGET void NAME(const Heads& of, const float* q, const float* memory, int64_t memory_stride, const float* slope, \
                     const float* null, const int64_t* rows, const float* logs, int64_t n, float* scores,             \
                     int64_t stride, float* out) {                                                                    \
        read_one<W>(of, q, memory, memory_stride, slope, null, rows, logs, n, scores, stride, out);                   \
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

// No register is wider.
constexpr int64_t padding = 16;

}  // namespace
}  // namespace csae

int csae_read_memory(const csae_memory* given, float* out, int64_t out_stride, int n_threads) {
    if (given == nullptr || n_threads < 1) return csae_bad_argument;
    const csae_memory m = *given;
    if (m.B < 0 || m.L < 0 || m.H < 0 || m.d_head < 1 || m.d_value < 0 || m.t < 0) return csae_bad_argument;
    if (m.q_stride < 0 || m.memory_stride_b < 0 || m.memory_stride_l < 0 || m.takes_part_stride < 0) {
        return csae_bad_argument;
    }
    if (m.B > 1 && out_stride < m.H * m.d_value) return csae_bad_argument;
    if (m.B * m.H == 0) return csae_ok;
    if (m.q == nullptr || m.slope == nullptr || m.null == nullptr || m.start == nullptr || m.looks == nullptr) {
        return csae_bad_argument;
    }
    if (m.d_value > 0 && out == nullptr) return csae_bad_argument;
    if (m.t > 0 && m.L > 0 && (m.memory == nullptr || m.takes_part == nullptr)) return csae_bad_argument;
    const int64_t room = std::min(m.t, m.L);
    const int64_t stride = (room + csae::padding) / csae::padding * csae::padding;
    const csae::Heads heads = {m.H, m.d_head, m.d_value, 1 / std::sqrt(static_cast<float>(m.d_head))};
    const csae::ReadOne read_one = csae::read_one_here();
    if (n_threads > m.B) n_threads = static_cast<int>(m.B);
    try {
        // Of each thread: which rows are seen, the logs of their distances, and scores.
        std::unique_ptr<int64_t[]> rows(new int64_t[static_cast<size_t>(n_threads * room) + 1]);
        std::unique_ptr<float[]> logs(new float[static_cast<size_t>(n_threads * room) + 1]);
        std::unique_ptr<float[]> scores(new float[static_cast<size_t>(n_threads * m.H * stride)]);
        std::unique_ptr<float[]> log_of(new float[static_cast<size_t>(room) + 1]);
        for (int64_t distance = 1; distance <= room; ++distance) {
            log_of[distance] = std::log(static_cast<float>(distance));
        }
        csae::parallel_for(m.B, 1, n_threads, [&](int thread, int64_t b, int64_t) {
            int64_t* own_rows = rows.get() + thread * room;
            float* own_logs = logs.get() + thread * room;
            const uint8_t* takes_part = m.takes_part + b * m.takes_part_stride;
            int64_t n = 0;
            const int64_t first = std::max(m.t - room, m.start[b]);
            for (int64_t j = first; m.looks[b] && j < m.t; ++j) {
                const int64_t row = j % m.L;
                own_rows[n] = row;
                own_logs[n] = log_of[m.t - j];
                n += takes_part[row] != 0;
            }
            read_one(heads, m.q + b * m.q_stride, m.memory + b * m.memory_stride_b, m.memory_stride_l, m.slope, m.null,
                     own_rows, own_logs, n, scores.get() + thread * m.H * stride, stride, out + b * out_stride);
        });
    } catch (const std::bad_alloc&) {
        return csae_out_of_memory;
    }
    return csae_ok;
}
