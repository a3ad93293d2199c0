/* The arguments of attention to sections, and what its parts share. */
#ifndef PONDERA_SECTIONS_H
#define PONDERA_SECTIONS_H

#include "lookups.h"
#include "rows.h"
#include "softmax.h"
#include "tiles.h"

enum {
    PART = 512,  /* tokens per work item, a multiple of BLOCK */
    LONG = 4096, /* the same with look-up tables, a multiple of RUN */
    LEAST = 64   /* tokens of a section from which look-up tables are faster */
};

typedef struct {
    Rows keys, values;
    const int64_t *held;     /* [B, 2]: first valid token, and the one after the last; NULL: all */
    const int32_t *position; /* [B, G, S], negative: masked; NULL: none is */
    const int64_t *number;   /* [B]: the column of the first token in the mask; read only if there is a mask */
    int64_t tokens, position_B, position_G;
} Section;

/* A new key or value of each head, and where it is stored before attention; of float32. */
typedef struct {
    const float *from;
    float *to;
    int64_t from_B, from_G, to_B, to_G;
} New;

typedef struct {
    const Section *sections;
    const float *query; /* [B, G, N, D] */
    int64_t count, B, G, N, D, E, query_B, query_G, query_N, threads;
    float scaling;
    float *out_BGNE;
    New key, value;      /* NULL: none */
    const uint8_t *mask; /* [B, K]: whether the query may attend to a token; NULL: to all */
    int64_t mask_B, mask_K;
} Sections;

/* How a section is computed. */
typedef struct {
    long parts, first; /* work items of a head; those of the sections before */
    int by_table;      /* whether values are not decoded */
    int shared;        /* whether tallies take the place of products */
    Lanes *products;   /* [B, G, M, stages, columns]: products of queries with the tables of keys; NULL: keys are decoded */
    Lanes *tallies;    /* [B, G, parts, M, stages, K] */
} Plan;

typedef struct {
    const Sections *a;
    Plan *plans;
    long parts;
    Found *found_BGPN;
    float *out_BGPNE;
    int failed;
} Work;

/* The scaled queries of a head, with coordinates in the order of the keys. */
static void take_query(const Sections *a, const Section *section, long b, long g, float *query)
{
    const int64_t *order = section->keys.kind == RESIDUAL ? section->keys.order : NULL;
    for (long n = 0; n < a->N; n++) {
        const float *from = a->query + b * a->query_B + g * a->query_G + n * a->query_N;
        for (long d = 0; d < a->D; d++)
            query[n * a->D + d] = from[order ? order[d] : d] * a->scaling;
    }
}

static void place_new(const Sections *a, const New *new, long width)
{
    for (long b = 0; b < a->B && new->from; b++)
        for (long g = 0; g < a->G; g++)
            memcpy(new->to + b * new->to_B + g * new->to_G, new->from + b * new->from_B + g * new->from_G, width * sizeof(float));
}

/* Sets the scores of masked tokens of a range to -inf; such a score can be NaN. */
static void mask_scores(const Sections *a, const Section *section, long b, long first, long tokens, long step, float *scores)
{
    if (!a->mask)
        return;
    const uint8_t *mask = a->mask + b * a->mask_B + (section->number[b] + first) * a->mask_K;
    for (long n = 0; n < a->N; n++)
        for (long s = 0; s < tokens; s++)
            scores[n * step + s] = mask[s * a->mask_K] ? scores[n * step + s] : -INFINITY;
}

static long stages_of(const Rows *rows) { return rows->stages[0] + rows->stages[1]; }

#endif
