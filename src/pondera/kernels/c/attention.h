/* Attention of a few queries to many KV slots: keys and values are read once for all query heads that share them.
 *
 * Slots are processed in blocks that fit into the cache of a core: scores, softmax update and weighted values of a block. A
 * work item is a range of the slots of one KV head of one batch row; the parts are merged at the end.
 */
#ifndef PONDERA_ATTENTION_H
#define PONDERA_ATTENTION_H

#include <stdlib.h>

#include "parallel.h"
#include "softmax.h"
#include "tiles.h"

enum { PART = 512 }; /* slots per work item */

typedef struct {
    const float *query, *keys, *values; /* [B, G, N, D], [B, G, S, D], [B, G, S, E]; values: NULL for scores alone */
    const int64_t *index; /* [B, G, S]: the row of each slot, negative: masked; NULL: slot s is row s */
    const int32_t *position;            /* [B, G, S]: token of the slot; negative: masked */
    const uint8_t *mask;                /* [B, T, K]: allowed tokens per query; NULL: causal */
    int64_t B, G, R, T, S, D, E;        /* N = R * T */
    int64_t query_B, query_G, query_R, query_T, keys_B, keys_G, keys_S, values_B, values_G, values_S; /* strides, in numbers */
    int64_t position_B, position_G, index_B, index_G, mask_B, mask_T, mask_K, start, threads; /* start: of the first query */
    float scaling;
    float *out_BTGRE, *score_BGNS; /* scores are optional (NULL) */
} Attention;

typedef struct {
    const Attention *a;
    long parts;
    Found *found_BGPN;
    float *out_BGPNE;
    int failed;
} Work;

/* Copies the rows of a block into the cache of the core, and asks for those of the next; a masked slot gets zeros. */
static void gather(const float *from, long step, const int64_t *index, long slots, long ahead, long width, float *to)
{
    for (long s = 0; s < slots; s++) {
        const float *row = from + index[s] * step;
        long d = 0;
        if (s + BLOCK < ahead && index[s + BLOCK] >= 0)
            fetch(from + index[s + BLOCK] * step, width);
        if (index[s] < 0) {
            memset(to + s * width, 0, width * sizeof(float));
            continue;
        }
        for (; d + WIDTH <= width; d += WIDTH)
            store(to + s * width + d, load(row + d));
        for (; d < width; d++)
            to[s * width + d] = row[d];
    }
}

/* The additive mask of a query: 0 for allowed slots, else -inf. Returns the number of allowed slots. */
static long look(const Attention *a, long b, long t, const int32_t *position, const int64_t *index, long slots, float *bias)
{
    const uint8_t *mask = a->mask ? a->mask + b * a->mask_B + t * a->mask_T : NULL;
    long seen = 0;
    for (long s = 0; s < slots; s++) {
        const int32_t at = !index ? position[s] : index[s] < 0 ? -1 : position[index[s]];
        int may = at >= 0 && (mask ? mask[at * a->mask_K] : at <= a->start + t);
        bias[s] = may ? 0 : -INFINITY;
        seen += may;
    }
    return seen;
}

/* Whether the slots of a block follow one another so closely that reading all rows of their range is faster than copying. */
static int is_dense(const int64_t *index, long slots)
{
    if (index[0] < 0 || index[slots - 1] - index[0] >= 2 * slots)
        return 0;
    for (long s = 1; s < slots; s++)
        if (index[s] <= index[s - 1])
            return 0;
    return 1;
}

/* As `look` for the rows from `base` on, of which only those in the index are allowed. */
static long look_in_range(const Attention *a, long b, long t, const int32_t *position, const int64_t *index, long slots,
                          int64_t base, long rows, float *bias)
{
    float found[BLOCK];
    long seen = 0;
    look(a, b, t, position, index, slots, found);
    for (long row = 0; row < rows; row++)
        bias[row] = -INFINITY;
    for (long s = 0; s < slots; s++)
        if (index[s] >= base && index[s] < base + rows) {
            bias[index[s] - base] = found[s];
            seen += found[s] == 0;
        }
    return seen;
}

static void attend_part(void *given, long item)
{
    Work *work = given;
    const Attention *a = work->a;
    const long N = a->R * a->T, D = a->D, E = a->E, part = item % work->parts, bg = item / work->parts;
    const long b = bg / a->G, g = bg % a->G, start = part * PART, end = start + PART < a->S ? start + PART : a->S;
    const float *keys = a->keys + b * a->keys_B + g * a->keys_G, *values = a->values + b * a->values_B + g * a->values_G;
    const int32_t *position = a->position + b * a->position_B + g * a->position_G;
    const int64_t *index = a->index ? a->index + b * a->index_B + g * a->index_G : NULL;
    Found *found = work->found_BGPN + item * N;
    float *out = work->out_BGPNE + item * N * E;
    float *scores = malloc((N * (BLOCK + D + 1) + a->T * BLOCK + (index ? BLOCK * (D + E) : 0)) * sizeof(float));
    if (!scores) {
        work->failed = 1;
        return;
    }
    float *query = scores + N * BLOCK, *shrink = query + N * D, *bias = shrink + N, *rows = bias + a->T * BLOCK;
    for (long n = 0; n < N; n++) {
        const float *from = a->query + b * a->query_B + g * a->query_G + n / a->T * a->query_R + n % a->T * a->query_T;
        for (long d = 0; d < D; d++)
            query[n * D + d] = from[d] * a->scaling;
        found[n] = (Found){-INFINITY, 0};
    }
    memset(out, 0, N * E * sizeof(float));
    long passed = 0; /* rows of the range of a dense block that are done */
    for (long first = start; first < end;) {
        const long given_slots = end - first < BLOCK ? end - first : BLOCK;
        const int dense = index && !a->score_BGNS && is_dense(index + first, given_slots);
        const int64_t base = dense ? index[first] + passed : 0, left = dense ? index[first + given_slots - 1] + 1 - base : 0;
        const long slots = !dense ? given_slots : left < BLOCK ? left : BLOCK, padded = (slots + WIDTH - 1) / WIDTH * WIDTH;
        const float *block_keys = keys + first * a->keys_S, *block_values = values + first * a->values_S;
        long keys_S = a->keys_S, values_S = a->values_S;
        const long after = dense ? end - first - BLOCK : index ? 0 : a->S - first - BLOCK;
        const long later = after < 0 ? 0 : after < BLOCK ? after : BLOCK;
        long seen = 0;
        for (long t = 0; t < a->T; t++)
            seen += dense ? look_in_range(a, b, t, position, index + first, given_slots, base, slots, bias + t * BLOCK)
                          : look(a, b, t, index ? position : position + first, index ? index + first : NULL, slots,
                                 bias + t * BLOCK);
        if (dense)
            block_keys = keys + base * keys_S, block_values = values + base * values_S;
        else if (index && (seen || a->score_BGNS)) {
            gather(keys, a->keys_S, index + first, slots, a->S - first, D, rows);
            if (a->values)
                gather(values, a->values_S, index + first, slots, a->S - first, E, rows + BLOCK * D);
            block_keys = rows, block_values = rows + BLOCK * D, keys_S = D, values_S = E;
        }
        if (seen || a->score_BGNS)
            for (long n = 0; n < N; n += TILE) {
#define SCORES(count)                                                                                                       \
    score_tile(query + n * D, D, block_keys, keys_S, slots, count, scores + n * BLOCK,                                      \
               n || (index && !dense) || !a->values ? NULL : block_values, values_S, E)
                BY_QUERIES(N - n, SCORES)
            }
        for (long n = 0; n < N && (seen || a->score_BGNS); n++) {
            float *row = scores + n * BLOCK;
            if (seen < a->T * slots) /* the score of a masked key can be NaN */
                for (long s = 0; s < slots; s++)
                    row[s] = bias[n % a->T * BLOCK + s] == 0 ? row[s] : -INFINITY;
            if (a->score_BGNS)
                memcpy(a->score_BGNS + (bg * N + n) * a->S + first, row, slots * sizeof(float));
            for (long s = slots; s < padded; s++)
                row[s] = -INFINITY;
            shrink[n] = take_in(&found[n], row, padded);
        }
        for (long n = 0; n < N && seen && a->values; n += TILE) {
#define VALUES(count)                                                                                                       \
    weigh_tile(scores + n * BLOCK, block_values, values_S, slots, shrink + n, count, E, out + n * E,                        \
               block_keys + BLOCK * keys_S, keys_S, n ? 0 : later, D)
            BY_QUERIES(N - n, VALUES)
        }
        passed = dense && left > BLOCK ? passed + BLOCK : 0;
        first += passed ? 0 : BLOCK;
    }
    free(scores);
}

/* Softmax attention. Returns 0, or 1 if memory allocation fails. Values of masked slots must be finite. */
static int attend_to_slots(const Attention *a)
{
    const long N = a->R * a->T, parts = a->S > PART ? (a->S + PART - 1) / PART : 1, items = a->B * a->G * parts;
    Work work = {a, parts, malloc(items * N * sizeof(Found)), malloc(items * N * a->E * sizeof(float)), 0};
    if (work.found_BGPN && work.out_BGPNE) {
        parallel(items, a->threads, attend_part, &work);
        for (long bg = 0; bg < a->B * a->G && !work.failed && a->values; bg++)
            for (long n = 0; n < N; n++) {
                long b = bg / a->G, g = bg % a->G, r = n / a->T, t = n % a->T;
                merge(work.found_BGPN + bg * parts * N + n, N, work.out_BGPNE + (bg * parts * N + n) * a->E, N * a->E, parts,
                      a->E, a->out_BTGRE + (((b * a->T + t) * a->G + g) * a->R + r) * a->E);
            }
    } else
        work.failed = 1;
    free(work.found_BGPN);
    free(work.out_BGPNE);
    return work.failed;
}

#endif
