// The version of the ABI, and the choice of instructions.
#include <atomic>

#include "csae_cpu.h"
#include "isa.h"

const int csae_abi_version = 5;

namespace csae {
namespace {

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
    return isa == Isa::portable;
}

Isa best() {
    return supports(Isa::avx512) ? Isa::avx512 : supports(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

std::atomic<Isa> chosen{best()};

}  // namespace

Isa current_isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace csae

int csae_isa() { return static_cast<int>(csae::current_isa()); }

int csae_use_isa(int isa) {
    if (isa < 0 || isa > 2 || !csae::supports(static_cast<csae::Isa>(isa))) return csae_bad_argument;
    csae::chosen.store(static_cast<csae::Isa>(isa), std::memory_order_relaxed);
    return csae_ok;
}
