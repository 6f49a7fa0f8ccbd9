/* SPDX-License-Identifier: MIT */
#include "ucm/attend.h"

#include <stddef.h>

static void attend_piece(const ucm_attend_work *work, uint32_t row_pieces, uint32_t piece,
                         int *status)
{
    const uint32_t first_row = piece % row_pieces * work->row_step;
    const uint32_t head = piece / row_pieces % work->heads;
    const uint32_t part = piece / row_pieces / work->heads;
    const uint32_t left = work->rows - first_row, size = work->pages->size;
    const uint32_t last_row = first_row + (left < work->row_step ? left : work->row_step);
    const uint64_t pages = work->page_count;
    uint32_t first_page = (uint32_t)(pages * part / work->page_parts);
    uint32_t last_page = (uint32_t)(pages * (part + 1) / work->page_parts);
    /* The last of the rows sees nothing in the pages behind its own. */
    const uint32_t query = (last_row - 1) / work->group;
    const uint32_t token = work->tokens ? work->tokens[query] : work->first_token + query;
    if (token / work->pages->tokens < last_page)
        last_page = token / work->pages->tokens + 1;
    const ucm_attend_part one = {head,     work->first_token, work->group, first_row,
                                 last_row, first_page,        last_page,   work->pairs,
                                 work->tokens};
    const size_t rows = (size_t)head * work->rows, at = (size_t)part * work->heads * work->rows;
    ucm_region regions[UCM_ATTEND_REGIONS];
    for (uint32_t i = 0; i < work->region_count; i++) {
        regions[i] = work->regions[i];
        regions[i].queries += rows * size;
    }
    int found = ucm_attend(work->pages, regions, work->region_count, &one, work->peaks + at + rows,
                           work->sums + at + rows, work->outputs + (at + rows) * size);
    if (found)
        *status = found;
}

int ucm_attend_share(void *given)
{
    ucm_attend_work *work = given;
    if (work->region_count > UCM_ATTEND_REGIONS || !work->row_step || !work->group ||
        !work->pages->tokens)
        return UCM_INVALID;
    const uint32_t row_pieces = (work->rows + work->row_step - 1) / work->row_step;
    const uint32_t pieces = work->page_parts * work->heads * row_pieces;
    int status = UCM_OK;
    for (uint32_t piece; (piece = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < pieces;)
        attend_piece(work, row_pieces, piece, &status);
    return status;
}
