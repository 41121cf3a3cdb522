#include "parallel.h"

#include <dlfcn.h>

#include <system_error>
#include <thread>
#include <vector>

#include "csae_cpu.h"

namespace csae {
namespace {

// void GOMP_parallel(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags), as since GCC 4.9.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};

struct Team {
    void (*work)(void*, int);
    void* data;
    std::atomic<int> arrived;
};

void join_team(void* data) {
    auto& team = *static_cast<Team*>(data);
    team.work(team.data, team.arrived.fetch_add(1, std::memory_order_relaxed));
}

}  // namespace

void in_threads(int n_threads, void (*work)(void*, int), void* data) {
    if (n_threads <= 1) {
        work(data, 0);
        return;
    }
    Team team{work, data, {0}};
    if (const GompParallel parallel = gomp_parallel.load(std::memory_order_acquire)) {
        parallel(join_team, &team, static_cast<unsigned>(n_threads), 0);
        return;
    }
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(static_cast<size_t>(n_threads - 1));
        while (static_cast<int>(helpers.size()) < n_threads - 1) helpers.emplace_back(join_team, &team);
    } catch (const std::exception&) {
        // The system gives no more threads: those that were started do all the work.
    }
    join_team(&team);
    for (auto& helper : helpers) helper.join();
}

}  // namespace csae

void csae_use_openmp(void* gomp_parallel) {
    csae::gomp_parallel.store(reinterpret_cast<csae::GompParallel>(gomp_parallel), std::memory_order_release);
}

const char* csae_openmp_file() {
    const auto parallel = csae::gomp_parallel.load(std::memory_order_acquire);
    Dl_info info;
    if (parallel == nullptr || dladdr(reinterpret_cast<void*>(parallel), &info) == 0) return nullptr;
    return info.dli_fname;
}
