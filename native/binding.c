/* SPDX-License-Identifier: MIT */
#include "ucm/segments.h"
#include "ucm/attend.h"
#include "ucm/crc32c.h"
#include "ucm/pool.h"
#include "ucm/recut.h"
#include "ucm/rotate.h"
#include "ucm/score.h"
#include "ucm/status.h"
