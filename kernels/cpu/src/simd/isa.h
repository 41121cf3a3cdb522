// The instruction set in use.
#pragma once

#if defined(__x86_64__)
#define CSAE_X86 1
#define CSAE_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define CSAE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")))
#else
#define CSAE_X86 0
#endif

// AVX512-BF16 needs a compiler with its intrinsics.
#if CSAE_X86 && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define CSAE_HAS_BF16 1
#define CSAE_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")))
#else
#define CSAE_HAS_BF16 0
#endif

// AMX needs a compiler with its intrinsics, and a system that is known to grant its use.
#if CSAE_X86 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define CSAE_HAS_AMX 1
#define CSAE_AMX \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")))
#else
#define CSAE_HAS_AMX 0
#endif

// A function body that is inlined into one wrapper per instruction set, and so compiled for each.
#define CSAE_INLINE static inline __attribute__((always_inline))

namespace csae {

// Each includes the ones before it, but amx not bf16. bf16 is AVX-512 with AVX512-BF16 for products of bfloat16
// matrices; amx is AVX-512 with AMX for them.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, bf16 = 3, amx = 4 };

Isa current_isa();

}  // namespace csae
