/* SPDX-License-Identifier: MIT */
/* Which way a place is overwritten, and what the page cache says of it. */
#define _GNU_SOURCE
#include "check.h"
#include "overwriting.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { BYTES = 1 << 20, MANY = 2000 };

static int count(ucm_overwriting *learned, ucm_way way, int times, int stored, int dirty)
{
    int found = 0;
    for (int i = 0; i < times; i++)
        found += ucm_overwriting_way(learned, stored, dirty) == way;
    return found;
}

static ucm_overwriting with_costs(uint64_t written, uint64_t stored, uint64_t anew)
{
    ucm_overwriting learned = {0};
    for (int i = 0; i < 100; i++) {
        ucm_overwriting_learn(&learned, UCM_WRITTEN, BYTES, written);
        ucm_overwriting_learn(&learned, UCM_STORED, BYTES, stored);
        ucm_overwriting_learn(&learned, UCM_STORED_ANEW, BYTES, anew);
    }
    return learned;
}

static void test_what_was_written_back_is_written(void)
{
    ucm_overwriting learned = with_costs(200000, 100000, 900000);
    CHECK(count(&learned, UCM_WRITTEN, MANY, 1, 0) == MANY);
    CHECK(count(&learned, UCM_WRITTEN, MANY, 0, 0) == MANY);
    /* One that is still writable, even so. */
    CHECK(count(&learned, UCM_STORED, 1, 1, 1) == 1);
}

static void test_pages_are_made_writable_where_they_stay_so(void)
{
    /* It pays where more than 7 of 8 are kept: 700 more once, 100 less each time. */
    ucm_overwriting dear = with_costs(200000, 100000, 900000);
    for (int round = 0; round < MANY; round++)
        for (int i = 0; i < 4; i++)
            (void)ucm_overwriting_way(&dear, 1, i > 0);
    CHECK(count(&dear, UCM_WRITTEN, 1, 0, 1) == 1);
    CHECK(count(&dear, UCM_STORED_ANEW, MANY, 0, 1) > MANY * 9 / 10);
    /* Where it costs little more it pays at once. */
    ucm_overwriting cheap = with_costs(200000, 100000, 220000);
    for (int round = 0; round < MANY; round++)
        for (int i = 0; i < 4; i++)
            (void)ucm_overwriting_way(&cheap, 1, i > 0);
    CHECK(count(&cheap, UCM_STORED_ANEW, 1, 0, 1) == 1);
    /* And never where stores are slow. */
    ucm_overwriting slow = with_costs(200000, 300000, 400000);
    CHECK(count(&slow, UCM_WRITTEN, MANY, 0, 1) == MANY);
}

static void test_what_is_unknown_is_tried(void)
{
    ucm_overwriting learned = {0};
    ucm_overwriting_learn(&learned, UCM_WRITTEN, BYTES, 200000);
    CHECK(ucm_overwriting_way(&learned, 0, 1) == UCM_STORED_ANEW);
    ucm_overwriting_learn(&learned, UCM_STORED_ANEW, BYTES, 900000);
    CHECK(ucm_overwriting_way(&learned, 0, 1) == UCM_WRITTEN);
    /* Of small records too; and too much to be counted. */
    ucm_overwriting_learn(&learned, UCM_WRITTEN, 4096, 700000);
    CHECK(learned.costs[UCM_WRITTEN] > 1000000);
    ucm_overwriting_learn(&learned, UCM_STORED, BYTES, UINT64_MAX / BYTES);
    CHECK(learned.costs[UCM_STORED] > learned.costs[UCM_STORED_ANEW]);
}

static void test_one_bad_sample_is_not_for_ever(void)
{
    ucm_overwriting learned = {0};
    ucm_overwriting_learn(&learned, UCM_WRITTEN, BYTES, 200000);
    ucm_overwriting_learn(&learned, UCM_STORED, BYTES, 100000);
    ucm_overwriting_learn(&learned, UCM_STORED_ANEW, BYTES, 1000000000); /* it had to wait */
    int tries = 0;
    for (int i = 0; i < 100000; i++)
        if (ucm_overwriting_way(&learned, 0, 1) == UCM_STORED_ANEW) {
            ucm_overwriting_learn(&learned, UCM_STORED_ANEW, BYTES, 900000);
            tries++;
        }
    CHECK(tries > 10000);
    /* What never pays is tried seldom. */
    ucm_overwriting slow = with_costs(200000, 190000, 900000);
    tries = 0;
    for (int i = 0; i < 100000; i++)
        if (ucm_overwriting_way(&slow, 0, i % 4 > 0) == UCM_STORED_ANEW) {
            ucm_overwriting_learn(&slow, UCM_STORED_ANEW, BYTES, 900000);
            tries++;
        }
    CHECK(tries > 0 && tries < 500);
}

static void test_dirty_pages(void)
{
    enum { PAGES = 8, PAGE = 4096 };
    static uint8_t bytes[PAGES * PAGE];
    char name[] = "overwriting-XXXXXX";
    struct statfs medium;
    struct {
        uint64_t offset, bytes;
    } range = {0, PAGE};
    uint64_t found[5];
    int file = mkstemp(name);
    CHECK(file >= 0);
    CHECK(pwrite(file, bytes, sizeof bytes, 0) == sizeof bytes);
    CHECK(!fstatfs(file, &medium));
    const int told = !syscall(451, file, &range, found, 0) && medium.f_type != TMPFS_MAGIC;
    if (told) { /* before Linux 6.5 nothing is known; in memory nothing is written back */
        CHECK(ucm_cached_state(file, 0, sizeof bytes) == UCM_DIRTY);
        CHECK(ucm_cached_state(file, 3 * PAGE + 5, PAGE) == UCM_DIRTY);
        CHECK(ucm_cached_state(file, 0, sizeof bytes + 1) == UCM_UNCACHED);
        CHECK(!fdatasync(file));
        CHECK(pwrite(file, bytes, sizeof bytes / 2, 0) >= 0 && !fdatasync(file));
        CHECK(ucm_cached_state(file, 0, sizeof bytes) == UCM_CACHED);
        CHECK(!posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED));
        CHECK(ucm_cached_state(file, 0, sizeof bytes) == UCM_UNCACHED);
    }
    CHECK(ucm_cached_state(-1, 0, PAGE) == UCM_UNCACHED);
    CHECK(!close(file) && !unlink(name));
}

int main(void)
{
    test_what_was_written_back_is_written();
    test_pages_are_made_writable_where_they_stay_so();
    test_what_is_unknown_is_tried();
    test_one_bad_sample_is_not_for_ever();
    test_dirty_pages();
    return 0;
}
