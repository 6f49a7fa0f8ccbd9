/* SPDX-License-Identifier: MIT */
#ifndef UCM_SEGMENT_FILE_H
#define UCM_SEGMENT_FILE_H

#include "ucm/segments.h"

#include "pool_internal.h"

/*
 * One segment as a file.  A header page, a table with an entry per slot, the slots.  All numbers
 * little endian.
 */
enum {
    UCM_SEGMENT_VERSION = 1,
    UCM_SEGMENT_NAME = 96, /* bytes of a file name with its end */
    UCM_PAGE = 4096,
};

typedef struct {
    uint8_t magic[8]; /* "UCMKVSEG" */
    uint32_t version;
    uint32_t header_crc; /* CRC-32C of the page with this field 0 */
    uint8_t namespace_id[UCM_ID_BYTES];
    uint8_t geometry_id[UCM_ID_BYTES];
    uint32_t shard, shards;
    uint32_t slot_count;
    uint32_t record_header_bytes;
    uint64_t slot_bytes; /* a multiple of 4096 */
    uint64_t slots_at;   /* offset of slot 0, a multiple of 4096 */
} ucm_segment_header;

typedef struct {
    uint8_t block[UCM_ID_BYTES];
    uint32_t used; /* 1: the slot holds a whole record; 0: it is free */
    uint32_t record_crc; /* the record's header_crc */
    uint64_t written_s;  /* seconds since 1970 */
    uint8_t reserved[12];
    uint32_t entry_crc; /* CRC-32C of the 60 bytes before */
} ucm_segment_entry;

_Static_assert(sizeof(ucm_segment_header) == 112, "part of the on-disk format");
_Static_assert(sizeof(ucm_segment_entry) == 64, "part of the on-disk format");

/* What all segments of a directory have in common. */
typedef struct {
    uint8_t namespace_id[UCM_ID_BYTES];
    uint8_t geometry_id[UCM_ID_BYTES];
    uint32_t shards;
    uint32_t record_header_bytes;
    uint64_t slot_bytes;
} ucm_segment_shape;

/* How a handle uses segments. */
typedef struct {
    enum ucm_segments_access access;
    int sync;  /* each record is put on the medium before it is published */
    int pages; /* of ucm_huge_pages_open() */
} ucm_segment_use;

/* An open segment. */
typedef struct {
    int file;      /* -1 where it is opened by name when it is needed */
    int direct;    /* the same past the page cache, or -1 */
    uint8_t *map;  /* the whole file, or NULL */
    int writing;   /* this handle has the lock */
    int writable;  /* the mapping may be written */
    int reserved;   /* the file system has room for all of it */
    int overwrites; /* its blocks are allocated */
    int distant;    /* others may write it from other hosts: the cache is not asked */
    uint64_t bytes;
    uint32_t shard, slot_count;
    uint64_t slot_bytes, slots_at;
} ucm_segment_file;

/* Opens and checks a segment.  `writing` also takes its lock: UCM_BUSY when somebody has it.
 * UCM_FORMAT for another version, UCM_CORRUPT for what is no segment of this shape. */
int ucm_segment_open(int directory, const char *name, const ucm_segment_shape *shape,
                     const ucm_segment_use *use, int writing, ucm_segment_file *segment);

/*
 * Makes a segment of `slot_count` slots under a temporary name with its lock held, and renames it
 * to `name`.  UCM_NO_SPACE when the file system cannot hold it.
 */
int ucm_segment_create(int directory, const char *name, const ucm_segment_shape *shape,
                       uint32_t shard, uint32_t slot_count, const ucm_segment_use *use,
                       ucm_segment_file *segment);

void ucm_segment_close(ucm_segment_file *segment);

/* Gives up the lock, and the file descriptors where a mapping is all that is needed. */
void ucm_segment_stop_writing(ucm_segment_file *segment);

/* Copies table entries; an entry that is free or does not pass its check has used 0. */
int ucm_segment_entries(const ucm_segment_file *segment, uint32_t first, uint32_t count,
                        ucm_segment_entry *entries);

/* Fills in an entry's checksum and writes it; NULL clears it.  What it stands for must have been
 * written, for a distant segment to the server. */
int ucm_segment_write_entry(const ucm_segment_file *segment, uint32_t slot,
                            ucm_segment_entry *entry);

static inline uint64_t ucm_segment_slot_at(const ucm_segment_file *segment, uint32_t slot)
{
    return segment->slots_at + slot * segment->slot_bytes;
}

/* Returns the bytes of a file with so many slots. */
uint64_t ucm_segment_bytes(const ucm_segment_shape *shape, uint32_t slot_count);

/*
 * Copies from or to mapped file memory and returns UCM_OK, or UCM_CORRUPT where the file is shorter
 * than its mapping.  `crc` is continued; NULL copies without a checksum.
 */
int ucm_mapped_copy(void *to, const void *from, uint64_t size, uint32_t *crc);

/* Reads a byte each `step` bytes and the last, so that a copy that follows does not wait for the
 * medium. */
int ucm_mapped_touch(const void *from, uint64_t size, uint64_t step);

/* Whether a directory entry is named like a segment. */
int ucm_is_segment_name(const char *name);

#endif
