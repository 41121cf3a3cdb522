// The ABI version, and the choice of the instruction set.
#include <atomic>
#include <initializer_list>

#include "csae_cpu.h"
#include "simd/isa.h"

#if CSAE_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

const int csae_abi_version = 11;

namespace csae {
namespace {

#if CSAE_HAS_AMX
// Whether this CPU has AMX with bfloat16, and Linux allows this process to use it. AMX's tile registers are large, so
// Linux saves them only for processes that have asked.
bool amx_is_allowed() {
    constexpr unsigned tiles = 1u << 24, bfloat16 = 1u << 22;
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & tiles) == 0 || (d & bfloat16) == 0) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

bool supports(Isa isa) {
#if CSAE_X86
    __builtin_cpu_init();
    if (isa == Isa::avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    }
    if (isa == Isa::avx512) {
        return supports(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
#if CSAE_HAS_BF16
    // On AMD's cores only: there it is measured to be a gain.
    if (isa == Isa::bf16) {
        return supports(Isa::avx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
    }
#endif
#if CSAE_HAS_AMX
    if (isa == Isa::amx) return supports(Isa::avx512) && amx_is_allowed();
#endif
    return isa == Isa::portable;
}

Isa best() {
    for (const Isa isa : {Isa::amx, Isa::bf16, Isa::avx512, Isa::avx2}) {
        if (supports(isa)) return isa;
    }
    return Isa::portable;
}

std::atomic<Isa> chosen{best()};

}  // namespace

Isa current_isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace csae

int csae_isa() { return static_cast<int>(csae::current_isa()); }

int csae_use_isa(int isa) {
    if (isa < 0 || isa > static_cast<int>(csae::Isa::amx) || !csae::supports(static_cast<csae::Isa>(isa)))
        return csae_bad_argument;
    csae::chosen.store(static_cast<csae::Isa>(isa), std::memory_order_relaxed);
    return csae_ok;
}
