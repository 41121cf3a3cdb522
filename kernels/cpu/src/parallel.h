// A parallel loop.
//
// The threads are those of torch's own OpenMP runtime. A library linked with -fopenmp would load its compiler's runtime
// beside the one in torch's wheel, and the two thread pools would spin against each other for the same cores. So
// nothing here is compiled with -fopenmp. A parallel region needs one entry point, GOMP_parallel, which libgomp and the
// runtimes of LLVM and Intel all have. The loader looks it up in torch's dependencies and passes it to csae_use_openmp.
// Without it each call starts threads of std::thread; the sanitizers use these too, since they can't see into an OpenMP
// runtime.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace csae {

// Calls work(data, thread) once in each of at most n_threads threads, and returns when all are done. `thread` is below
// n_threads and different in each. There may be fewer threads than asked for.
void in_threads(int n_threads, void (*work)(void* data, int thread), void* data);

// Calls body(thread, begin, end) on pieces of at most `piece` items that cover [0, n). Which thread gets which piece is
// not deterministic, so a body's result must not depend on it. A body must not throw.
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
