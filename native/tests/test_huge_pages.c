/* SPDX-License-Identifier: MIT */
/* Records in huge pages, where the file system of the working directory has them for files. */
#define _GNU_SOURCE
#include "huge_pages.h"
#include "segments_fixture.h"
#include "segments_internal.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

enum { SEGMENT = 8 << 20, RECORDS = 80, FEW = 12 };
static int has_them; /* the file system */

static void *map_anonymous(uint64_t bytes, int advice)
{
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(map != MAP_FAILED);
    uint8_t *aligned = map + -(uintptr_t)map % UCM_HUGE_PAGE;
    CHECK(!madvise(map, bytes, advice));
    memset(map, 1, bytes);
    return aligned;
}

static int memory_may_be_huge(void)
{
    char modes[64] = "";
    FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
    const int told = file && fgets(modes, sizeof modes, file);
    if (file)
        fclose(file);
    return told && !strstr(modes, "[never]");
}

static void test_how_memory_is_mapped(int told)
{
    enum { HUGE = UCM_HUGE_PAGE };
    const uint8_t *small = map_anonymous(4 * HUGE, MADV_NOHUGEPAGE);
    CHECK(ucm_huge_pages_in(told, small, 2 * HUGE) == 0);
    CHECK(ucm_huge_pages_in(-1, small, HUGE) == 0);
    if (!memory_may_be_huge())
        return;
    const uint8_t *huge = map_anonymous(4 * HUGE, MADV_HUGEPAGE);
    CHECK(ucm_huge_pages_in(told, huge, 2 * HUGE) == 2 * HUGE);
    /* Only what was asked about is counted, at both ends. */
    CHECK(ucm_huge_pages_in(told, huge + 12345, HUGE) == HUGE);
    CHECK(ucm_huge_pages_in(told, huge + 4096, 100) == 100);
    CHECK(ucm_huge_pages_in(-1, huge, HUGE) == 0);
}

/* Whether the kernel has been asked for huge pages, and not to read further than one of them. */
static int is_asked_for(const void *map)
{
    char line[512], wanted[32];
    int here = 0, asked = 0;
    snprintf(wanted, sizeof wanted, "%lx-", (unsigned long)(uintptr_t)map);
    FILE *maps = fopen("/proc/self/smaps", "r");
    CHECK(maps != NULL);
    while (fgets(line, sizeof line, maps)) {
        if (strchr(line, '-') && strchr(line, '-') < strchr(line, ' '))
            here = !strncmp(line, wanted, strlen(wanted));
        if (here && !strncmp(line, "VmFlags:", 8))
            asked = strstr(line, " hg") && strstr(line, " rr");
    }
    fclose(maps);
    return asked;
}

static void name_of(uint32_t number, uint8_t id[ID])
{
    memset(id, 0, ID);
    memcpy(id, &number, sizeof number);
}

/* Dumps one record and returns how it was written. */
static ucm_way dump_record(uint32_t number)
{
    ucm_row rows[PIECES];
    ucm_batch *batch;
    uint8_t id[ID];
    const uint64_t count = whole_rows(rows, source, number % BLOCKS, number % BLOCKS + 1);
    name_of(number, id);
    CHECK_OK(ucm_segments_dump(store, id, 1, rows, count, &batch));
    CHECK_OK(finish(batch, 0));
    ucm_batch_release(batch);
    return store->table[store->table_size - 1].way; /* alone, it has the place looked at last */
}

static void check_record(uint32_t number)
{
    ucm_row rows[PIECES];
    ucm_batch *batch;
    uint8_t id[ID];
    const uint64_t count = whole_rows(rows, target, number % BLOCKS, number % BLOCKS + 1);
    name_of(number, id);
    memset(target, 0, sizeof target);
    CHECK_OK(ucm_segments_load(store, id, 1, rows, count, &batch));
    CHECK_OK(finish(batch, 0));
    ucm_batch_release(batch);
    CHECK(!memcmp(target[number % BLOCKS], source[number % BLOCKS], PAYLOAD));
}

static uint32_t dump_records(uint32_t first, uint32_t end, ucm_way way)
{
    uint32_t found = 0;
    for (uint32_t number = first; number < end; number++) {
        found += dump_record(number) == way;
        check_record(number);
    }
    return found;
}

static void sync_all(void)
{
    for (uint32_t i = 0; i < store->segment_count; i++)
        CHECK(!msync(store->segments[i]->file.map, store->segments[i]->file.bytes, MS_SYNC));
}

/* Takes all segments out of the page cache; the store is closed. */
static void drop_all(void)
{
    char command[128];
    snprintf(command, sizeof command, "for f in $(find %s -name '*.seg'); do dd of=$f "
             "oflag=nocache conv=notrunc,fdatasync count=0 status=none; done", root);
    CHECK(system(command) == 0);
}

static void test_records(settings with)
{
    open_store(with);
    /* New places, then the same that the kernel has written back. */
    uint32_t huge = dump_records(0, RECORDS, UCM_STORED_HUGE);
    CHECK(huge == 0 || has_them);
    CHECK(huge >= RECORDS / 2 || !has_them); /* not what the end of a file is in */
    CHECK(is_asked_for(store->segments[0]->file.map));
    sync_all();
    huge = dump_records(RECORDS, 2 * RECORDS, UCM_STORED_HUGE);
    CHECK(huge >= RECORDS / 2 || !has_them);
    close_store();
    /* What has left the page cache is not read to be overwritten. */
    drop_all();
    open_store(with);
    for (uint32_t number = 2 * RECORDS; number < 2 * RECORDS + FEW; number++)
        CHECK(dump_record(number) == UCM_WRITTEN);
    for (uint32_t number = 2 * RECORDS - FEW; number < 2 * RECORDS + FEW; number++)
        check_record(number);
    close_store();
}

/* Where each record is synced, a store to a huge page would have all of it written. */
static void test_durable_records_are_written(settings with)
{
    with.durability = UCM_DURABILITY_GROUP;
    with.capacity_bytes = 0;
    open_store(with);
    CHECK(dump_records(3 * RECORDS, 4 * RECORDS, UCM_WRITTEN) == RECORDS);
    for (uint32_t i = 0; i < store->segment_count; i++)
        CHECK(!store->segments[i]->active || !store->segments[i]->file.writable);
    close_store();
}

/* Stands in for a file system without them: nothing is told to be in huge pages. */
static void test_small_pages_are_not_tried_for_long(settings with)
{
    segment *other;
    uint32_t slot;
    open_store(with);
    if (store->use.pages >= 0)
        close(store->use.pages);
    store->use.pages = open("/dev/null", O_RDONLY);
    store->active_segments = 1;
    CHECK(dump_record(4 * RECORDS) == UCM_WRITTEN);
    CHECK(atomic_load(&store->small_until_ns) > ucm_now_ns());
    /* Of the last part of a larger segment nothing is asked, which would fill the cache. */
    for (uint32_t number = 4 * RECORDS + 1; store->segment_count < 3; number++)
        CHECK(dump_record(number) == UCM_WRITTEN);
    for (int i = 0; i < 3; i++)
        CHECK_OK(ucm_segments_reserve(store, &other, &slot));
    CHECK(dump_record(5 * RECORDS - 1) == UCM_WRITTEN);
    slot = store->table[store->table_size - 1].slot + 1;
    CHECK(ucm_cached_state(other->file.file, ucm_segment_slot_at(&other->file, slot),
                           other->file.slot_bytes / 2) == UCM_UNCACHED);
    /* A place that is overwritten says nothing about new ones. */
    open_block block = {.segment = other, .slot = 0};
    atomic_store(&store->small_until_ns, 0);
    other->file.overwrites = 1;
    CHECK(ucm_cached_state(other->file.file, ucm_segment_slot_at(&other->file, 0),
                           other->file.slot_bytes) != UCM_UNCACHED);
    ucm_segments_choose_way(store, &block);
    CHECK(block.way != UCM_STORED_HUGE && atomic_load(&store->small_until_ns) == 0);
    for (int i = 0; i < 3; i++)
        ucm_segments_let_go(store, other);
    CHECK(dump_records(5 * RECORDS, 6 * RECORDS, UCM_STORED_HUGE) == 0);
    close_store();
}

enum { APART = 4 };

static uint32_t part_of(uint32_t slot, uint32_t room)
{
    uint32_t part = 0;
    while (slot >= room * (part + 1) / APART)
        part++;
    return part;
}

/* Writers at a time fill a segment in places apart, and in the end all of it. */
static void test_writers_fill_places_apart(settings with)
{
    enum { MANY = 40 };
    segment *into[MANY];
    uint32_t slot[MANY], count = 0, room;
    open_store(with);
    store->active_segments = 1;
    CHECK_OK(ucm_segments_reserve(store, &into[0], &slot[0]));
    room = into[0]->file.slot_count;
    CHECK(room >= 2 * APART && room <= MANY);
    for (count = 1; count < room; count++)
        CHECK_OK(ucm_segments_reserve(store, &into[count], &slot[count]));
    CHECK(ucm_segments_is_full(into[0]));
    for (uint32_t i = 0; i < room; i++) {
        CHECK(into[i] == into[0]);
        for (uint32_t j = 0; j < i; j++)
            CHECK(slot[i] != slot[j]);
        for (uint32_t j = i / APART * APART; j < i; j++)
            CHECK(part_of(slot[i], room) != part_of(slot[j], room));
    }
    /* The next one goes to where nobody writes, beside the one before. */
    pthread_mutex_lock(&store->mutex);
    for (uint32_t i = 0; i < room; i++)
        ucm_segments_leave_slot(into[0], slot[i], i < APART);
    pthread_mutex_unlock(&store->mutex);
    for (uint32_t i = 0; i < APART; i++)
        CHECK(into[0]->stripes[i].writers == 0);
    CHECK_OK(ucm_segments_reserve(store, &into[1], &slot[1]));
    CHECK(slot[1] == slot[0] + 1);
    pthread_mutex_lock(&store->mutex);
    ucm_segments_leave_slot(into[0], slot[1], 0);
    pthread_mutex_unlock(&store->mutex);
    for (uint32_t i = 0; i <= room; i++)
        ucm_segments_let_go(store, into[0]);
    close_store();
}

static void run(void (*test)(settings), settings with)
{
    char folder[300];
    strcpy(root, "ucm-huge-XXXXXX");
    CHECK(mkdtemp(root));
    snprintf(directory, sizeof directory, "%s/store", root);
    CHECK(!mkdir(directory, 0700));
    for (int i = 0; i < 2; i++) {
        snprintf(folder, sizeof folder, "%s/%s", directory, i ? "pins" : "tmp");
        CHECK(!mkdir(folder, 0700));
    }
    test(with);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", root);
    CHECK(system(command) == 0);
}

int main(void)
{
    const int told = ucm_huge_pages_open();
    struct statfs medium;
    for (int block = 0; block < BLOCKS; block++)
        for (int i = 0; i < PAYLOAD; i++)
            source[block][i] = (uint8_t)(i * 31 + i / 255 + block);
    settings with = USUAL;
    with.access = UCM_ACCESS_MAPPED;
    with.durability = UCM_DURABILITY_NONE;
    with.segment_bytes = SEGMENT;
    with.capacity_bytes = 2 * SEGMENT;
    run(test_writers_fill_places_apart, with);
    CHECK(!statfs(".", &medium));
    if (told < 0 || access("/sys/kernel/mm/transparent_hugepage", F_OK) ||
        medium.f_type == TMPFS_MAGIC)
        return 77; /* an older kernel, one without them, or a file system in memory */
    test_how_memory_is_mapped(told);
    has_them = ucm_segments_huge_pages(".");
    CHECK(!ucm_segments_huge_pages("missing"));
    printf("huge pages of files: %s\n", has_them ? "yes" : "no");
    run(test_records, with);
    run(test_durable_records_are_written, with);
    run(test_small_pages_are_not_tried_for_long, with);
    CHECK(!close(told));
    return 0;
}
