/* SPDX-License-Identifier: MIT */
#ifndef UCM_INDEX_H
#define UCM_INDEX_H

#include "pool_internal.h"

/*
 * Where the records are: a hash table with open addressing and linear probing from a block id and
 * shard to a segment and slot.  Block ids are digests, so their first bytes are the hash; 16 of
 * their 32 bytes are kept, and the record itself is checked against all of them when it is loaded.
 * Not thread-safe.
 */
enum { UCM_INDEX_KEY = 16 }; /* bytes of an id that the index goes by */

typedef struct {
    uint64_t key[2]; /* of the id, the shard mixed in */
    uint32_t segment, slot;
    uint32_t used;
    uint32_t reserved;
} ucm_index_entry;

_Static_assert(sizeof(ucm_index_entry) == 32, "two entries a cache line");

typedef struct {
    ucm_index_entry *entries;
    uint64_t mask; /* entries - 1, a power of two less one */
    uint64_t count;
} ucm_index;

int ucm_index_open(ucm_index *index);
void ucm_index_close(ucm_index *index);

/* Returns the entry of a record, NULL when there is none; valid until the next change. */
ucm_index_entry *ucm_index_find(const ucm_index *index, const uint8_t *id, uint32_t shard);

/* Starts to bring what ucm_index_find will read nearer. */
void ucm_index_prefetch(const ucm_index *index, const uint8_t *id, uint32_t shard);

/* Adds a record that is not there yet.  UCM_MEMORY leaves the index as it was. */
int ucm_index_insert(ucm_index *index, const uint8_t *id, uint32_t shard, uint32_t segment,
                     uint32_t slot);

void ucm_index_remove(ucm_index *index, ucm_index_entry *entry);

#endif
