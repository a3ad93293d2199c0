/* Attention of one token to sections of a cache, exact or coded, in one call.
 *
 * The rows of a block are decoded into the cache of the core, and used there for all query heads that share them. Values that are
 * sums of table rows are not decoded: see tables.h.
 */
#include <stdlib.h>

#include "pairs.h"
#include "parallel.h"
#include "sections.h"
#include "tables.h"

static void attend_part(void *given, long item)
{
    Work *work = given;
    const Sections *a = work->a;
    const long N = a->N, D = a->D, E = a->E, bg = item / work->parts, b = bg / a->G, g = bg % a->G;
    long part = item % work->parts, number = 0, step;
    for (; part >= work->plans[number].parts; number++)
        part -= work->plans[number].parts;
    if (work->plans[number].by_table) {
        attend_tables(work, number, bg, part);
        return;
    }
    const Section *section = a->sections + number;
    long start = part * PART, end = start + PART < section->tokens ? start + PART : section->tokens;
    if (section->held) {
        start = section->held[2 * b] > start ? section->held[2 * b] : start;
        end = section->held[2 * b + 1] < end ? section->held[2 * b + 1] : end;
    }
    const int32_t *position = section->position ? section->position + b * section->position_B + g * section->position_G : NULL;
    Found *found = work->found_BGPN + item * N;
    float *out = work->out_BGPNE + item * N * E;
    float *scores = malloc((N * (BLOCK + D + 1) + BLOCK * (D > E ? D : E)) * sizeof(float));
    if (!scores) {
        work->failed = 1;
        return;
    }
    float *query = scores + N * BLOCK, *shrink = query + N * D, *space = shrink + N;
    take_query(a, section, b, g, query);
    for (long n = 0; n < N; n++)
        found[n] = (Found){-INFINITY, 0};
    memset(out, 0, N * E * sizeof(float));
    for (long first = start; first < end; first += BLOCK) {
        const long tokens = end - first < BLOCK ? end - first : BLOCK, padded = (tokens + WIDTH - 1) / WIDTH * WIDTH;
        long seen = tokens;
        for (long s = 0; s < tokens && position; s++)
            seen -= position[first + s] < 0;
        if (!seen)
            continue;
        const float *rows = rows_of(&section->keys, b, g, first, tokens, D, space, &step);
        for (long n = 0; n < N; n += TILE) {
#define SCORES(count) score_tile(query + n * D, D, rows, step, tokens, count, scores + n * BLOCK, NULL, 0, 0)
            BY_QUERIES(N - n, SCORES)
        }
        mask_scores(a, section, b, first, tokens, BLOCK, scores);
        for (long n = 0; n < N; n++) {
            float *row = scores + n * BLOCK;
            for (long s = 0; s < tokens && seen < tokens; s++) /* the score of a masked key can be NaN */
                row[s] = position[first + s] < 0 ? -INFINITY : row[s];
            for (long s = tokens; s < padded; s++)
                row[s] = -INFINITY;
            shrink[n] = take_in(&found[n], row, padded);
        }
        rows = rows_of(&section->values, b, g, first, tokens, E, space, &step);
        for (long n = 0; n < N; n += TILE) {
#define VALUES(count) weigh_tile(scores + n * BLOCK, rows, step, tokens, shrink + n, count, E, out + n * E, NULL, 0, 0, 0)
            BY_QUERIES(N - n, VALUES)
        }
    }
    free(scores);
}

/* Softmax attention. Returns 0, or 1 if memory allocation fails. Values of masked tokens must be finite. */
int sections(const Sections *a)
{
    Plan plans[a->count + 1];
    Work work = {a, plans, 0, NULL, NULL, 0};
    place_new(a, &a->key, a->D);
    place_new(a, &a->value, a->E);
    for (long i = 0; i < a->count; i++) {
        plan(a, i, &plans[i], work.parts);
        work.parts += plans[i].parts;
    }
    const long N = a->N, items = a->B * a->G * work.parts;
    work.found_BGPN = malloc((items * N + 1) * sizeof(Found));
    work.out_BGPNE = malloc((items * N * a->E + 1) * sizeof(float));
    work.failed = !work.found_BGPN || !work.out_BGPNE;
    for (long i = 0; i < a->count && !work.failed; i++)
        begin_tables(&work, i);
    if (!work.failed)
        parallel(items, a->threads, attend_part, &work);
    for (long i = 0; i < a->count && !work.failed; i++)
        end_tables(&work, i);
    for (long bg = 0; bg < a->B * a->G && !work.failed; bg++)
        for (long n = 0; n < N; n++)
            merge(work.found_BGPN + bg * work.parts * N + n, N, work.out_BGPNE + (bg * work.parts * N + n) * a->E, N * a->E,
                  work.parts, a->E, a->out_BGNE + (bg * N + n) * a->E);
    for (long i = 0; i < a->count; i++) {
        free(plans[i].products);
        free(plans[i].tallies);
    }
    free(work.found_BGPN);
    free(work.out_BGPNE);
    return work.failed;
}
