/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "huge_pages.h"

#include <fcntl.h>
#include <linux/ioctl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* <linux/fs.h> has these from Linux 6.7 on. */
typedef struct {
    uint64_t start, end, categories;
} region;

typedef struct {
    uint64_t size, flags, start, end, walk_end, regions, region_count, most_pages;
    uint64_t inverted, all_of, any_of, told;
} scan;

#define PAGEMAP_SCAN_REQUEST _IOWR('f', 16, scan)
enum { IS_HUGE = 1 << 6, REGIONS = 8 };

static uint64_t page_bytes(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

int ucm_huge_pages_open(void)
{
    static const uint8_t here;
    const uint64_t page = page_bytes(), at = (uint64_t)(uintptr_t)&here / page * page;
    region found;
    scan request = {.size = sizeof request,
                    .start = at,
                    .end = at + page,
                    .regions = (uint64_t)(uintptr_t)&found,
                    .region_count = 1,
                    .all_of = IS_HUGE,
                    .told = IS_HUGE};
    int told = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (told >= 0 && ioctl(told, PAGEMAP_SCAN_REQUEST, &request) < 0) {
        close(told);
        told = -1;
    }
    return told;
}

void ucm_huge_pages_for_file(void *map, uint64_t bytes)
{
    /* The second says how far to read ahead: no further than the page. */
    if (!madvise(map, bytes, MADV_HUGEPAGE))
        (void)madvise(map, bytes, MADV_RANDOM);
}

uint64_t ucm_huge_pages_in(int told, const void *from, uint64_t bytes)
{
    const uint64_t page = page_bytes(), first = (uint64_t)(uintptr_t)from, last = first + bytes;
    region found[REGIONS];
    scan request = {.size = sizeof request,
                    .start = first / page * page,
                    .end = (last + page - 1) / page * page,
                    .regions = (uint64_t)(uintptr_t)found,
                    .region_count = REGIONS,
                    .all_of = IS_HUGE,
                    .told = IS_HUGE};
    const int count = told < 0 ? 0 : ioctl(told, PAGEMAP_SCAN_REQUEST, &request);
    uint64_t sum = 0;
    for (int i = 0; i < count; i++) {
        const uint64_t start = found[i].start > first ? found[i].start : first;
        const uint64_t end = found[i].end < last ? found[i].end : last;
        sum += end - start;
    }
    return sum;
}

void *ucm_huge_pages_new(uint64_t bytes)
{
    const uint64_t unit = bytes < UCM_HUGE_PAGE ? page_bytes() : UCM_HUGE_PAGE;
    const uint64_t whole = (bytes + unit - 1) / unit * unit;
    void *memory = aligned_alloc(unit, whole);
    if (memory && unit == UCM_HUGE_PAGE)
        (void)madvise(memory, whole, MADV_HUGEPAGE);
    return memory;
}
