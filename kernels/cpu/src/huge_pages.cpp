// Fresh memory of a large result is given by the system a page of 4 kB at a time, when it is first written. For the
// dense gradient of a wide table these page faults take several times as long as the sums themselves. Linux gives 2 MB
// at a time where it is asked to (transparent huge pages are in `madvise` mode on most systems).
#include <sys/mman.h>

#include "csae_cpu.h"

void csae_use_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = uintptr_t{2} << 20;
    const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    // Where it fails, the pages are small ones.
    if (memory != nullptr && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(memory);
    static_cast<void>(bytes);
#endif
}
