/* SPDX-License-Identifier: MIT */
#include "index.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_ENTRIES = 1024 };

static void key_of(const uint8_t *id, uint32_t shard, uint64_t key[2])
{
    memcpy(key, id, UCM_INDEX_KEY);
    /* An odd multiplier spreads the shards of a block over the table. */
    key[0] ^= shard * 0x9E3779B97F4A7C15u;
}

int ucm_index_open(ucm_index *index)
{
    index->entries = calloc(FIRST_ENTRIES, sizeof *index->entries);
    index->mask = FIRST_ENTRIES - 1;
    index->count = 0;
    return index->entries ? UCM_OK : UCM_MEMORY;
}

void ucm_index_close(ucm_index *index)
{
    free(index->entries);
    index->entries = NULL;
}

void ucm_index_prefetch(const ucm_index *index, const uint8_t *id, uint32_t shard)
{
    uint64_t key[2];
    key_of(id, shard, key);
    __builtin_prefetch(&index->entries[key[0] & index->mask]);
}

ucm_index_entry *ucm_index_find(const ucm_index *index, const uint8_t *id, uint32_t shard)
{
    uint64_t key[2];
    key_of(id, shard, key);
    for (uint64_t at = key[0] & index->mask; index->entries[at].used; at = (at + 1) & index->mask)
        if (index->entries[at].key[0] == key[0] && index->entries[at].key[1] == key[1])
            return &index->entries[at];
    return NULL;
}

static void put(ucm_index_entry *entries, uint64_t mask, const ucm_index_entry *entry)
{
    uint64_t at = entry->key[0] & mask;
    while (entries[at].used)
        at = (at + 1) & mask;
    entries[at] = *entry;
}

int ucm_index_insert(ucm_index *index, const uint8_t *id, uint32_t shard, uint32_t segment,
                     uint32_t slot)
{
    if (4 * (index->count + 1) > 3 * (index->mask + 1)) {
        uint64_t room = 2 * (index->mask + 1);
        ucm_index_entry *entries = calloc(room, sizeof *entries);
        if (!entries)
            return UCM_MEMORY;
        for (uint64_t at = 0; at <= index->mask; at++)
            if (index->entries[at].used)
                put(entries, room - 1, &index->entries[at]);
        free(index->entries);
        index->entries = entries;
        index->mask = room - 1;
    }
    ucm_index_entry entry = {.segment = segment, .slot = slot, .used = 1};
    key_of(id, shard, entry.key);
    put(index->entries, index->mask, &entry);
    index->count++;
    return UCM_OK;
}

void ucm_index_remove(ucm_index *index, ucm_index_entry *entry)
{
    uint64_t mask = index->mask, hole = (uint64_t)(entry - index->entries);
    /* What follows moves up unless it is already as near to its place as it can be: no markers are
     * left behind, so a table that changes for ever does not slow down. */
    for (uint64_t at = (hole + 1) & mask; index->entries[at].used; at = (at + 1) & mask) {
        uint64_t home = index->entries[at].key[0] & mask;
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            index->entries[hole] = index->entries[at];
            hole = at;
        }
    }
    index->entries[hole].used = 0;
    index->count--;
}
