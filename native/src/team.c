/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "ucm/team.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>

/* How compilers start a parallel region; LLVM's and Intel's runtimes have it too. */
typedef void (*parallel)(void (*region)(void *), void *data, unsigned threads, unsigned flags);

static _Thread_local parallel joined;

typedef struct {
    int (*share)(void *work);
    void *work;
    atomic_int status;
} running;

int ucm_team_join(void)
{
    joined = (parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return joined ? UCM_OK : UCM_UNSUPPORTED;
}

void ucm_team_leave(void)
{
    joined = NULL;
}

int ucm_team_joined(void)
{
    return joined != NULL;
}

static void region(void *data)
{
    running *all = data;
    int status = all->share(all->work);
    if (status)
        atomic_store(&all->status, status);
}

int ucm_team_run(int (*share)(void *work), void *work)
{
    if (!joined)
        return share(work);
    running all = {share, work, UCM_OK};
    joined(region, &all, 0, 0);
    return atomic_load(&all.status);
}
