/* Products of a few queries with a block of rows, and weighted sums of the rows, with sums in registers. */
#ifndef PONDERA_TILES_H
#define PONDERA_TILES_H

#include "floats.h"

enum {
    BLOCK = 64,                    /* slots */
    TILE = 4,                      /* queries whose sums stay in registers */
    KEYS = 4,                      /* keys per tile */
    VECTORS = WIDTH == 16 ? 4 : 2, /* vectors of a value per tile */
    LINE = 16                      /* numbers per cache line */
};

/* Asks for a row that is needed soon, while arithmetic on earlier rows goes on. */
INLINE void fetch(const float *row, long width)
{
    for (long d = 0; d < width; d += LINE)
        __builtin_prefetch(row + d);
}

/* Products of queries with rows. */
INLINE void products(const float *query, long query_step, const float *rows, long row_step, long D, int queries, int count,
                     float *scores, long scores_step)
{
    Floats sum[TILE][KEYS] = {0};
    long d = 0;
    for (; d + WIDTH <= D; d += WIDTH)
        for (int s = 0; s < count; s++) {
            Floats row = load(rows + s * row_step + d);
            for (int n = 0; n < queries; n++)
                sum[n][s] += load(query + n * query_step + d) * row;
        }
    for (int n = 0; n < queries; n++) {
        float *to = scores + n * scores_step;
        if (count == KEYS)
            sums_of_four(sum[n], to);
        else
            for (int s = 0; s < count; s++)
                to[s] = sum_of(sum[n][s]);
        for (int s = 0; s < count; s++)
            for (long rest = d; rest < D; rest++)
                to[s] += query[n * query_step + rest] * rows[s * row_step + rest];
    }
}

/* Scores of a block; meanwhile fetches `width` numbers of the rows of `next`, unless it is NULL. */
INLINE void score_tile(const float *query, long D, const float *rows, long row_step, long slots, int queries, float *scores,
                       const float *next, long next_step, long width)
{
    long s = 0;
    for (; s + KEYS <= slots; s += KEYS) {
        for (long row = s; row < s + KEYS && next; row++)
            fetch(next + row * next_step, width);
        products(query, D, rows + s * row_step, row_step, D, queries, KEYS, scores + s, BLOCK);
    }
    for (; s < slots; s++)
        products(query, D, rows + s * row_step, row_step, D, queries, 1, scores + s, BLOCK);
}

/* A part of the vectors of the weighted sums of queries. */
INLINE void weigh(const float *weights, const float *rows, long row_step, long slots, const float *shrink, int queries,
                  int vectors, float *to, long to_step, const float *next, long next_step, long ahead, long width)
{
    Floats sum[TILE][VECTORS];
    for (int n = 0; n < queries; n++)
        for (int v = 0; v < vectors; v++)
            sum[n][v] = load(to + n * to_step + v * WIDTH) * shrink[n];
    for (long s = 0; s < slots; s++) {
        if (s < ahead)
            fetch(next + s * next_step, width);
        for (int v = 0; v < vectors; v++) {
            Floats row = load(rows + s * row_step + v * WIDTH);
            for (int n = 0; n < queries; n++)
                sum[n][v] += row * weights[n * BLOCK + s];
        }
    }
    for (int n = 0; n < queries; n++)
        for (int v = 0; v < vectors; v++)
            store(to + n * to_step + v * WIDTH, sum[n][v]);
}

/* Weighted sums of a block; meanwhile fetches `ahead` rows of `next`. */
INLINE void weigh_tile(const float *weights, const float *rows, long row_step, long slots, const float *shrink, int queries,
                       long E, float *to, const float *next, long next_step, long ahead, long width)
{
    long e = 0;
    for (; e + VECTORS * WIDTH <= E; e += VECTORS * WIDTH, ahead = 0)
        weigh(weights, rows + e, row_step, slots, shrink, queries, VECTORS, to + e, E, next, next_step, ahead, width);
    for (; e + WIDTH <= E; e += WIDTH, ahead = 0)
        weigh(weights, rows + e, row_step, slots, shrink, queries, 1, to + e, E, next, next_step, ahead, width);
    for (; e < E; e++)
        for (int n = 0; n < queries; n++) {
            float sum = to[n * E + e] * shrink[n];
            for (long s = 0; s < slots; s++)
                sum += weights[n * BLOCK + s] * rows[s * row_step + e];
            to[n * E + e] = sum;
        }
}

/* With a compile-time number of queries, sums stay in registers. */
#define BY_QUERIES(count, call_of)                                                                                          \
    switch (count) {                                                                                                        \
    case 1: call_of(1); break;                                                                                              \
    case 2: call_of(2); break;                                                                                              \
    case 3: call_of(3); break;                                                                                              \
    default: call_of(TILE);                                                                                                 \
    }

#endif
