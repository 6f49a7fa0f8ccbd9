/* SPDX-License-Identifier: MIT */
/* Work shared by the threads of an OpenMP runtime, for which this program stands in. */
#include "standin_openmp.h"
#include "ucm/team.h"

enum { WORK = 1000 };

typedef struct {
    atomic_int next, calls, done[WORK];
    int fails_at;
} shared;

static int take(void *given)
{
    shared *work = given;
    int status = UCM_OK;
    atomic_fetch_add(&work->calls, 1);
    for (int i; (i = atomic_fetch_add(&work->next, 1)) < WORK;) {
        atomic_fetch_add(&work->done[i], 1);
        if (i == work->fails_at)
            status = UCM_INVALID;
    }
    return status;
}

static int run(int fails_at, int calls)
{
    shared work = {.fails_at = fails_at};
    int status = ucm_team_run(take, &work);
    CHECK(work.calls == calls);
    for (int i = 0; i < WORK; i++)
        CHECK(work.done[i] == 1);
    return status;
}

static void *has_not_joined(void *unused)
{
    CHECK(!ucm_team_joined());
    CHECK_OK(run(-1, 1));
    return unused;
}

int main(void)
{
    pthread_t other;
    CHECK_OK(run(-1, 1));
    CHECK(!regions && !ucm_team_joined());
    CHECK_OK(ucm_team_join());
    CHECK(ucm_team_joined());
    CHECK_OK(run(-1, THREADS));
    CHECK(regions == 1 && asked_threads == 0);
    CHECK(run(WORK / 2, THREADS) == UCM_INVALID);
    /* Who joins does so for itself. */
    CHECK(!pthread_create(&other, NULL, has_not_joined, NULL) && !pthread_join(other, NULL));
    ucm_team_leave();
    CHECK(!ucm_team_joined());
    CHECK(run(0, 1) == UCM_INVALID);
    CHECK(regions == 2);
    return 0;
}
