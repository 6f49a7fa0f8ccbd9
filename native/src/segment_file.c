/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "segment_file.h"

#include "huge_pages.h"

#include "ucm/crc32c.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static const uint8_t MAGIC[8] = {'U', 'C', 'M', 'K', 'V', 'S', 'E', 'G'};

static uint64_t page_up(uint64_t bytes) { return (bytes + UCM_PAGE - 1) / UCM_PAGE * UCM_PAGE; }

static uint64_t slots_at(uint32_t slot_count)
{
    return page_up(UCM_PAGE + slot_count * sizeof(ucm_segment_entry));
}

uint64_t ucm_segment_bytes(const ucm_segment_shape *shape, uint32_t slot_count)
{
    return slots_at(slot_count) + slot_count * shape->slot_bytes;
}

int ucm_is_segment_name(const char *name)
{
    size_t length = strlen(name);
    return length > 4 && length < UCM_SEGMENT_NAME && !strcmp(name + length - 4, ".seg");
}

static void fill_header(ucm_segment_header *header, const ucm_segment_shape *shape, uint32_t shard,
                        uint32_t slot_count)
{
    memcpy(header->magic, MAGIC, sizeof MAGIC);
    header->version = UCM_SEGMENT_VERSION;
    memcpy(header->namespace_id, shape->namespace_id, UCM_ID_BYTES);
    memcpy(header->geometry_id, shape->geometry_id, UCM_ID_BYTES);
    header->shard = shard;
    header->shards = shape->shards;
    header->slot_count = slot_count;
    header->record_header_bytes = shape->record_header_bytes;
    header->slot_bytes = shape->slot_bytes;
    header->slots_at = slots_at(slot_count);
}

static int check_header(uint8_t page[UCM_PAGE], const ucm_segment_shape *shape, uint64_t bytes)
{
    ucm_segment_header *header = (ucm_segment_header *)page;
    if (memcmp(header->magic, MAGIC, sizeof MAGIC))
        return UCM_CORRUPT;
    uint32_t crc = header->header_crc;
    header->header_crc = 0;
    if (ucm_crc32c(0, page, UCM_PAGE) != crc)
        return UCM_CORRUPT;
    if (header->version != UCM_SEGMENT_VERSION)
        return UCM_FORMAT;
    if (memcmp(header->namespace_id, shape->namespace_id, UCM_ID_BYTES) ||
        memcmp(header->geometry_id, shape->geometry_id, UCM_ID_BYTES) ||
        header->shards != shape->shards || header->shard >= shape->shards ||
        header->record_header_bytes != shape->record_header_bytes ||
        header->slot_bytes != shape->slot_bytes || !header->slot_count ||
        header->slots_at != slots_at(header->slot_count) ||
        bytes < ucm_segment_bytes(shape, header->slot_count))
        return UCM_CORRUPT;
    return UCM_OK;
}

static int write_all(int file, const void *from, size_t size, uint64_t offset)
{
    const uint8_t *next = from;
    while (size) {
        ssize_t written = pwrite(file, next, size, (off_t)offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written ? ucm_status_from_errno(errno) : UCM_NO_SPACE;
        next += written;
        offset += (uint64_t)written;
        size -= (size_t)written;
    }
    return UCM_OK;
}

static int read_all(int file, void *to, size_t size, uint64_t offset)
{
    uint8_t *next = to;
    while (size) {
        ssize_t bytes = pread(file, next, size, (off_t)offset);
        if (bytes < 0 && errno == EINTR)
            continue;
        if (bytes <= 0)
            return bytes ? ucm_status_from_errno(errno) : UCM_CORRUPT;
        next += bytes;
        offset += (uint64_t)bytes;
        size -= (size_t)bytes;
    }
    return UCM_OK;
}

/* Reading must not change the access time, which says when a block was last wanted. */
static int open_quietly(int directory, const char *name, int flags)
{
    int file = openat(directory, name, flags | O_NOATIME | O_CLOEXEC);
    if (file < 0 && errno == EPERM)
        file = openat(directory, name, flags | O_CLOEXEC);
    return file;
}

static int take_lock(int file)
{
    while (flock(file, LOCK_EX | LOCK_NB))
        if (errno != EINTR)
            return errno == EWOULDBLOCK ? UCM_BUSY : ucm_status_from_errno(errno);
    return UCM_OK;
}

static int map_file(ucm_segment_file *segment, const ucm_segment_use *use, int writing)
{
    int protection = PROT_READ | (writing ? PROT_WRITE : 0);
    void *map = mmap(NULL, segment->bytes, protection, MAP_SHARED, segment->file, 0);
    if (map == MAP_FAILED)
        return ucm_status_from_errno(errno);
    segment->map = map;
    segment->writable = writing;
    if (use->pages >= 0) {
        ucm_huge_pages_for_file(map, segment->bytes);
        /* Of a new file, before its header makes the first page a small one. */
        if (segment->reserved)
            (void)ucm_mapped_touch(map, 1, UCM_PAGE);
    }
    return UCM_OK;
}

static int prepare_access(ucm_segment_file *segment, int directory, const char *name,
                          const ucm_segment_use *use, int writing)
{
    /* A store makes the whole page dirty, which may be a huge one, and each sync would write it. */
    if (use->access == UCM_ACCESS_MAPPED)
        return map_file(segment, use, writing && !use->sync);
    if (use->access >= UCM_ACCESS_DIRECT) {
        segment->distant = use->access == UCM_ACCESS_NETWORK;
        segment->direct = open_quietly(directory, name, (writing ? O_RDWR : O_RDONLY) | O_DIRECT);
        if (segment->direct < 0)
            return ucm_status_from_errno(errno);
        /* What is read by the other way is a page here and there. */
        (void)posix_fadvise(segment->file, 0, 0, POSIX_FADV_RANDOM);
    }
    return UCM_OK;
}

int ucm_segment_open(int directory, const char *name, const ucm_segment_shape *shape,
                     const ucm_segment_use *use, int writing, ucm_segment_file *segment)
{
    uint8_t page[UCM_PAGE];
    struct stat information;
    *segment = (ucm_segment_file){.file = -1, .direct = -1};
    segment->file = open_quietly(directory, name, writing ? O_RDWR : O_RDONLY);
    if (segment->file < 0)
        return ucm_status_from_errno(errno);
    int status = writing ? take_lock(segment->file) : UCM_OK;
    if (!status && fstat(segment->file, &information))
        status = ucm_status_from_errno(errno);
    if (!status)
        status = read_all(segment->file, page, sizeof page, 0);
    if (!status)
        status = check_header(page, shape, (uint64_t)information.st_size);
    if (!status) {
        const ucm_segment_header *header = (const ucm_segment_header *)page;
        segment->shard = header->shard;
        segment->slot_count = header->slot_count;
        segment->slot_bytes = header->slot_bytes;
        segment->slots_at = header->slots_at;
        segment->bytes = ucm_segment_bytes(shape, header->slot_count);
        segment->overwrites = 1;
        segment->writing = writing;
        status = prepare_access(segment, directory, name, use, writing);
    }
    if (status)
        ucm_segment_close(segment);
    else if (!writing)
        ucm_segment_stop_writing(segment);
    return status;
}

int ucm_segments_huge_pages(const char *directory)
{
    enum { BYTES = 2 * UCM_HUGE_PAGE };
    const ucm_segment_use use = {.access = UCM_ACCESS_MAPPED, .pages = ucm_huge_pages_open()};
    ucm_segment_file segment = {.direct = -1, .bytes = BYTES, .reserved = 1};
    int found = 0;
    segment.file = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (segment.file >= 0 && !fallocate(segment.file, 0, 0, BYTES) && !map_file(&segment, &use, 1))
        found = ucm_huge_pages_in(use.pages, segment.map, UCM_HUGE_PAGE) == UCM_HUGE_PAGE;
    ucm_segment_close(&segment);
    if (use.pages >= 0)
        close(use.pages);
    return found;
}

static int preallocate(ucm_segment_file *segment)
{
    const off_t bytes = (off_t)segment->bytes;
    int error;
    do
        error = fallocate(segment->file, 0, 0, bytes) ? errno : 0;
    while (error == EINTR);
    segment->reserved = !error;
    /* A file system without it gives the space as it is written. */
    if (error == EOPNOTSUPP || error == ENOSYS)
        error = ftruncate(segment->file, bytes) ? errno : 0;
    return ucm_status_from_errno(error);
}

int ucm_segment_create(int directory, const char *name, const ucm_segment_shape *shape,
                       uint32_t shard, uint32_t slot_count, const ucm_segment_use *use,
                       ucm_segment_file *segment)
{
    uint8_t page[UCM_PAGE] = {0};
    char temporary[UCM_SEGMENT_NAME + 8];
    ucm_segment_header *header = (ucm_segment_header *)page;
    fill_header(header, shape, shard, slot_count);
    header->header_crc = ucm_crc32c(0, page, sizeof page);
    snprintf(temporary, sizeof temporary, "tmp/%s", name);
    *segment = (ucm_segment_file){.file = -1,
                                  .direct = -1,
                                  .writing = 1,
                                  .bytes = ucm_segment_bytes(shape, slot_count),
                                  .shard = shard,
                                  .slot_count = slot_count,
                                  .slot_bytes = shape->slot_bytes,
                                  .slots_at = header->slots_at};
    segment->file =
        openat(directory, temporary, O_RDWR | O_CREAT | O_EXCL | O_NOATIME | O_CLOEXEC, 0600);
    if (segment->file < 0)
        return ucm_status_from_errno(errno);
    int status = take_lock(segment->file);
    /* Where there are no locks, nobody takes over what another process may still write. */
    if (status == UCM_IO || status == UCM_UNSUPPORTED)
        status = UCM_OK;
    if (!status)
        status = preallocate(segment);
    if (!status)
        status = prepare_access(segment, directory, temporary, use, 1);
    if (!status)
        status = write_all(segment->file, page, sizeof page, 0);
    /* Another host must not see the name before the header. */
    if (!status && (use->sync || segment->distant) && fsync(segment->file))
        status = ucm_status_from_errno(errno);
    if (!status && renameat(directory, temporary, directory, name))
        status = ucm_status_from_errno(errno);
    if (status) {
        (void)unlinkat(directory, temporary, 0);
        ucm_segment_close(segment);
        return status;
    }
    if (use->sync && fsync(directory)) {
        status = ucm_status_from_errno(errno);
        ucm_segment_close(segment);
    }
    return status;
}

void ucm_segment_stop_writing(ucm_segment_file *segment)
{
    if (segment->file < 0)
        return;
    if (segment->writing) {
        /* Stores into a mapping do not move the time by themselves. */
        const struct timespec now[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_NOW}};
        (void)futimens(segment->file, now);
        segment->writing = 0;
    }
    /* A mapping keeps the open file, and so its lock, alive. */
    (void)flock(segment->file, LOCK_UN);
    if (segment->map) {
        /* Thousands of segments are mapped, not kept open. */
        close(segment->file);
        segment->file = -1;
    }
}

void ucm_segment_close(ucm_segment_file *segment)
{
    if (segment->map)
        munmap(segment->map, segment->bytes);
    if (segment->file >= 0) {
        if (segment->writing)
            (void)flock(segment->file, LOCK_UN); /* a child may have inherited the file */
        close(segment->file);
    }
    if (segment->direct >= 0)
        close(segment->direct);
    *segment = (ucm_segment_file){.file = -1, .direct = -1};
}

static uint32_t entry_crc(const ucm_segment_entry *entry)
{
    return ucm_crc32c(0, entry, offsetof(ucm_segment_entry, entry_crc));
}

/* Reads table bytes past the page cache, a page at a time: neither end need be aligned. */
static int read_distant(const ucm_segment_file *segment, uint8_t *to, uint64_t bytes, uint64_t at)
{
    _Alignas(UCM_PAGE) uint8_t page[UCM_PAGE];
    int status = UCM_OK;
    for (uint64_t end = at + bytes, length; at < end && !status; at += length, to += length) {
        length = UCM_PAGE - at % UCM_PAGE;
        if (length > end - at)
            length = end - at;
        status = read_all(segment->direct, page, sizeof page, at / UCM_PAGE * UCM_PAGE);
        memcpy(to, page + at % UCM_PAGE, length);
    }
    return status;
}

int ucm_segment_entries(const ucm_segment_file *segment, uint32_t first, uint32_t count,
                        ucm_segment_entry *entries)
{
    uint64_t at = UCM_PAGE + first * sizeof *entries, bytes = count * sizeof *entries;
    int status;
    if (segment->map)
        status = ucm_mapped_copy(entries, segment->map + at, bytes, NULL);
    else if (segment->distant)
        status = read_distant(segment, (uint8_t *)entries, bytes, at);
    else
        status = read_all(segment->file, entries, bytes, at);
    if (status)
        return status;
    for (uint32_t i = 0; i < count; i++)
        if (entries[i].used != 1 || entries[i].entry_crc != entry_crc(&entries[i]))
            entries[i].used = 0;
    return UCM_OK;
}

int ucm_segment_write_entry(const ucm_segment_file *segment, uint32_t slot,
                            ucm_segment_entry *entry)
{
    static const ucm_segment_entry empty;
    if (entry)
        entry->entry_crc = entry_crc(entry);
    uint64_t at = UCM_PAGE + slot * sizeof *entry;
    const void *from = entry ? entry : &empty;
    if (segment->writable) {
        /* What the entry stands for must be there before it for whoever maps the file. */
        atomic_thread_fence(memory_order_release);
        return ucm_mapped_copy(segment->map + at, from, sizeof *entry, NULL);
    }
    /* Past the cache only whole sectors can be written, and with the entry its neighbours, which
     * somebody else may be deleting. */
    int status = write_all(segment->file, from, sizeof *entry, at);
    if (!status && segment->distant && fdatasync(segment->file))
        status = ucm_status_from_errno(errno);
    return status;
}
