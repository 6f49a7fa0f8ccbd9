/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ucm/segments.h"

#include "segments_fixture.h"
#include "segments_internal.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Opens the segment that holds a block; `*record` and `*entry` get the offsets in it. */
static int open_segment_of(uint32_t block, off_t *record, off_t *entry)
{
    DIR *listing = opendir(directory);
    CHECK(listing);
    for (struct dirent *name; (name = readdir(listing));) {
        uint8_t page[4096];
        const ucm_segment_header *header = (const ucm_segment_header *)page;
        if (!ucm_is_segment_name(name->d_name))
            continue;
        int file = openat(dirfd(listing), name->d_name, O_RDWR);
        CHECK(file >= 0 && pread(file, page, sizeof page, 0) == sizeof page);
        for (uint32_t slot = 0; slot < header->slot_count; slot++) {
            ucm_segment_entry one;
            *entry = (off_t)(4096 + slot * sizeof one);
            *record = (off_t)(header->slots_at + slot * header->slot_bytes);
            CHECK(pread(file, &one, sizeof one, *entry) == sizeof one);
            if (one.used && !memcmp(one.block, ids + block * ID, ID)) {
                closedir(listing);
                return file;
            }
        }
        close(file);
    }
    closedir(listing);
    return -1;
}

static void whole_blocks_come_back(void)
{
    CHECK(visible() == 0);
    CHECK(load_one(0) == UCM_MISSING);
    dump_all();
    CHECK(visible() == BLOCKS);
    dump_all(); /* again: what is there stays */
    for (uint32_t block = 0; block < BLOCKS; block++) {
        CHECK_OK(load_one(block));
        CHECK(!memcmp(source[block], target[block], PAYLOAD));
    }
}

static void any_range_comes_back(void)
{
    uint8_t memory[400000];
    for (uint64_t offset = 0; offset < PAYLOAD; offset += 1 + offset / 3 + 997) {
        uint64_t length = (PAYLOAD - offset) / 2 + 1;
        ucm_row rows[2] = {{.block = 0,
                            .length = (uint32_t)length,
                            .offset = offset,
                            .address = (uint64_t)(uintptr_t)memory},
                           {.block = 0,
                            .length = 1,
                            .offset = PAYLOAD - 1,
                            .address = (uint64_t)(uintptr_t)(memory + length)}};
        ucm_batch *batch;
        CHECK_OK(ucm_segments_load(store, ids, 1, rows, 2, &batch));
        CHECK_OK(finish(batch, 0));
        ucm_batch_release(batch);
        CHECK(!memcmp(memory, source[0] + offset, length));
        CHECK(memory[length] == source[0][PAYLOAD - 1]);
    }
}

static void bad_rows_are_refused_at_the_call(void)
{
    ucm_batch *batch;
    ucm_row row = {.block = 1, .length = 1, .offset = 0, .address = 0};
    CHECK(ucm_segments_load(store, ids, 1, &row, 1, &batch) == UCM_INVALID);
    row = (ucm_row){.block = 0, .length = 2, .offset = PAYLOAD - 1, .address = 0};
    CHECK(ucm_segments_load(store, ids, 1, &row, 1, &batch) == UCM_INVALID);
    row = (ucm_row){.block = 0, .length = 100, .offset = 0, .address = 0}; /* part of a piece */
    CHECK(ucm_segments_dump(store, ids, 1, &row, 1, &batch) == UCM_INVALID);
}

static void a_block_is_visible_with_its_last_piece(void)
{
    uint32_t removed;
    ucm_row rows[PIECES];
    CHECK_OK(ucm_segments_delete(store, ids, BLOCKS, &removed));
    CHECK(removed == BLOCKS && visible() == 0);
    whole_rows(rows, source, 3, 4);
    for (int i = PIECES - 1; i >= 0; i--) {
        ucm_batch *batch;
        CHECK(visible() == 0);
        CHECK_OK(ucm_segments_dump(store, ids + 3 * ID, 1, rows + i, 1, &batch));
        CHECK_OK(finish(batch, 0));
        ucm_batch_release(batch);
    }
    CHECK(visible() == 1);
    CHECK_OK(load_one(3));
    CHECK(!memcmp(source[3], target[3], PAYLOAD));
}

static void flip(int file, off_t at)
{
    uint8_t byte;
    CHECK(pread(file, &byte, 1, at) == 1);
    byte ^= 4;
    CHECK(pwrite(file, &byte, 1, at) == 1);
}

static void damage_is_a_miss_and_is_written_anew(void)
{
    dump_all();
    /* One flipped bit in every part of the record, each in a fresh copy. */
    const off_t places[] = {0, 8, 40, 100, 150, 161, 170, 4096, 4096 + PAYLOAD - 1};
    off_t record, entry, other, other_entry;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int file = open_segment_of(1, &record, &entry);
        flip(file, record + places[i]);
        close(file);
        CHECK(load_one(1) == UCM_CORRUPT);
        CHECK(visible() == BLOCKS - 1);
        dump_all();
        CHECK_OK(load_one(1));
    }
    /* One block's record in the place of another's, of the same segment. */
    int file = open_segment_of(4, &record, &entry);
    int second = open_segment_of(5, &other, &other_entry);
    static uint8_t copy[4096 + PAYLOAD];
    CHECK(pread(file, copy, sizeof copy, record) == sizeof copy);
    CHECK(pwrite(second, copy, sizeof copy, other) == sizeof copy);
    close(file);
    close(second);
    CHECK(load_one(5) == UCM_CORRUPT);
    dump_all();
    CHECK(visible() == BLOCKS);
}

static void another_handle_follows(settings with)
{
    uint32_t removed;
    uint8_t found[BLOCKS];
    ucm_segments *reader = open_another(with);
    (void)ucm_segments_delete(store, ids, BLOCKS, &removed);
    for (uint32_t block = 0; block < BLOCKS; block++) {
        ucm_row rows[PIECES];
        ucm_batch *batch;
        uint64_t count = whole_rows(rows, source, block, block + 1);
        CHECK_OK(ucm_segments_dump(store, ids + block * ID, 1, rows, count, &batch));
        CHECK_OK(finish(batch, 0));
        ucm_batch_release(batch);
        CHECK_OK(ucm_segments_lookup(reader, ids + block * ID, 1, 0, 0, found));
        CHECK(found[0]);
        count = whole_rows(rows, target, block, block + 1);
        CHECK_OK(ucm_segments_load(reader, ids + block * ID, 1, rows, count, &batch));
        CHECK_OK(finish(batch, 0));
        ucm_batch_release(batch);
        CHECK(!memcmp(source[block], target[block], PAYLOAD));
    }
    ucm_segments_close(reader);
}

/* The table of open blocks holds 4. */
static void dump_first_pieces(int status_when_full)
{
    uint32_t removed;
    CHECK_OK(ucm_segments_delete(store, ids, BLOCKS, &removed));
    for (uint32_t block = 0; block < BLOCKS; block++) {
        ucm_row rows[PIECES];
        ucm_batch *batch;
        whole_rows(rows, source, block, block + 1);
        CHECK_OK(ucm_segments_dump(store, ids + block * ID, 1, rows, 1, &batch));
        CHECK(finish(batch, 0) == (block < 4 ? UCM_OK : status_when_full));
        ucm_batch_release(batch);
    }
    CHECK(visible() == 0);
}

static int dump_number(uint32_t number)
{
    uint8_t id[ID] = {(uint8_t)number, (uint8_t)(number >> 8), 99};
    ucm_row rows[PIECES];
    ucm_batch *batch;
    uint64_t count = whole_rows(rows, source, number % BLOCKS, number % BLOCKS + 1);
    CHECK_OK(ucm_segments_dump(store, id, 1, rows, count, &batch));
    int status = finish(batch, 0);
    ucm_batch_release(batch);
    return status;
}

/* Returns the status of a load; what came must be right. */
static int load_number(uint32_t number)
{
    uint8_t id[ID] = {(uint8_t)number, (uint8_t)(number >> 8), 99};
    ucm_row rows[PIECES];
    ucm_batch *batch;
    uint64_t count = whole_rows(rows, target, number % BLOCKS, number % BLOCKS + 1);
    CHECK_OK(ucm_segments_load(store, id, 1, rows, count, &batch));
    int status = finish(batch, 0);
    ucm_batch_release(batch);
    if (!status)
        CHECK(!memcmp(source[number % BLOCKS], target[number % BLOCKS], PAYLOAD));
    return status;
}

static void the_capacity_holds_and_the_oldest_go(settings with)
{
    enum { NUMBERS = 200 };
    ucm_segments_stats stats;
    with.capacity_bytes = 8 << 20;
    with.segment_bytes = 1 << 20;
    close_store();
    open_store(with);
    for (uint32_t number = 0; number < NUMBERS; number++) {
        CHECK_OK(dump_number(number));
        CHECK_OK(load_number(number));
        CHECK_OK(ucm_segments_get_stats(store, &stats));
        CHECK(stats.stored_bytes <= with.capacity_bytes);
    }
    CHECK(stats.evicted_blocks > NUMBERS / 2 && stats.blocks >= 10);
    uint32_t there = 0;
    for (uint32_t number = 0; number < NUMBERS; number++)
        there += !load_number(number);
    CHECK(there == stats.blocks);

    /* What nobody continues does not hold room for ever. */
    for (uint32_t number = 0; number < 40; number++) {
        uint8_t id[ID] = {(uint8_t)number, 1, 98};
        ucm_row rows[PIECES];
        ucm_batch *batch;
        whole_rows(rows, source, 0, 1);
        CHECK_OK(ucm_segments_dump(store, id, 1, rows, 1, &batch));
        CHECK_OK(finish(batch, 0));
        ucm_batch_release(batch);
        CHECK_OK(dump_number(NUMBERS / 2 + number));
    }
    for (uint32_t number = NUMBERS - 2; number < NUMBERS; number++)
        CHECK_OK(dump_number(number));

    /* Pinned blocks stay whatever comes, leased ones as long as the lease. */
    uint8_t pinned[ID] = {NUMBERS - 1, 0, 99}, leased[ID] = {NUMBERS - 2, 0, 99}, found;
    uint32_t count;
    CHECK_OK(ucm_segments_pin(store, pinned, 1, 1, &count));
    CHECK(count == 1);
    CHECK_OK(ucm_segments_lookup(store, leased, 1, 1, 3600, &found));
    CHECK(found);
    for (uint32_t number = NUMBERS; number < 2 * NUMBERS; number++)
        CHECK_OK(dump_number(number));
    CHECK_OK(load_number(NUMBERS - 1));
    CHECK_OK(load_number(NUMBERS - 2));
    CHECK_OK(ucm_segments_pin(store, pinned, 1, 0, &count));
}

/* The owner may reuse its memory after a cancellation, while a thread still reads it: a race that
 * the store tolerates and that the thread sanitizer must not be shown. */
static void reuse_source(void)
{
#ifndef __SANITIZE_THREAD__
    for (int block = 0; block < BLOCKS; block++)
        source[block][0] ^= 0xFF;
#endif
}

static void a_cancelled_dump_never_becomes_visible(void)
{
    uint32_t removed;
    (void)ucm_segments_delete(store, ids, BLOCKS, &removed);
    for (int i = 0; i < 50; i++) {
        ucm_row rows[BLOCKS * PIECES];
        ucm_batch *batch;
        uint64_t count = whole_rows(rows, source, 0, BLOCKS);
        CHECK_OK(ucm_segments_dump(store, ids, BLOCKS, rows, count, &batch));
        ucm_batch_cancel(batch);
        reuse_source();
        CHECK_OK(ucm_batch_wait(batch, 10 * SECOND_NS));
        ucm_batch_release(batch);
        reuse_source();
        for (uint32_t block = 0; block < BLOCKS; block++)
            if (load_one(block) != UCM_MISSING)
                CHECK(!memcmp(source[block], target[block], PAYLOAD));
    }
}

static void *dump_thread(void *argument)
{
    (void)argument;
    dump_all();
    CHECK(visible() == BLOCKS); /* whoever wrote them */
    return NULL;
}

static void many_writers_of_the_same_blocks_agree(void)
{
    pthread_t threads[4];
    uint32_t removed;
    for (int round = 0; round < 20; round++) {
        (void)ucm_segments_delete(store, ids, BLOCKS, &removed);
        for (int i = 0; i < 4; i++)
            CHECK(!pthread_create(&threads[i], NULL, dump_thread, NULL));
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
    }
    for (uint32_t block = 0; block < BLOCKS; block++)
        CHECK_OK(load_one(block));
}

/* How records are best overwritten is learned from whole ones, whatever jobs wrote them. */
static void every_record_is_learned_from(settings with)
{
    enum { NUMBERS = 60 };
    ucm_batch *batches[2 * PIECES];
    ucm_row rows[PIECES];
    with.capacity_bytes = 4 << 20;
    with.segment_bytes = 1 << 20;
    with.durability = UCM_DURABILITY_NONE;
    with.abandoned_ns = UINT64_MAX; /* between two of its jobs, a block is nobody's */
    open_store(with);
    whole_rows(rows, source, 0, 1);
    for (uint32_t number = 0; number < NUMBERS; number++) {
        uint8_t id[ID] = {(uint8_t)number, 2, 97};
        /* Each piece twice: one of the two jobs finds nothing to write. */
        for (int i = 0; i < 2 * PIECES; i++)
            CHECK_OK(ucm_segments_dump(store, id, 1, rows + i / 2, 1, &batches[i]));
        for (int i = 0; i < 2 * PIECES; i++) {
            CHECK_OK(finish(batches[i], 0));
            ucm_batch_release(batches[i]);
        }
    }
    int learned = 0;
    for (int way = 0; way < UCM_WAYS; way++) {
        uint32_t cost = store->overwriting.costs[way];
        learned += cost > 0;
        /* 64 KiB are never copied, with checksums, in less. */
        CHECK(!cost || cost > 300);
    }
    CHECK(learned > 0 == (with.access == UCM_ACCESS_MAPPED && !store->in_memory));
    close_store();
}

static void all_of_it(settings with)
{
    strcpy(root, "ucm-segments-XXXXXX");
    CHECK(mkdtemp(root));
    snprintf(directory, sizeof directory, "%s/%064d", root, 1);
    CHECK(!mkdir(directory, 0700));
    snprintf(directory, sizeof directory, "%s/%064d/%064d", root, 1, 2);
    CHECK(!mkdir(directory, 0700));
    char folder[300];
    snprintf(folder, sizeof folder, "%s/tmp", directory);
    CHECK(!mkdir(folder, 0700));
    snprintf(folder, sizeof folder, "%s/pins", directory);
    CHECK(!mkdir(folder, 0700));

    open_store(with);
    whole_blocks_come_back();
    any_range_comes_back();
    bad_rows_are_refused_at_the_call();
    a_block_is_visible_with_its_last_piece();
    damage_is_a_miss_and_is_written_anew();
    a_cancelled_dump_never_becomes_visible();
    many_writers_of_the_same_blocks_agree();
    another_handle_follows(with);
    printf("segments: %s, access %u\n", ucm_pool_engine(pool), with.access);
    close_store();
    open_store(with);
    CHECK(visible() == BLOCKS); /* after a restart */
    close_store();
    with.open_blocks = 4;
    open_store(with);
    dump_first_pieces(UCM_BUSY); /* what somebody may still continue stays */
    close_store();
    with.abandoned_ns = 0;
    open_store(with);
    dump_first_pieces(UCM_OK); /* what nobody continues makes room */
    the_capacity_holds_and_the_oldest_go(with);
    close_store();
    every_record_is_learned_from(with);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", root);
    CHECK(system(command) == 0);
}

int main(void)
{
    for (int i = 0; i < BLOCKS * ID; i++)
        ids[i] = (uint8_t)(i * 37 + i / ID);
    for (int block = 0; block < BLOCKS; block++)
        for (int i = 0; i < PAYLOAD; i++)
            source[block][i] = (uint8_t)(i * 31 + i / 255 + block);
    for (uint32_t access = UCM_ACCESS_MAPPED; access <= UCM_ACCESS_NETWORK; access++)
        for (uint32_t engine = UCM_IO_SYNC; engine <= UCM_IO_URING; engine++) {
            settings with = USUAL;
            with.access = access;
            with.engine = engine;
            all_of_it(with);
        }
    return 0;
}
