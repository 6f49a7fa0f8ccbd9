/* SPDX-License-Identifier: MIT */
#ifndef UCM_TEAM_H
#define UCM_TEAM_H

#include "ucm/status.h"

/*
 * Work on the threads of the engine that calls.
 *
 * The threads of an OpenMP runtime go on spinning for a while after a parallel region.  Other
 * threads would share the processors with them; work that one of the engine's threads asks for
 * is done soonest by the same team.  The runtime is found in the process: this library brings none.
 */

/* From now on, the calling thread shares work with its OpenMP team.  It should be one that runs
 * parallel regions anyway: the runtime keeps a team for each thread that does.  UCM_UNSUPPORTED
 * where no runtime has been loaded for all to see. */
int ucm_team_join(void);

/* The calling thread is in no team any more; a fork's child must, its team does not exist. */
void ucm_team_leave(void);

/* Whether the calling thread has joined. */
int ucm_team_joined(void);

/* Calls share(work) at once on every thread of the calling thread's team, or in this thread alone;
 * each call takes what the others have left.  Returns a status that is not UCM_OK if any did. */
int ucm_team_run(int (*share)(void *work), void *work);

#endif
