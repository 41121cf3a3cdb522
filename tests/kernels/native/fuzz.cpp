// Calls every function of the native CPU library with random arguments for a while, and checks each result against
// a plain definition in double. Buffers have no element to spare, so that AddressSanitizer sees any overrun.
//
//     fuzz SECONDS SEED [FIRST_CASE]
//
// A case depends on the seed and its number only: FIRST_CASE begins with the one that a failure named. Exits with 1
// on a mismatch.
#include "fuzz.h"

extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
void impossible_arguments();  // impossible_arguments.cpp

namespace fuzz {
namespace {

// --- the choice of threads and instructions --------------------------------------------------------------------

// An OpenMP runtime that gives fewer threads than it was asked for.
void parallel(void (*work)(void*), void* data, unsigned n_threads, unsigned) {
    std::vector<std::thread> helpers;
    while (helpers.size() < std::min(n_threads / 2, 3u)) helpers.emplace_back(work, data);
    work(data);
    for (auto& helper : helpers) helper.join();
}

void choose_openmp(bool openmp) {
    function = "csae_use_openmp";
    csae_use_openmp(openmp ? reinterpret_cast<void*>(parallel) : nullptr);
    check((csae_openmp_file() != nullptr) == openmp, "csae_openmp_file doesn't say what is in use");
}

}  // namespace
}  // namespace fuzz

int main(int n_arguments, char** arguments) {
    using namespace fuzz;
    if (n_arguments < 3) return std::fprintf(stderr, "fuzz SECONDS SEED [FIRST_CASE]\n"), 2;
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(arguments[1]));
    seed = static_cast<unsigned>(std::atoi(arguments[2]));
    case_number = n_arguments > 3 ? static_cast<unsigned>(std::atoi(arguments[3])) : 0;
    if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(say_where);
    const int best = csae_isa();
    impossible_arguments();
    const unsigned first_case = case_number;
    for (; std::chrono::steady_clock::now() < end; ++case_number) {
        std::seed_seq seeds{seed, case_number};
        random_bits.seed(seeds);
        const int isa = static_cast<int>(case_number / 11) % (best + 1);
        function = "csae_use_isa";
        check(csae_use_isa(isa) == csae_ok && csae_isa() == isa, "doesn't use what this CPU has");
        choose_openmp(one_in(4));
        switch (case_number % 11) {
            case 0:
                topk_rows();
                break;
            case 1:
                gather(true);
                break;
            case 2:
                gather(false);
                break;
            case 3:
                feature_rows();
                break;
            case 4:
                lookback();
                break;
            case 5:
                read_memory();
                break;
            case 6:
                topk_settle();
                break;
            case 7:
                topk_products();
                break;
            case 8:
                scaled_heads();
                break;
            case 9:
                products();
                break;
            case 10:
                above_rows();
                break;
        }
    }
    std::printf("%u cases, instruction sets 0 to %d\n", case_number - first_case, best);
}
