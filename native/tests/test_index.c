/* SPDX-License-Identifier: MIT */
/* The index against an array that says the same in the plainest way. */
#include "index.h"

#include "check.h"

#include <string.h>

enum { IDS = 5000, SHARDS = 2, STEPS = 200000 };

static uint8_t ids[IDS][UCM_ID_BYTES];
static uint32_t slots[IDS][SHARDS]; /* slot + 1, 0 for none */

static uint32_t next(void)
{
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

int main(void)
{
    ucm_index index;
    CHECK_OK(ucm_index_open(&index));
    for (int i = 0; i < IDS; i++)
        for (int byte = 0; byte < UCM_ID_BYTES; byte++)
            /* Few different first bytes: long runs of neighbours, which removing has to keep. */
            ids[i][byte] = (uint8_t)(byte < 2 ? next() % 4 : next());
    uint64_t count = 0;
    for (int step = 0; step < STEPS; step++) {
        uint32_t i = next() % IDS, shard = next() % SHARDS, slot = next() % 1000;
        ucm_index_entry *entry = ucm_index_find(&index, ids[i], shard);
        CHECK(!entry == !slots[i][shard]);
        if (entry) {
            CHECK(entry->slot + 1 == slots[i][shard] && entry->segment == i);
            if (next() % 3)
                continue;
            ucm_index_remove(&index, entry);
            slots[i][shard] = 0;
            count--;
        } else {
            CHECK_OK(ucm_index_insert(&index, ids[i], shard, i, slot));
            slots[i][shard] = slot + 1;
            count++;
        }
        CHECK(index.count == count);
    }
    for (uint32_t i = 0; i < IDS; i++)
        for (uint32_t shard = 0; shard < SHARDS; shard++)
            CHECK(!ucm_index_find(&index, ids[i], shard) == !slots[i][shard]);
    ucm_index_close(&index);
    return 0;
}
