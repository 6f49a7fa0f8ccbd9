/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ucm/blockfile.h"

#include "check.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIECES = 5, BLOCKS = 12, ID = 32 };
static const uint32_t PIECE_BYTES[PIECES] = {5000, 4096, 300001, 1, 777};
enum { PAYLOAD = 5000 + 4096 + 300001 + 1 + 777 };
static const uint64_t SECOND_NS = 1000000000u;

static char directory[64];
static uint8_t ids[BLOCKS * ID], source[BLOCKS][PAYLOAD], target[BLOCKS][PAYLOAD];
static ucm_pool *pool;
static ucm_blockfile *store;

static void open_store(uint32_t engine, uint32_t open_blocks, uint64_t abandoned_ns)
{
    ucm_pool_options pool_options = {
        .threads = 3, .queue_blocks = 64, .engine = engine, .scratch_bytes = 1 << 20};
    CHECK_OK(ucm_pool_open(&pool_options, &pool));
    uint8_t name[ID] = {1}, geometry[ID] = {2};
    ucm_blockfile_options options = {.directory = directory,
                                     .namespace_id = name,
                                     .geometry_id = geometry,
                                     .piece_bytes = PIECE_BYTES,
                                     .piece_count = PIECES,
                                     .shard = 0,
                                     .shards = 1,
                                     .open_blocks = open_blocks,
                                     .abandoned_ns = abandoned_ns,
                                     .sync = 1,
                                     .keep_quarantined = 2};
    CHECK_OK(ucm_blockfile_open(&options, pool, &store));
}

static void close_store(void)
{
    CHECK_OK(ucm_pool_close(pool, 10 * SECOND_NS));
    ucm_blockfile_close(store);
}

static uint64_t whole_rows(ucm_row *rows, uint8_t memory[][PAYLOAD], uint32_t first, uint32_t last)
{
    uint64_t count = 0;
    for (uint32_t block = first; block < last; block++) {
        uint64_t offset = 0;
        for (int piece = 0; piece < PIECES; offset += PIECE_BYTES[piece++])
            rows[count++] = (ucm_row){.block = block - first,
                                      .length = PIECE_BYTES[piece],
                                      .offset = offset,
                                      .address = (uint64_t)(uintptr_t)(memory[block] + offset)};
    }
    return count;
}

static int status_of(const ucm_batch *batch, uint32_t block)
{
    int32_t statuses[BLOCKS];
    ucm_batch_statuses(batch, statuses);
    return statuses[block];
}

static int finish(ucm_batch *batch, uint32_t block)
{
    CHECK_OK(ucm_batch_wait(batch, 10 * SECOND_NS));
    return status_of(batch, block);
}

static void dump_all(void)
{
    ucm_row rows[BLOCKS * PIECES];
    ucm_batch *batch;
    uint64_t count = whole_rows(rows, source, 0, BLOCKS);
    CHECK_OK(ucm_blockfile_dump(store, ids, BLOCKS, rows, count, &batch));
    for (uint32_t block = 0; block < BLOCKS; block++)
        CHECK_OK(finish(batch, block));
    CHECK(ucm_batch_elapsed_ns(batch) > 0);
    ucm_batch_release(batch);
}

static int load_one(uint32_t block)
{
    ucm_row rows[PIECES];
    ucm_batch *batch;
    memset(target[block], 0xEE, PAYLOAD);
    uint64_t count = whole_rows(rows, target, block, block + 1);
    CHECK_OK(ucm_blockfile_load(store, ids + block * ID, 1, rows, count, &batch));
    int status = finish(batch, 0);
    ucm_batch_release(batch);
    return status;
}

static uint32_t visible(void)
{
    uint8_t found[BLOCKS];
    uint32_t count = 0;
    CHECK_OK(ucm_blockfile_lookup(store, ids, BLOCKS, 0, found));
    for (int i = 0; i < BLOCKS; i++)
        count += found[i];
    return count;
}

static void path_of(uint32_t block, char *path, size_t size)
{
    char hex[2 * ID + 1];
    for (int i = 0; i < ID; i++)
        snprintf(hex + 2 * i, 3, "%02x", ids[block * ID + (uint32_t)i]);
    snprintf(path, size, "%s/%.2s/%s.0", directory, hex, hex);
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
        CHECK_OK(ucm_blockfile_load(store, ids, 1, rows, 2, &batch));
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
    CHECK(ucm_blockfile_load(store, ids, 1, &row, 1, &batch) == UCM_INVALID);
    row = (ucm_row){.block = 0, .length = 2, .offset = PAYLOAD - 1, .address = 0};
    CHECK(ucm_blockfile_load(store, ids, 1, &row, 1, &batch) == UCM_INVALID);
    row = (ucm_row){.block = 0, .length = 100, .offset = 0, .address = 0}; /* part of a piece */
    CHECK(ucm_blockfile_dump(store, ids, 1, &row, 1, &batch) == UCM_INVALID);
}

static void a_block_is_visible_with_its_last_piece(void)
{
    uint32_t removed;
    ucm_row rows[PIECES];
    CHECK_OK(ucm_blockfile_delete(store, ids, BLOCKS, &removed));
    CHECK(removed == BLOCKS && visible() == 0);
    whole_rows(rows, source, 3, 4);
    for (int i = PIECES - 1; i >= 0; i--) {
        ucm_batch *batch;
        CHECK(visible() == 0);
        CHECK_OK(ucm_blockfile_dump(store, ids + 3 * ID, 1, rows + i, 1, &batch));
        CHECK_OK(finish(batch, 0));
        ucm_batch_release(batch);
    }
    CHECK(visible() == 1);
    CHECK_OK(load_one(3));
    CHECK(!memcmp(source[3], target[3], PAYLOAD));
}

static uint32_t files_in(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    DIR *folder = opendir(path);
    CHECK(folder);
    uint32_t count = 0;
    for (struct dirent *entry; (entry = readdir(folder));)
        count += entry->d_name[0] != '.';
    closedir(folder);
    return count;
}

static void damage_is_a_miss_and_is_set_aside(void)
{
    char path[256], other[256];
    dump_all();
    uint32_t kept = files_in("quarantine");
    /* One flipped bit in every part of the file, each in a fresh copy. */
    const off_t places[] = {0, 8, 40, 100, 150, 161, 170, 4096, 4096 + PAYLOAD - 1};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        path_of(1, path, sizeof path);
        int file = open(path, O_RDWR);
        uint8_t byte;
        CHECK(file >= 0 && pread(file, &byte, 1, places[i]) == 1);
        byte ^= 4;
        CHECK(pwrite(file, &byte, 1, places[i]) == 1);
        close(file);
        CHECK(load_one(1) == UCM_CORRUPT);
        CHECK(visible() == BLOCKS - 1);
        dump_all();
        CHECK_OK(load_one(1));
    }
    CHECK(files_in("quarantine") <= kept + 2);
    path_of(2, path, sizeof path);
    CHECK(truncate(path, 4096 + 6000) == 0);
    CHECK(load_one(2) == UCM_CORRUPT);
    path_of(4, path, sizeof path);
    path_of(5, other, sizeof other);
    CHECK(rename(path, other) == 0); /* block 4 under block 5's name */
    CHECK(load_one(5) == UCM_CORRUPT);
    for (int i = 0; i < PAYLOAD; i++)
        CHECK(target[5][i] == 0xEE);
    dump_all();
    CHECK(visible() == BLOCKS);
}

/* The table holds 4. */
static void dump_first_pieces(int status_when_full)
{
    uint32_t removed;
    CHECK_OK(ucm_blockfile_delete(store, ids, BLOCKS, &removed));
    for (uint32_t block = 0; block < BLOCKS; block++) {
        ucm_row rows[PIECES];
        ucm_batch *batch;
        whole_rows(rows, source, block, block + 1);
        CHECK_OK(ucm_blockfile_dump(store, ids + block * ID, 1, rows, 1, &batch));
        CHECK(finish(batch, 0) == (block < 4 ? UCM_OK : status_when_full));
        ucm_batch_release(batch);
    }
    CHECK(visible() == 0 && files_in("tmp") == 4);
}

/* Opening a FIFO blocks until somebody writes: a thread that is stuck in the kernel. */
static void a_stuck_read_is_given_up_and_touches_nothing(void)
{
    char path[256];
    ucm_row rows[PIECES];
    ucm_batch *batch;
    path_of(7, path, sizeof path);
    (void)unlink(path);
    *strrchr(path, '/') = '\0';
    (void)mkdir(path, 0700);
    path_of(7, path, sizeof path);
    CHECK(mkfifo(path, 0600) == 0);
    memset(target[7], 0xEE, PAYLOAD);
    uint64_t count = whole_rows(rows, target, 7, 8);
    CHECK_OK(ucm_blockfile_load(store, ids + 7 * ID, 1, rows, count, &batch));
    CHECK(ucm_batch_wait(batch, SECOND_NS / 20) == UCM_TIMEOUT);
    ucm_batch_cancel(batch);
    CHECK(status_of(batch, 0) == UCM_CANCELLED);
    CHECK(!ucm_batch_done(batch));
    int file = open(path, O_WRONLY);
    CHECK(file >= 0);
    close(file);
    CHECK_OK(ucm_batch_wait(batch, 10 * SECOND_NS));
    ucm_batch_release(batch);
    for (int i = 0; i < PAYLOAD; i++)
        CHECK(target[7][i] == 0xEE);
    (void)unlink(path);
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
    (void)ucm_blockfile_delete(store, ids, BLOCKS, &removed);
    for (int i = 0; i < 50; i++) {
        ucm_row rows[BLOCKS * PIECES];
        ucm_batch *batch;
        uint64_t count = whole_rows(rows, source, 0, BLOCKS);
        CHECK_OK(ucm_blockfile_dump(store, ids, BLOCKS, rows, count, &batch));
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
        (void)ucm_blockfile_delete(store, ids, BLOCKS, &removed);
        for (int i = 0; i < 4; i++)
            CHECK(!pthread_create(&threads[i], NULL, dump_thread, NULL));
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
    }
    for (uint32_t block = 0; block < BLOCKS; block++)
        CHECK_OK(load_one(block));
}

int main(void)
{
    for (int i = 0; i < BLOCKS * ID; i++)
        ids[i] = (uint8_t)(i * 37 + i / ID);
    for (int block = 0; block < BLOCKS; block++)
        for (int i = 0; i < PAYLOAD; i++)
            source[block][i] = (uint8_t)(i * 31 + i / 255 + block);
    for (uint32_t engine = UCM_IO_SYNC; engine <= UCM_IO_URING; engine++) {
        strcpy(directory, "ucm-blockfile-XXXXXX");
        CHECK(mkdtemp(directory));
        open_store(engine, 64, UINT64_MAX);
        whole_blocks_come_back();
        any_range_comes_back();
        bad_rows_are_refused_at_the_call();
        a_block_is_visible_with_its_last_piece();
        damage_is_a_miss_and_is_set_aside();
        a_stuck_read_is_given_up_and_touches_nothing();
        a_cancelled_dump_never_becomes_visible();
        many_writers_of_the_same_blocks_agree();
        printf("blockfile: %s\n", ucm_pool_engine(pool));
        close_store();
        open_store(engine, 4, UINT64_MAX);
        dump_first_pieces(UCM_BUSY); /* what somebody may still continue stays */
        close_store();
        open_store(engine, 4, 0);
        dump_first_pieces(UCM_OK); /* what nobody continues makes room */
        close_store();
        CHECK(files_in("tmp") == 0);
        char command[128];
        snprintf(command, sizeof command, "rm -rf %s", directory);
        CHECK(system(command) == 0);
    }
    return 0;
}
