/* SPDX-License-Identifier: MIT */
/* Copies of runs that lie side by side on both sides, for recut_template.h. */
enum {
    LONG_RUN = 1024, /* needs no stage: most of its lines are whole */
    RUNS_AHEAD = 24,
    SMALL_PART = 65536, /* is prefetched while the one before it is copied */
};

/* Runs of bytes that lie beside each other in the target, put together. */
typedef struct {
    uint64_t to, bytes;
    uint8_t stage[STAGE_BYTES] __attribute__((aligned(LINE)));
} gathering;

static void finish(gathering *all)
{
    stream(target_at(all->to), all->stage, all->bytes);
    all->bytes = 0;
}

/* Makes room for a run, and begins anew where it does not follow the last one. */
INLINE void make_room(gathering *all, uint64_t to, uint64_t bytes)
{
    if (to != all->to + all->bytes || all->bytes + bytes > STAGE_BYTES) {
        finish(all);
        all->to = to;
    }
}

INLINE void gather(gathering *all, uint64_t to, uint64_t from, uint64_t bytes)
{
    make_room(all, to, bytes);
    copy(all->stage + all->bytes, source_at(from), bytes);
    all->bytes += bytes;
}

typedef enum { PLAIN, LINES, LONG, GATHERED } manner;

INLINE void run(manner how, gathering *all, uint64_t to, uint64_t from, uint64_t bytes)
{
    if (how == LINES)
        stream_lines(target_at(to), source_at(from), bytes);
    else if (how == LONG)
        stream(target_at(to), source_at(from), bytes);
    else if (how == GATHERED)
        gather(all, to, from, bytes);
    else
        copy(target_at(to), source_at(from), bytes);
}

/* The runs of a loop, and what is prefetched meanwhile: what lies `ahead` of each, or, for the
 * `last` ones, a `jump` further. */
typedef struct {
    uint64_t count, from_step, to_step, ahead, last, jump;
} loop;

INLINE void prefetch_run(const loop *runs, uint64_t i, uint64_t from, uint64_t bytes)
{
    from += runs->ahead + (i + runs->last < runs->count ? 0 : runs->jump);
    for (uint64_t j = 0; j < bytes; j += LINE)
        prefetch(from + j);
}

/* Gathers runs that lie beside each other in the target. */
INLINE void gather_beside(gathering *all, uint64_t to, uint64_t from, const loop *runs,
                          uint64_t bytes)
{
    for (uint64_t i = 0; i < runs->count;) {
        make_room(all, to + i * bytes, bytes);
        const uint64_t room = i + (STAGE_BYTES - all->bytes) / bytes;
        const uint64_t end = room < runs->count ? room : runs->count;
        uint8_t *place = all->stage + all->bytes;
        all->bytes += (end - i) * bytes;
        for (; i < end; i++, place += bytes) {
            prefetch_run(runs, i, from + i * runs->from_step, bytes);
            copy(place, source_at(from + i * runs->from_step), bytes);
        }
    }
}

/* Copies the runs of parts whose targets lie beside each other, in turn; `after` them another
 * part begins. */
INLINE void runs_in(manner how, uint64_t bytes, const ucm_recut_plan *plan,
                    const ucm_recut_part *parts, size_t count, uint64_t after, gathering *all)
{
    const size_t outer = plan->loop_count ? plan->loop_count - 1 : 0;
    const ucm_recut_axis *inner = plan->loops + outer; /* or nothing, which is one run */
    loop now = {plan->loop_count ? inner->count : 1, (uint64_t)inner->from_stride,
                (uint64_t)inner->to_stride, 0, 0, 0};
    const int small = plan->part_bytes <= SMALL_PART;
    if (small) {
        now.ahead = after - parts->from;
    } else {
        now.last = now.count < RUNS_AHEAD ? now.count : RUNS_AHEAD;
        now.ahead = now.last * now.from_step;
    }
    const int gaps = now.from_step != bytes && bytes <= LONG_RUN;
    position at = {{0}, 0, 0};
    for (int more = 1; more;) {
        position next = at;
        more = advance(&next, plan->loops, outer);
        if (!small)
            now.jump = (more ? next.from - at.from : after - parts->from - at.from) -
                       now.count * now.from_step;
        if (how == GATHERED && count == 1 && now.to_step == bytes) {
            gather_beside(all, parts->to + at.to, parts->from + at.from, &now, bytes);
            at = next;
            continue;
        }
        for (uint64_t i = 0; i < now.count; i++)
            for (size_t part = 0; part < count; part++) {
                const uint64_t from = parts[part].from + at.from + i * now.from_step;
                if (gaps)
                    prefetch_run(&now, i, from, bytes);
                run(how, all, parts[part].to + at.to + i * now.to_step, from, bytes);
            }
        at = next;
    }
}

/* Runs of some sizes are copied by instructions for that size. */
static void gather_runs(const ucm_recut_plan *plan, const ucm_recut_part *parts, size_t count,
                        uint64_t after, gathering *all)
{
    switch (plan->run_bytes) {
    case 16:
        runs_in(GATHERED, 16, plan, parts, count, after, all);
        break;
    case 32:
        runs_in(GATHERED, 32, plan, parts, count, after, all);
        break;
    case 64:
        runs_in(GATHERED, 64, plan, parts, count, after, all);
        break;
    case 128:
        runs_in(GATHERED, 128, plan, parts, count, after, all);
        break;
    case 160:
        runs_in(GATHERED, 160, plan, parts, count, after, all);
        break;
    default:
        runs_in(GATHERED, plan->run_bytes, plan, parts, count, after, all);
    }
}

static void runs(const ucm_recut_plan *plan, const ucm_recut_part *parts, size_t count)
{
    const uint64_t bytes = plan->run_bytes;
    gathering all;
    all.to = all.bytes = 0;
    for (size_t first = 0, end; first < count; first = end) {
        for (end = first + 1; end < count && (end - first) * bytes < STAGED_BYTES; end++)
            if (plan->lines || parts[end].to != parts[end - 1].to + bytes)
                break;
        const uint64_t after = parts[end < count ? end : first].from;
        if (!plan->streams)
            runs_in(PLAIN, bytes, plan, parts + first, end - first, after, &all);
        else if (plan->lines)
            runs_in(LINES, bytes, plan, parts + first, end - first, after, &all);
        else if (bytes >= LONG_RUN)
            runs_in(LONG, bytes, plan, parts + first, end - first, after, &all);
        else
            gather_runs(plan, parts + first, end - first, after, &all);
    }
    finish(&all);
    if (plan->streams)
        end_streams();
}
