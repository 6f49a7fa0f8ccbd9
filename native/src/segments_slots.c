/* SPDX-License-Identifier: MIT */
/* Which slots of a segment are written next: in stripes, so that writers are apart. */
#include "segments_internal.h"

static uint32_t stripe_start(const segment *of, uint32_t number)
{
    return (uint32_t)((uint64_t)of->file.slot_count * number / STRIPES);
}

void ucm_segments_start_stripes(segment *mine)
{
    for (uint32_t i = 0; i < STRIPES; i++)
        mine->stripes[i].next_free = stripe_start(mine, i);
}

/* Returns the number of the stripe with the fewest writers that has a free slot, STRIPES when none
 * has one. */
static uint32_t free_stripe(segment *mine)
{
    uint32_t best = STRIPES;
    for (uint32_t i = 0; i < STRIPES; i++) {
        stripe *one = &mine->stripes[i];
        const uint32_t end = stripe_start(mine, i + 1);
        while (one->next_free < end && mine->slots[one->next_free] & SLOT_TAKEN)
            one->next_free++;
        if (one->next_free < end &&
            (best == STRIPES || one->writers < mine->stripes[best].writers))
            best = i;
    }
    return best;
}

int ucm_segments_is_full(segment *mine) { return free_stripe(mine) == STRIPES; }

uint32_t ucm_segments_take_slot(segment *mine)
{
    stripe *one = &mine->stripes[free_stripe(mine)];
    mine->slots[one->next_free] |= SLOT_TAKEN;
    mine->writers++;
    one->writers++;
    return one->next_free;
}

void ucm_segments_leave_slot(segment *mine, uint32_t slot, int kept)
{
    uint32_t number = 0;
    while (slot >= stripe_start(mine, number + 1))
        number++;
    stripe *one = &mine->stripes[number];
    mine->writers--;
    one->writers--;
    if (kept)
        return;
    mine->slots[slot] &= (uint8_t)~SLOT_TAKEN;
    if (one->next_free > slot)
        one->next_free = slot;
}
