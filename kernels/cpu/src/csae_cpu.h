// What the library exports: a C ABI, called through ctypes.
//
// Matrices are row-major with a stride between rows, in elements; columns are contiguous. Outputs must not overlap
// inputs. A function that works on a matrix returns a status; where that is not `csae_ok`, the outputs hold nothing
// of use, and nothing out of bounds was touched. The result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#define CSAE_EXPORT extern "C" __attribute__((visibility("default")))

enum csae_status : int {
    csae_ok = 0,
    csae_bad_argument = 1,
    csae_out_of_memory = 2,
    csae_bad_index = 3,  // one of indices is outside of [0, d_sae)
};

// Raised by one whenever a signature below changes; the loader refuses a library of another version.
CSAE_EXPORT const int csae_abi_version;

// Which instructions the row loops use: 0 portable, 1 AVX2, 2 AVX-512. At load, the best that this CPU has.
// csae_use_isa is there for tests; it refuses what the CPU can't run.
CSAE_EXPORT int csae_isa();
CSAE_EXPORT int csae_use_isa(int isa);

// Take threads from the OpenMP runtime that has this GOMP_parallel (see parallel.h); null: from std::thread.
CSAE_EXPORT void csae_use_openmp(void* gomp_parallel);

// The file of that runtime, or null.
CSAE_EXPORT const char* csae_openmp_file();

// The k largest of each row of pre_acts [n, d_sae], relu'd: values [n, k], indices [n, k].
// Largest first, equal ones (-0.0 and 0.0 are equal) by lower index first, selected before the relu. A row with a
// NaN gives k NaN at indices 0..k-1. Needs 1 <= k <= d_sae < 2^31.
CSAE_EXPORT int csae_topk_rows(const float* pre_acts, int64_t pre_acts_stride, int64_t n, int64_t d_sae, int64_t k,
                               float* values, int64_t values_stride, int64_t* indices, int64_t indices_stride,
                               int n_threads);

// out [n, d]: out_i = sum over j of values_ij * table[indices_ij]. values, indices [n, k], table [d_sae, d].
CSAE_EXPORT int csae_gather_sum(const float* values, int64_t values_stride, const int64_t* indices,
                                int64_t indices_stride, int64_t n, int64_t k, const float* table, int64_t table_stride,
                                int64_t d_sae, int64_t d, float* out, int64_t out_stride, int n_threads);

// out [n, k]: out_ij = <rows_i, table[indices_ij]>. rows [n, d], indices [n, k], table [d_sae, d].
CSAE_EXPORT int csae_gather_dot(const float* rows, int64_t rows_stride, const int64_t* indices, int64_t indices_stride,
                                int64_t n, int64_t k, const float* table, int64_t table_stride, int64_t d_sae,
                                int64_t d, float* out, int64_t out_stride, int n_threads);

// out [d_sae, d]: out_f = sum over the pairs (i, j) with indices_ij = f of values_ij * rows_i, added in the order of
// (i, j); zero where there is no such pair. values, indices [n, k], rows [n, d].
CSAE_EXPORT int csae_feature_sum(const float* values, int64_t values_stride, const int64_t* indices,
                                 int64_t indices_stride, int64_t n, int64_t k, const float* rows, int64_t rows_stride,
                                 int64_t d_sae, int64_t d, float* out, int64_t out_stride, int n_threads);

// A tensor [B, T, H, d] with its strides, in elements; its last dimension is contiguous.
struct csae_heads {
    const float* x;
    int64_t stride_b, stride_t, stride_h;
};

// The input of look-back attention: q, k [B, T, H, d_head], v [B, T, H, d_value], slope, null [H], and mask, starts
// [B, T], contiguous, or null pointers. d_head >= 1. A position t looks at the positions in [starts_t, t) that have
// mask, if it has mask itself; any number in starts will do.
struct csae_attention {
    csae_heads q, k, v;
    const float *slope, *null;
    const uint8_t* mask;
    const int32_t* starts;
    int64_t B, T, H, d_head, d_value;
};

// out [B, T, H, d_value], lse [B, H, T], contiguous. score(t, j) = <q_t, k_j> / sqrt(d_head) - slope * log(t - j);
// out is the mean of v under the softmax of these and null, whose value is zero; lse the log of its denominator.
CSAE_EXPORT int csae_lookback_forward(const csae_attention* given, float* out, float* lse, int n_threads);

// The gradients of q, k, v, slope and null, contiguous, from that of out [B, T, H, d_value] and what forward gave.
CSAE_EXPORT int csae_lookback_backward(const csae_attention* given, const csae_heads* grad_out, const csae_heads* out,
                                       const float* lse, float* d_q, float* d_k, float* d_v, float* d_slope,
                                       float* d_null, int n_threads);
