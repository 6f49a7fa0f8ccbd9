/* SPDX-License-Identifier: MIT */
#ifndef UCM_BLOCKFILE_INTERNAL_H
#define UCM_BLOCKFILE_INTERNAL_H

#include "ucm/blockfile.h"

#include "pool_internal.h"
#include "record.h"

#include <pthread.h>
#include <stdatomic.h>

enum { UCM_PATH_BYTES = 160 };

/* A block of which some pieces have been dumped; lives in the table until it is published. */
typedef struct {
    uint8_t block[UCM_ID_BYTES];
    int used;          /* 0: free slot */
    int users;         /* jobs that hold it */
    int failed;        /* never publish */
    int published;
    int ended;         /* publishing has ended with `result` */
    int result;
    uint64_t used_ns;  /* when a job last held it, for giving up what nobody continues */
    uint32_t written;  /* pieces accepted */
    int file;
    char temporary[UCM_PATH_BYTES];
    pthread_mutex_t opening;
    ucm_record *record;
    uint8_t *claimed; /* per piece: some job writes or has written it */
} open_block;

struct ucm_blockfile {
    ucm_pool *pool;
    int directory;
    uint8_t namespace_id[UCM_ID_BYTES];
    uint8_t geometry_id[UCM_ID_BYTES];
    uint32_t shard, shards;
    uint32_t piece_count, largest_piece, header_bytes;
    uint32_t *piece_bytes;
    uint64_t *piece_offset; /* piece_count + 1 payload offsets */
    int sync;
    uint64_t opened_ns;
    _Atomic uint64_t names;
    _Atomic uint32_t quarantine_left;
    pthread_mutex_t mutex; /* guards the table; never held over a system call */
    pthread_cond_t changed; /* a slot was published, failed or let go */
    open_block *table;
    uint32_t table_size;
    uint64_t abandoned_ns; /* a block that nobody continued for so long may be given up */
};

/* Writes the path of a shard of a block, relative to the store's directory. */
void ucm_blockfile_path(const uint8_t *block, uint32_t shard, char path[UCM_PATH_BYTES]);

/* Returns the piece that holds payload byte `offset`, which is inside the payload. */
uint32_t ucm_blockfile_piece_at(const ucm_blockfile *store, uint64_t offset);

ucm_block_function ucm_blockfile_load_block;
ucm_block_function ucm_blockfile_dump_block;

/* Removes the temporary file of a slot that no job holds and frees the slot; takes the mutex. */
void ucm_blockfile_give_up(ucm_blockfile *store, open_block *slot);

#endif
