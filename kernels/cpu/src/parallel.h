// One loop shared by several threads.
//
// The threads are those of the OpenMP runtime that torch uses. A library that is linked with -fopenmp brings the
// runtime that its compiler knows, a second one beside the one in torch's wheel: two pools of threads that spin
// against each other for the same cores. So nothing here is compiled with -fopenmp. The one entry point that a
// parallel region needs, GOMP_parallel (a stable name that libgomp, LLVM's and Intel's runtimes all have), is
// looked up by the loader in what torch is linked with, and handed over by csae_use_openmp. Without it the threads
// are std::thread's, started for each call; so it is for the sanitizers too, which can't see into an OpenMP runtime.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace csae {

// Calls work(data, thread) once in each of up to n_threads threads, with a thread number of its own below
// n_threads, and returns when all are done. There may be fewer threads than asked for.
void in_threads(int n_threads, void (*work)(void* data, int thread), void* data);

// Calls body(thread, begin, end) on pieces of at most `piece` items that cover [0, n). Which thread gets which
// piece is a matter of chance, so a body must not let its result depend on it. It must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t piece, int n_threads, Body&& body) {
    struct Shared {
        int64_t n, piece;
        std::atomic<int64_t> next;
        std::remove_reference_t<Body>* body;
    } shared{n, piece, {0}, &body};
    if (n_threads > (n + piece - 1) / piece) n_threads = static_cast<int>((n + piece - 1) / piece);
    in_threads(
        n_threads,
        [](void* data, int thread) {
            auto& shared = *static_cast<Shared*>(data);
            for (;;) {
                const int64_t begin = shared.next.fetch_add(shared.piece, std::memory_order_relaxed);
                if (begin >= shared.n) return;
                const int64_t end = begin + shared.piece < shared.n ? begin + shared.piece : shared.n;
                (*shared.body)(thread, begin, end);
            }
        },
        &shared);
}

}  // namespace csae
