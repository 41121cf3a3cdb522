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
