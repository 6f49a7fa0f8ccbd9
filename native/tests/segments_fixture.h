/* SPDX-License-Identifier: MIT */
#ifndef UCM_SEGMENTS_FIXTURE_H
#define UCM_SEGMENTS_FIXTURE_H

/* One store over some blocks, for the tests of segments. */
#include "ucm/segments.h"

#include "check.h"
#include "segment_file.h"

#include <string.h>
#include <unistd.h>

enum { PIECES = 5, BLOCKS = 12, ID = 32 };
static const uint32_t PIECE_BYTES[PIECES] = {5000, 4096, 300001, 1, 777};
enum { PAYLOAD = 5000 + 4096 + 300001 + 1 + 777 };
static const uint64_t SECOND_NS = 1000000000u;

static char root[64], directory[256];
static uint8_t ids[BLOCKS * ID], source[BLOCKS][PAYLOAD], target[BLOCKS][PAYLOAD];
static ucm_pool *pool;
static ucm_segments *store;
static const uint8_t NAME[ID] = {1}, GEOMETRY[ID] = {2};

typedef struct {
    uint32_t engine, access, open_blocks, durability;
    uint64_t abandoned_ns, segment_bytes, capacity_bytes;
} settings;

static const settings USUAL = {.open_blocks = 64,
                               .durability = UCM_DURABILITY_GROUP,
                               .abandoned_ns = UINT64_MAX,
                               .segment_bytes = 2 << 20};

static ucm_segments *open_another(settings with)
{
    ucm_segments_options options = {.root = root,
                                    .directory = directory,
                                    .namespace_id = NAME,
                                    .geometry_id = GEOMETRY,
                                    .piece_bytes = PIECE_BYTES,
                                    .piece_count = PIECES,
                                    .shard = 0,
                                    .shards = 1,
                                    .open_blocks = with.open_blocks,
                                    .active_segments = 2,
                                    .access = with.access,
                                    .durability = with.durability,
                                    .abandoned_ns = with.abandoned_ns,
                                    .segment_bytes = with.segment_bytes,
                                    .capacity_bytes = with.capacity_bytes};
    ucm_segments *opened;
    CHECK_OK(ucm_segments_open(&options, pool, &opened));
    return opened;
}

static void open_store(settings with)
{
    ucm_pool_options pool_options = {
        .threads = 3,
        .queue_blocks = 64,
        .engine = with.engine,
        .scratch_bytes =
            (uint32_t)ucm_segments_scratch_bytes(PIECE_BYTES, PIECES, with.access)};
    CHECK_OK(ucm_pool_open(&pool_options, &pool));
    store = open_another(with);
}

static void close_store(void)
{
    CHECK_OK(ucm_pool_close(pool, 10 * SECOND_NS));
    ucm_segments_close(store);
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
    CHECK_OK(ucm_segments_dump(store, ids, BLOCKS, rows, count, &batch));
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
    CHECK_OK(ucm_segments_load(store, ids + block * ID, 1, rows, count, &batch));
    int status = finish(batch, 0);
    ucm_batch_release(batch);
    return status;
}

static uint32_t visible(void)
{
    uint8_t found[BLOCKS];
    uint32_t count = 0;
    CHECK_OK(ucm_segments_lookup(store, ids, BLOCKS, 0, 0, found));
    for (int i = 0; i < BLOCKS; i++)
        count += found[i];
    return count;
}

#endif
