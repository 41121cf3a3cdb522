// The system provides fresh memory in pages of 4 kB, with a page fault at the first write to each. For the dense
// gradient of a wide table these faults take several times as long as the sums. Linux provides pages of 2 MB if asked
// to (transparent huge pages are in `madvise` mode on most systems).
#include <sys/mman.h>

#include "csae_cpu.h"

void csae_use_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = uintptr_t{2} << 20;
    const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    // A failure is harmless: the pages are small then.
    if (memory != nullptr && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(memory);
    static_cast<void>(bytes);
#endif
}
