/* SPDX-License-Identifier: MIT */
/*
 * Takes the power away.  The wrappers below remember what was on the medium after each sync: the
 * bytes of a file, the names in a directory.  A crash leaves that, and of everything newer any
 * pages and any names.  A store that is opened on it has every block whose dump had ended, and no
 * wrong one.
 */
#define _GNU_SOURCE
#include "ucm/segments.h"

#include "check.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ID = 32, PAGE = 4096, PIECES = 2, PAYLOAD = 5000 + 70001, MOST = 64, BLOCKS = 40 };
static const uint32_t PIECE_BYTES[PIECES] = {5000, 70001};
static const uint64_t SECOND_NS = 1000000000u;

typedef struct {
    ino_t inode;
    uint8_t *bytes;
    size_t size;
} synced_file;

typedef struct {
    char name[256];
    ino_t inode;
} synced_name;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static synced_file files[MOST];
static synced_name names[MOST];
static int file_count, name_count;
static int watching, syncs_to_crash, crashed;
static char root[64], directory[256], after_root[64], after[256];
static int acknowledged, acknowledged_then;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static uint8_t *contents(int file, size_t *size)
{
    struct stat information;
    CHECK(!fstat(file, &information));
    *size = (size_t)information.st_size;
    uint8_t *bytes = malloc(*size + 1);
    CHECK(bytes);
    CHECK(pread(file, bytes, *size, 0) == (ssize_t)*size);
    return bytes;
}

static int list(const char *path, synced_name *found)
{
    int count = 0;
    DIR *listing = opendir(path);
    CHECK(listing);
    for (struct dirent *entry; (entry = readdir(listing));)
        if (strstr(entry->d_name, ".seg")) {
            CHECK(count < MOST);
            found[count].inode = entry->d_ino;
            snprintf(found[count++].name, sizeof found->name, "%s", entry->d_name);
        }
    closedir(listing);
    return count;
}

static synced_file *file_of(ino_t inode)
{
    for (int i = 0; i < file_count; i++)
        if (files[i].inode == inode)
            return &files[i];
    return NULL;
}

/* What a sync has put on the medium. */
static void remember(int file)
{
    struct stat information;
    CHECK(!fstat(file, &information));
    if (S_ISDIR(information.st_mode)) {
        name_count = list(directory, names);
        return;
    }
    synced_file *known = file_of(information.st_ino);
    if (!known) {
        CHECK(file_count < MOST);
        known = &files[file_count++];
        *known = (synced_file){.inode = information.st_ino};
    }
    free(known->bytes);
    /* The descriptor may be for writing only. */
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    int readable = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(readable >= 0);
    known->bytes = contents(readable, &known->size);
    close(readable);
}

/* Writes what a crash leaves of a file: each page as it was at the last sync, or as it is. */
static void leave(const synced_name *name, int sure)
{
    char path[600];
    size_t size = 0;
    uint8_t *now = NULL;
    synced_name current[MOST];
    int count = list(directory, current);
    for (int i = 0; i < count && !now; i++)
        if (current[i].inode == name->inode) {
            snprintf(path, sizeof path, "%s/%s", directory, current[i].name);
            int file = open(path, O_RDONLY | O_CLOEXEC);
            CHECK(file >= 0);
            now = contents(file, &size);
            close(file);
        }
    const synced_file *then = file_of(name->inode);
    if (!then && (sure || rand() % 2)) {
        free(now);
        return; /* its bytes never reached the medium, nor need its name */
    }
    size_t bytes = then ? then->size : size;
    uint8_t *left = calloc(1, bytes + 1);
    CHECK(left);
    if (then)
        memcpy(left, then->bytes, bytes);
    for (size_t at = 0; now && at < bytes && at < size; at += PAGE) {
        size_t length = bytes - at < PAGE ? bytes - at : PAGE;
        if (at + length <= size && rand() % 2)
            memcpy(left + at, now + at, length);
    }
    snprintf(path, sizeof path, "%s/%s", after, name->name);
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(file >= 0);
    CHECK(write(file, left, bytes) == (ssize_t)bytes);
    close(file);
    free(left);
    free(now);
}

static void crash(void)
{
    synced_name current[MOST];
    int count = list(directory, current);
    for (int i = 0; i < name_count; i++)
        leave(&names[i], 1);
    for (int i = 0; i < count; i++) {
        int known = 0;
        for (int j = 0; j < name_count; j++)
            known |= names[j].inode == current[i].inode;
        if (!known && rand() % 2)
            leave(&current[i], 0);
    }
    acknowledged_then = acknowledged;
    crashed = 1;
}

static int synced(int file, int (*sync)(int))
{
    pthread_mutex_lock(&mutex);
    if (watching && syncs_to_crash && !--syncs_to_crash)
        crash();
    int result = sync(file);
    if (watching && !result)
        remember(file);
    pthread_mutex_unlock(&mutex);
    return result;
}

int fdatasync(int file) { return synced(file, REAL(fdatasync)); }

int fsync(int file) { return synced(file, REAL(fsync)); }

static void make_directory(char *root_path, char *path)
{
    char command[600];
    CHECK(mkdtemp(root_path));
    snprintf(path, 256, "%s/%064d/%064d", root_path, 1, 2);
    snprintf(command, sizeof command, "mkdir -p %s/tmp %s/pins", path, path);
    CHECK(!system(command));
}

static ucm_segments *open_store(ucm_pool *pool, const char *root_path, const char *path,
                                uint32_t access, uint32_t durability, uint64_t capacity)
{
    uint8_t name[ID] = {0}, geometry[ID] = {0};
    ucm_segments_options options = {.root = root_path,
                                    .directory = path,
                                    .namespace_id = name,
                                    .geometry_id = geometry,
                                    .piece_bytes = PIECE_BYTES,
                                    .piece_count = PIECES,
                                    .shards = 1,
                                    .open_blocks = 8,
                                    .active_segments = 2,
                                    .access = access,
                                    .durability = durability,
                                    .abandoned_ns = UINT64_MAX,
                                    .segment_bytes = 400000,
                                    .capacity_bytes = capacity};
    ucm_segments *store;
    CHECK_OK(ucm_segments_open(&options, pool, &store));
    return store;
}

static void fill(uint8_t *payload, int number)
{
    for (int i = 0; i < PAYLOAD; i++)
        payload[i] = (uint8_t)(i * 7 + number * 31 + i / 256);
}

static int transfer(ucm_segments *store, int number, uint8_t *payload, int loads)
{
    uint8_t id[ID] = {(uint8_t)number, 1};
    const ucm_row rows[PIECES] = {
        {.length = PIECE_BYTES[0], .address = (uint64_t)(uintptr_t)payload},
        {.length = PIECE_BYTES[1],
         .offset = PIECE_BYTES[0],
         .address = (uint64_t)(uintptr_t)(payload + PIECE_BYTES[0])}};
    ucm_batch *batch;
    CHECK_OK((loads ? ucm_segments_load : ucm_segments_dump)(store, id, 1, rows, PIECES, &batch));
    CHECK_OK(ucm_batch_wait(batch, 10 * SECOND_NS));
    int32_t status;
    ucm_batch_statuses(batch, &status);
    ucm_batch_release(batch);
    return status;
}

/* Returns the number of blocks that a store on what is left has. */
static int check_what_is_left(ucm_pool *pool, uint32_t access, int all_acknowledged)
{
    static uint8_t payload[PAYLOAD], expected[PAYLOAD];
    ucm_segments *store = open_store(pool, after_root, after, access, UCM_DURABILITY_NONE, 0);
    int there = 0;
    for (int number = 0; number < BLOCKS; number++) {
        memset(payload, 0, PAYLOAD);
        fill(expected, number);
        int status = transfer(store, number, payload, 1);
        if (!status)
            CHECK(!memcmp(payload, expected, PAYLOAD));
        if (all_acknowledged && number < acknowledged_then)
            CHECK_OK(status);
        there += !status;
    }
    ucm_segments_close(store);
    return there;
}

static int power_cut(uint32_t access, uint32_t durability, uint64_t capacity, int syncs)
{
    static uint8_t payload[PAYLOAD];
    char command[200];
    snprintf(root, sizeof root, "ucm-power-XXXXXX");
    snprintf(after_root, sizeof after_root, "ucm-after-XXXXXX");
    make_directory(root, directory);
    make_directory(after_root, after);
    ucm_pool_options options = {
        .threads = 2,
        .queue_blocks = 8,
        .scratch_bytes =
            (uint32_t)ucm_segments_scratch_bytes(PIECE_BYTES, PIECES, UCM_ACCESS_DIRECT)};
    ucm_pool *pool;
    CHECK_OK(ucm_pool_open(&options, &pool));
    ucm_segments *store = open_store(pool, root, directory, access, durability, capacity);
    acknowledged = crashed = 0;
    syncs_to_crash = syncs;
    watching = 1;
    for (int number = 0; number < BLOCKS && !crashed; number++) {
        fill(payload, number);
        CHECK_OK(transfer(store, number, payload, 0));
        acknowledged = number + 1;
    }
    if (!crashed)
        crash();
    watching = 0;
    int there = check_what_is_left(pool, access, !capacity);
    ucm_segments_close(store);
    CHECK_OK(ucm_pool_close(pool, 10 * SECOND_NS));
    for (int i = 0; i < file_count; i++)
        free(files[i].bytes);
    file_count = name_count = 0;
    snprintf(command, sizeof command, "rm -rf %s %s", root, after_root);
    CHECK(!system(command));
    return there;
}

int main(void)
{
    srand(1);
    for (uint32_t access = UCM_ACCESS_MAPPED; access <= UCM_ACCESS_NETWORK; access++)
        for (uint32_t durability = UCM_DURABILITY_GROUP; durability <= UCM_DURABILITY_EACH;
             durability++) {
            int there = 0, cuts = 0;
            for (int syncs = 1; syncs < 3 * BLOCKS; syncs += 3 + rand() % 12, cuts++) {
                there += power_cut(access, durability, 0, syncs);
                there += power_cut(access, durability, 1 << 20, syncs);
            }
            CHECK(there > cuts); /* what is checked is there to be checked */
            printf("power: access %u, durability %u: %d cuts, %d blocks left\n", access, durability,
                   2 * cuts, there);
        }
    return 0;
}
