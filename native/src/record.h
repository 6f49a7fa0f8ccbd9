/* SPDX-License-Identifier: MIT */
#ifndef UCM_RECORD_H
#define UCM_RECORD_H

#include "ucm/status.h"

#include "pool_internal.h"

#include <stdint.h>

/*
 * The header of a record.  All numbers are little endian; this code runs on little-endian
 * machines only and says so at compile time.
 */
enum { UCM_RECORD_VERSION = 1, UCM_RECORD_ALIGN = 4096 };

typedef struct {
    uint32_t length;
    uint32_t crc; /* CRC-32C of the piece */
} ucm_piece;

typedef struct {
    uint8_t magic[8]; /* "UCMKVREC" */
    uint32_t version;
    uint32_t header_bytes;  /* where the payload starts */
    uint32_t header_crc;    /* CRC-32C of the whole header with this field 0 */
    uint32_t piece_count;
    uint32_t shard, shards;
    uint64_t payload_bytes;
    uint8_t namespace_id[UCM_ID_BYTES];
    uint8_t geometry_id[UCM_ID_BYTES];
    uint8_t block[UCM_ID_BYTES];
    uint8_t reserved[24]; /* 0 */
    ucm_piece pieces[];
} ucm_record;

_Static_assert(sizeof(ucm_record) == 160, "the header is part of the on-disk format");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little endian");

/* Returns the bytes of a header with its piece table, a multiple of UCM_RECORD_ALIGN. */
uint32_t ucm_record_header_bytes(uint32_t piece_count);

/* Fills in everything but the CRCs; `record` has ucm_record_header_bytes bytes. */
void ucm_record_init(ucm_record *record, const uint8_t *namespace_id, const uint8_t *geometry_id,
                     const uint8_t *block, uint32_t shard, uint32_t shards,
                     const uint32_t *piece_bytes, uint32_t piece_count);

/* Sets the header's CRC, the last step before it is written. */
void ucm_record_seal(ucm_record *record);

/*
 * Checks a header that was read against the one that is expected for this block.  UCM_OK,
 * UCM_FORMAT for another version, UCM_CORRUPT for everything else that differs.
 */
int ucm_record_check(ucm_record *found, const ucm_record *expected);

#endif
