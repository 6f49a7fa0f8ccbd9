/* SPDX-License-Identifier: MIT */
#ifndef UCM_SEGMENTS_INTERNAL_H
#define UCM_SEGMENTS_INTERNAL_H

#include "ucm/segments.h"

#include "huge_pages.h"
#include "index.h"
#include "overwriting.h"
#include "pool_internal.h"
#include "record.h"
#include "segment_file.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

/* What a slot of a segment is to this handle. */
enum {
    SLOT_INDEXED = 1, /* the index has it */
    SLOT_LOADED = 2,  /* loaded through this handle since it was last considered for eviction */
    SLOT_TAKEN = 4,   /* of a segment that this handle writes: not free for another record */
    SLOT_STORED = 8,  /* its last record came through the mapping */
};

/* A segment is filled in as many places as this at a time: records side by side share a page, and
 * huge pages are made writable by one thread while others wait. */
enum { STRIPES = 4 };

/* A part of the slots of a segment that this handle writes. */
typedef struct {
    uint32_t next_free; /* no slot of the stripe below is free */
    uint32_t writers;   /* records being written */
} stripe;

/* A segment that this handle knows. */
typedef struct {
    ucm_segment_file file;
    char name[UCM_SEGMENT_NAME];
    uint32_t number;     /* index into ucm_segments.segments */
    uint32_t references; /* transfers that use it */
    uint32_t indexed;    /* slots with SLOT_INDEXED */
    uint32_t writers;    /* records being written */
    stripe stripes[STRIPES]; /* STRIPES equal parts of the slots, one after the other */
    int active;          /* this handle writes it and holds its lock */
    int gone;            /* not in the directory any more; freed with its last reference */
    int seen;            /* by the scan that is under way */
    uint64_t hit_noted_ns;
    int hit_since; /* a hit came too soon after that to be noted too */
    int64_t lease_end_s; /* as last noted by this handle */
    uint8_t *slots;      /* SLOT_ flags */
    uint8_t (*keys)[UCM_INDEX_KEY]; /* of the block that the index has for a slot */
    /* Group commit. */
    pthread_mutex_t sync_mutex;
    pthread_cond_t synced;
    uint64_t sync_wanted, sync_done, sync_failed;
    int syncing;
} segment;

/* A block of which some pieces have been dumped; lives in the table until it is published. */
typedef struct {
    uint8_t block[UCM_ID_BYTES];
    int used;          /* 0: free */
    int users;         /* jobs that hold it */
    int failed;        /* never publish */
    int published;
    int ended;         /* publishing has ended with `result` */
    int result;
    uint64_t used_ns;  /* when a job last held it, for giving up what nobody continues */
    int header_written; /* the record's header is written already, past the page cache */
    uint32_t written;  /* pieces accepted */
    segment *segment;  /* where it is written, NULL before the first piece */
    uint32_t slot;
    ucm_way way;      /* how it is written there */
    _Atomic uint64_t spent_ns; /* on writing pieces, by all jobs that wrote any */
    pthread_mutex_t opening;
    ucm_record *record;
    uint8_t *claimed; /* per piece: some job writes or has written it */
} open_block;

struct ucm_segments {
    ucm_pool *pool;
    char *root, *path;
    int directory;
    ucm_segment_shape shape;
    uint32_t shard, shards;
    uint32_t piece_count, largest_piece;
    uint32_t *piece_bytes;
    uint64_t *piece_offset; /* piece_count + 1 payload offsets */
    ucm_segment_use use;
    enum ucm_segments_durability durability;
    uint32_t active_segments;
    uint64_t segment_bytes, capacity_bytes, namespace_bytes, unused_s, abandoned_ns, opened_ns;
    _Atomic uint64_t names;
    int in_memory; /* the directory is on a file system in memory */
    _Atomic uint64_t small_until_ns; /* new pages were small ones: not asked before */
    ucm_overwriting overwriting;

    pthread_mutex_t refreshing; /* one scan at a time; taken before `mutex` */
    uint64_t scanned_ns;        /* wall clock of the last scan of the directory */
    uint64_t directory_ns;      /* the directory's mtime then */
    _Atomic uint64_t refreshed_ns;

    pthread_mutex_t mutex; /* guards all below; never held over a system call that may block */
    pthread_cond_t changed; /* a block or a segment has changed its state */
    ucm_index index;
    segment **segments;
    uint32_t segment_count, segment_room;
    uint64_t alone_until_ns; /* no second segment could be made: not tried again before */
    int growing;            /* a thread makes or takes over a segment */
    uint64_t blocks, evicted;
    open_block *table;
    uint32_t table_size;
};

typedef struct {
    char folder[2 * (2 * UCM_ID_BYTES + 2)]; /* NAMESPACE/GEOMETRY */
    char name[UCM_SEGMENT_NAME];
    struct timespec written, loaded;
    uint64_t inode;
    uint64_t bytes; /* 0 when it has been removed */
} ucm_found_segment;

typedef struct {
    ucm_found_segment *found;
    uint32_t count, room;
    uint64_t bytes, own_bytes; /* in all, and of this handle's namespace */
} ucm_census;

/* Returns the piece that holds payload byte `offset`, which is inside the payload. */
uint32_t ucm_segments_piece_at(const ucm_segments *store, uint64_t offset);

/* Finds new, gone and grown segments of the directory. */
void ucm_segments_refresh(ucm_segments *store);

/* Finds a record and takes a reference to its segment, NULL when there is none.  `flags`, which may
 * be NULL, gets the slot's. */
segment *ucm_segments_find(ucm_segments *store, const uint8_t *id, uint32_t shard, uint32_t *slot,
                           uint8_t *flags);
void ucm_segments_let_go(ucm_segments *store, segment *held);

/* Adds an opened file as a segment with the records of its table; takes over `file`. */
int ucm_segments_add(ucm_segments *store, const char *name, ucm_segment_file *file,
                     segment **added);

void ucm_segments_free(segment *ended);

/* Makes the index agree with the table of a segment. */
int ucm_segments_read_table(ucm_segments *store, segment *from);

/* Forgets a segment; `mutex` is held. */
void ucm_segments_forget(ucm_segments *store, segment *lost);

/* Adds or removes a record of the index; `mutex` is held. */
int ucm_segments_insert(ucm_segments *store, segment *into, uint32_t slot, const uint8_t *id);
void ucm_segments_remove(ucm_segments *store, segment *from, uint32_t slot);

/* Copies the name of a segment, which changes when it is taken over. */
void ucm_segments_name(ucm_segments *store, const segment *of, char name[UCM_SEGMENT_NAME]);

/* Takes a record that fails its checks, or that was deleted, out of index and table. */
void ucm_segments_retire(ucm_segments *store, segment *from, uint32_t slot, const uint8_t *id);

/* Says to all handles that the segment is in use, until `lease_s` from now. */
void ucm_segments_note_hit(ucm_segments *store, segment *hit, double lease_s);

/* Says what was not said yet, before segments are compared by when they were used. */
void ucm_segments_note_hits(ucm_segments *store);

/* Reserves a slot for a record, in a new or taken-over segment where none is free. */
int ucm_segments_reserve(ucm_segments *store, segment **into, uint32_t *slot);

/* Takes the lock under which one handle at a time, over all processes, looks for room.  Returns a
 * file to close, or -1. */
int ucm_segments_lock_capacity(ucm_segments *store, int *status);

void ucm_segments_unlock_capacity(int lock);

/* Removes what a writer that was killed left half made; the capacity's lock is held, under which
 * all segments are made. */
void ucm_segments_sweep(ucm_segments *store);

/* Lists the segments of all namespaces and geometries, the oldest first; free `all->found`. */
int ucm_segments_census(const ucm_segments *store, ucm_census *all);

/* Whether a new segment of so many bytes would be within the limits. */
int ucm_segments_fits(const ucm_segments *store, const ucm_census *all, uint64_t bytes);

/* Removes what nobody has used for the time that the options name. */
void ucm_segments_expire(ucm_segments *store, ucm_census *all);

/* Makes room for `wanted` bytes, by one segment: UCM_OK when a segment of this handle has free
 * slots now, UCM_PENDING when bytes were freed, UCM_NO_SPACE when nothing can go. */
int ucm_segments_evict(ucm_segments *store, ucm_census *all, uint64_t wanted);

/* Takes over a segment whose lock nobody has; with `evict`, frees slots in it. */
int ucm_segments_take_over(ucm_segments *store, const char *old_name, int evict);

/* Looks for free slots from the beginning again; `mutex` is held, here and below. */
void ucm_segments_start_stripes(segment *mine);

/* Whether no slot is free. */
int ucm_segments_is_full(segment *mine);

/* Takes a slot of a segment that is not full, for a record to be written. */
uint32_t ucm_segments_take_slot(segment *mine);

/* Ends the writing of a record that has a slot, which is free again unless it is `kept`. */
void ucm_segments_leave_slot(segment *mine, uint32_t slot, int kept);

/* Puts what a segment holds on the medium. */
int ucm_segments_sync(ucm_segments *store, segment *dirty);

/* Bytes of all segments below the root. */
uint64_t ucm_segments_total(ucm_segments *store);

/* Whether the block is pinned. */
int ucm_segments_pinned(int directory, const uint8_t *id, uint32_t shard);

ucm_block_function ucm_segments_load_block;
ucm_block_function ucm_segments_dump_block;

/* Says how a block is written to the place that it has got. */
void ucm_segments_choose_way(ucm_segments *store, open_block *block);

/* Writes the pieces of rows that nobody else writes, with their checksums; adds how many. */
int ucm_segments_write_pieces(ucm_worker *worker, ucm_segments *store, open_block *block,
                              const ucm_row *row, const ucm_row *end, uint32_t *written);

/* Learns from a record that is whole. */
void ucm_segments_learn_way(ucm_segments *store, open_block *block);

/* Writes the header of a record that has all its pieces, where it is not there yet. */
int ucm_segments_write_header(ucm_worker *worker, ucm_segments *store, open_block *block);

/* Gives up a block that nobody continues, if there is one; returns whether there was.  The caller
 * holds the mutex, which is let go meanwhile. */
int ucm_segments_give_up_abandoned(ucm_segments *store);

/* Ends a block that no job holds and frees its place; takes the mutex. */
void ucm_segments_give_up(ucm_segments *store, open_block *block);

#endif
