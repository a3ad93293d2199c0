/* Attention of one token to sections of a cache, exact or coded, in one call: the rows of a block are decoded into the cache of
 * the core, and used there for all query heads that share them. */
#include <stdlib.h>

#include "halves.h"
#include "parallel.h"
#include "softmax.h"
#include "tiles.h"
#include "unpack.h"

enum { PART = 512, MOST = 1024 }; /* tokens per work item, a multiple of BLOCK; widest head */
enum { DENSE, UNIFORM };

typedef struct {
    int64_t kind;
    const void *data;             /* DENSE: floats; UNIFORM: bytes, those of a token are contiguous */
    const uint16_t *least, *step; /* of UNIFORM: see uniform.c */
    int64_t data_B, data_G, data_S, least_B, least_G, step_B, step_G; /* strides, in elements */
    int64_t bits, group, by_channel;
} Rows;

typedef struct {
    Rows keys, values;
    const int64_t *held;     /* [B, 2]: first valid token, and the one after the last; NULL: all */
    const int32_t *position; /* [B, G, S], negative: masked; NULL: none is */
    int64_t tokens, position_B, position_G;
} Section;

typedef struct {
    const Section *sections;
    const float *query; /* [B, G, N, D] */
    int64_t count, B, G, N, D, E, query_B, query_G, query_N, threads;
    float scaling;
    float *out_BGNE;
} Sections;

typedef struct {
    const Sections *a;
    long parts;
    Found *found_BGPN;
    float *out_BGPNE;
    int failed;
} Work;

/* The rows of a block of at most BLOCK tokens from `first` on; `to` is space for them. */
static const float *rows_of(const Rows *rows, long b, long g, long first, long tokens, long width, float *to, long *step)
{
    if (rows->kind == DENSE) {
        *step = rows->data_S;
        return (const float *)rows->data + b * rows->data_B + g * rows->data_G + first * rows->data_S;
    }
    const long bytes = width * rows->bits / 8, group = rows->group, parts = width / group;
    const uint8_t *codes = (const uint8_t *)rows->data + b * rows->data_B + g * rows->data_G;
    const uint16_t *least = rows->least + b * rows->least_B + g * rows->least_G;
    const uint16_t *steps = rows->step + b * rows->step_B + g * rows->step_G;
    uint8_t levels[MOST];
    float lows[MOST], ups[MOST];
    *step = width;
    for (long s = first; s < first + tokens; s++) {
        float *row = to + (s - first) * width;
        unpack_any(codes + s * bytes, levels, width, (int)rows->bits);
        if (rows->by_channel) {
            if (s == first || s % group == 0) {
                from_halves(least + s / group * width, lows, width);
                from_halves(steps + s / group * width, ups, width);
            }
            for (long d = 0; d < width; d++)
                row[d] = lows[d] + ups[d] * (float)levels[d];
            continue;
        }
        for (long part = 0; part < parts; part++) {
            const float low = from_half(least[s * parts + part]), up = from_half(steps[s * parts + part]);
            for (long d = part * group; d < (part + 1) * group; d++)
                row[d] = low + up * (float)levels[d];
        }
    }
    return to;
}

static void attend_part(void *given, long item)
{
    Work *work = given;
    const Sections *a = work->a;
    const long N = a->N, D = a->D, E = a->E, bg = item / work->parts, b = bg / a->G, g = bg % a->G;
    const Section *section = a->sections;
    long part = item % work->parts, step;
    for (; part >= (section->tokens + PART - 1) / PART; section++)
        part -= (section->tokens + PART - 1) / PART;
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
    for (long n = 0; n < N; n++) {
        const float *from = a->query + b * a->query_B + g * a->query_G + n * a->query_N;
        for (long d = 0; d < D; d++)
            query[n * D + d] = from[d] * a->scaling;
        found[n] = (Found){-INFINITY, 0};
    }
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
    long parts = 0;
    for (long i = 0; i < a->count; i++)
        parts += (a->sections[i].tokens + PART - 1) / PART;
    const long N = a->N, items = a->B * a->G * parts;
    Work work = {a, parts, malloc((items * N + 1) * sizeof(Found)), malloc((items * N * a->E + 1) * sizeof(float)), 0};
    if (work.found_BGPN && work.out_BGPNE) {
        parallel(items, a->threads, attend_part, &work);
        for (long bg = 0; bg < a->B * a->G && !work.failed; bg++)
            for (long n = 0; n < N; n++)
                merge(work.found_BGPN + bg * parts * N + n, N, work.out_BGPNE + (bg * parts * N + n) * a->E, N * a->E, parts,
                      a->E, a->out_BGNE + (bg * N + n) * a->E);
    } else
        work.failed = 1;
    free(work.found_BGPN);
    free(work.out_BGPNE);
    return work.failed;
}
