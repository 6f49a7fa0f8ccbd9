/* SPDX-License-Identifier: MIT */
/* How records come into segments: through a mapping, by writes, or past the page cache. */
#define _GNU_SOURCE
#include "segments_internal.h"

#include "ucm/crc32c.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

enum { PARTS = 64, WRITE_BYTES = 256 * 1024 }; /* pieces and bytes in one write: still cached */
static const uint64_t SMALL_NS = 10000000000; /* huge pages may be had again by then */

static uint64_t place(const open_block *block)
{
    return ucm_segment_slot_at(&block->segment->file, block->slot);
}

static int write_parts(ucm_worker *worker, int file, uint64_t offset, struct iovec *parts,
                       int part_count)
{
    uint64_t bytes = 0;
    for (int i = 0; i < part_count; i++)
        bytes += parts[i].iov_len;
    ucm_io_request request = {.file = file,
                              .operation = UCM_IO_WRITE,
                              .offset = offset,
                              .parts = parts,
                              .part_count = part_count};
    int status = ucm_io_run(worker->io, &request, 1);
    if (status)
        return status;
    if (request.error)
        return ucm_status_from_errno(request.error);
    return request.transferred == bytes ? UCM_OK : UCM_NO_SPACE;
}

/* Whether this job is the one that writes the piece. */
static int claim(ucm_segments *store, open_block *block, uint32_t piece)
{
    pthread_mutex_lock(&store->mutex);
    int mine = !block->claimed[piece];
    block->claimed[piece] = 1;
    pthread_mutex_unlock(&store->mutex);
    return mine;
}

/* The same for all of them at once; none where another job has any. */
static int claim_all(ucm_segments *store, open_block *block)
{
    pthread_mutex_lock(&store->mutex);
    int mine = !memchr(block->claimed, 1, store->piece_count);
    if (mine)
        memset(block->claimed, 1, store->piece_count);
    pthread_mutex_unlock(&store->mutex);
    return mine;
}

/* Stores pieces into mapped blocks that are allocated already, with their checksums. */
static int store_rows(ucm_segments *store, open_block *block, const ucm_row *row,
                      const ucm_row *end, uint32_t *written)
{
    uint8_t *payload =
        block->segment->file.map + place(block) + store->shape.record_header_bytes;
    for (; row != end; row++) {
        uint32_t piece = ucm_segments_piece_at(store, row->offset), crc = 0;
        if (!claim(store, block, piece))
            continue;
        if (ucm_mapped_copy(payload + row->offset, (const void *)(uintptr_t)row->address,
                            row->length, &crc))
            return UCM_IO; /* somebody has truncated the file */
        block->record->pieces[piece].crc = crc;
        (*written)++;
    }
    return UCM_OK;
}

/* Writes the rows' pieces; adjacent ones go in one call. */
static int write_rows(ucm_worker *worker, ucm_segments *store, open_block *block,
                      const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    uint64_t payload = place(block) + store->shape.record_header_bytes;
    while (row != end) {
        struct iovec parts[PARTS];
        int count = 0;
        uint64_t start = 0, next = 0;
        for (; row != end && count < PARTS; row++) {
            uint32_t piece = ucm_segments_piece_at(store, row->offset);
            if (count && (row->offset != next || next - start >= WRITE_BYTES))
                break;
            if (!claim(store, block, piece))
                continue;
            const void *source = (const void *)(uintptr_t)row->address;
            block->record->pieces[piece].crc = ucm_crc32c(0, source, row->length);
            if (!count)
                start = row->offset;
            next = row->offset + row->length;
            parts[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)row->address,
                                            .iov_len = row->length};
        }
        if (!count)
            continue;
        int status = write_parts(worker, block->segment->file.file, payload + start, parts, count);
        if (status)
            return status;
        *written += (uint32_t)count;
    }
    return UCM_OK;
}

/* Puts a whole record together in scratch memory and writes it past the page cache. */
static int write_direct(ucm_worker *worker, ucm_segments *store, open_block *block,
                        const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    uint32_t header_bytes = store->shape.record_header_bytes;
    uint8_t *record = worker->scratch + header_bytes;
    for (; row != end; row++) {
        uint32_t piece = ucm_segments_piece_at(store, row->offset);
        block->record->pieces[piece].crc =
            ucm_crc32c_copy(0, record + header_bytes + row->offset,
                            (const void *)(uintptr_t)row->address, row->length);
    }
    *written = store->piece_count;
    ucm_record_seal(block->record);
    memcpy(record, block->record, header_bytes);
    block->header_written = 1;
    struct iovec part = {.iov_base = record, .iov_len = store->shape.slot_bytes};
    return write_parts(worker, block->segment->file.direct, place(block), &part, 1);
}

/* Whether the rows are all pieces, each once and in order. */
static int is_whole(const ucm_segments *store, const ucm_row *row, const ucm_row *end)
{
    uint32_t piece = 0;
    for (; row != end && piece < store->piece_count; row++, piece++)
        if (row->offset != store->piece_offset[piece])
            return 0;
    return row == end && piece == store->piece_count;
}

/*
 * Whether a place can be stored to in huge pages.  It would be read from the medium for that,
 * unless it is in the page cache or nothing was ever written there; then new pages are made, in
 * vain where they are small ones: that is not tried again soon.
 */
static int in_huge_pages(ucm_segments *store, const ucm_segment_file *file, uint64_t at,
                         ucm_cached cached)
{
    const uint64_t bytes = file->slot_bytes, now = ucm_now_ns();
    const int new = !file->overwrites;
    if (store->use.pages < 0 || (new ? !file->reserved : cached == UCM_UNCACHED) ||
        at / UCM_HUGE_PAGE == file->bytes / UCM_HUGE_PAGE) /* the last ones of a file are small */
        return 0;
    if ((new && now < atomic_load(&store->small_until_ns)) ||
        ucm_mapped_touch(file->map + at, bytes, UCM_HUGE_PAGE))
        return 0;
    const uint64_t huge = ucm_huge_pages_in(store->use.pages, file->map + at, bytes);
    if (new && !huge)
        atomic_store(&store->small_until_ns, now + SMALL_NS);
    return huge >= bytes / 4 * 3;
}

void ucm_segments_choose_way(ucm_segments *store, open_block *block)
{
    const ucm_segment_file *file = &block->segment->file;
    uint8_t *flags = &block->segment->slots[block->slot];
    block->way = UCM_WRITTEN;
    if (!file->writable)
        return;
    if (store->in_memory) { /* nothing is ever written back */
        block->way = file->overwrites ? UCM_STORED : UCM_WRITTEN;
        return;
    }
    const ucm_cached cached = ucm_cached_state(file->file, place(block), file->slot_bytes);
    const int huge = in_huge_pages(store, file, place(block), cached);
    pthread_mutex_lock(&store->mutex);
    if (huge)
        block->way = UCM_STORED_HUGE;
    else if (file->overwrites)
        block->way = ucm_overwriting_way(&store->overwriting, *flags & SLOT_STORED,
                                         cached == UCM_DIRTY);
    *flags &= (uint8_t)~SLOT_STORED; /* until all of it has been */
    pthread_mutex_unlock(&store->mutex);
}

void ucm_segments_learn_way(ucm_segments *store, open_block *block)
{
    const ucm_segment_file *file = &block->segment->file;
    if (!file->writable || !file->overwrites || store->in_memory || block->way == UCM_STORED_HUGE)
        return;
    ucm_overwriting_learn(&store->overwriting, block->way, file->slot_bytes,
                          atomic_load(&block->spent_ns));
    if (block->way == UCM_WRITTEN)
        return;
    pthread_mutex_lock(&store->mutex);
    block->segment->slots[block->slot] |= SLOT_STORED;
    pthread_mutex_unlock(&store->mutex);
}

static int write_pieces(ucm_worker *worker, ucm_segments *store, open_block *block,
                        const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    const ucm_segment_file *file = &block->segment->file;
    if (block->way != UCM_WRITTEN)
        return store_rows(store, block, row, end, written);
    if (file->direct >= 0 && is_whole(store, row, end) && claim_all(store, block))
        return write_direct(worker, store, block, row, end, written);
    return write_rows(worker, store, block, row, end, written);
}

int ucm_segments_write_pieces(ucm_worker *worker, ucm_segments *store, open_block *block,
                              const ucm_row *row, const ucm_row *end, uint32_t *written)
{
    const uint64_t began = ucm_now_ns();
    int status = write_pieces(worker, store, block, row, end, written);
    if (*written)
        atomic_fetch_add(&block->spent_ns, ucm_now_ns() - began);
    return status;
}

int ucm_segments_write_header(ucm_worker *worker, ucm_segments *store, open_block *block)
{
    const ucm_segment_file *file = &block->segment->file;
    const uint32_t header_bytes = store->shape.record_header_bytes;
    if (block->header_written)
        return UCM_OK;
    if (block->way != UCM_WRITTEN)
        return ucm_mapped_copy(file->map + place(block), block->record, header_bytes, NULL)
                   ? UCM_IO /* somebody has truncated the file */
                   : UCM_OK;
    struct iovec header = {.iov_base = block->record, .iov_len = header_bytes};
    int status = write_parts(worker, file->file, place(block), &header, 1);
    if (!status && file->distant && fdatasync(file->file))
        status = ucm_status_from_errno(errno);
    return status;
}
