// What the library exports: a C ABI, called through ctypes.
//
// Every function returns a status and touches nothing where that is not `csae_ok`. Strides are in elements and
// the last dimension is contiguous. The result has the same bits for any number of threads.
#pragma once

#include <cstdint>

#define CSAE_EXPORT extern "C" __attribute__((visibility("default")))

enum csae_status : int {
    csae_ok = 0,
    csae_bad_argument = 1,
    csae_out_of_memory = 2,
};

// Raised whenever a signature below changes; the loader refuses a library of another version.
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
