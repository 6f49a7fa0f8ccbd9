/* SPDX-License-Identifier: MIT */
#include "record.h"

#include "ucm/crc32c.h"

#include <string.h>

static const uint8_t MAGIC[8] = {'U', 'C', 'M', 'K', 'V', 'R', 'E', 'C'};

uint32_t ucm_record_header_bytes(uint32_t piece_count)
{
    uint32_t bytes = (uint32_t)(sizeof(ucm_record) + piece_count * sizeof(ucm_piece));
    return (bytes + UCM_RECORD_ALIGN - 1) / UCM_RECORD_ALIGN * UCM_RECORD_ALIGN;
}

void ucm_record_init(ucm_record *record, const uint8_t *namespace_id, const uint8_t *geometry_id,
                     const uint8_t *block, uint32_t shard, uint32_t shards,
                     const uint32_t *piece_bytes, uint32_t piece_count)
{
    uint32_t header_bytes = ucm_record_header_bytes(piece_count);
    memset(record, 0, header_bytes);
    memcpy(record->magic, MAGIC, sizeof MAGIC);
    record->version = UCM_RECORD_VERSION;
    record->header_bytes = header_bytes;
    record->piece_count = piece_count;
    record->shard = shard;
    record->shards = shards;
    memcpy(record->namespace_id, namespace_id, UCM_ID_BYTES);
    memcpy(record->geometry_id, geometry_id, UCM_ID_BYTES);
    memcpy(record->block, block, UCM_ID_BYTES);
    for (uint32_t i = 0; i < piece_count; i++) {
        record->pieces[i].length = piece_bytes[i];
        record->payload_bytes += piece_bytes[i];
    }
}

void ucm_record_seal(ucm_record *record)
{
    record->header_crc = 0;
    record->header_crc = ucm_crc32c(0, record, record->header_bytes);
}

int ucm_record_check(ucm_record *found, const ucm_record *expected)
{
    if (memcmp(found->magic, MAGIC, sizeof MAGIC))
        return UCM_CORRUPT;
    /* The size comes from the expected header: a damaged one must not choose what is read. */
    uint32_t crc = found->header_crc;
    found->header_crc = 0;
    int whole = ucm_crc32c(0, found, expected->header_bytes) == crc;
    found->header_crc = crc;
    if (!whole)
        return UCM_CORRUPT;
    /* After the checksum, so that a damaged version number is damage and not a foreign record. */
    if (found->version != UCM_RECORD_VERSION)
        return UCM_FORMAT;
    /* Everything but the checksums must be what this block's header says: a swapped file has a
     * valid header of another block. */
    if (found->header_bytes != expected->header_bytes ||
        found->piece_count != expected->piece_count || found->shard != expected->shard ||
        found->shards != expected->shards || found->payload_bytes != expected->payload_bytes ||
        memcmp(found->namespace_id, expected->namespace_id, UCM_ID_BYTES) ||
        memcmp(found->geometry_id, expected->geometry_id, UCM_ID_BYTES) ||
        memcmp(found->block, expected->block, UCM_ID_BYTES))
        return UCM_CORRUPT;
    for (uint32_t i = 0; i < expected->piece_count; i++)
        if (found->pieces[i].length != expected->pieces[i].length)
            return UCM_CORRUPT;
    return UCM_OK;
}
