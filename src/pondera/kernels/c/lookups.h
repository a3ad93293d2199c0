/* Codes as sums of table rows, without decoding them: scores are sums of products of the query with the table rows, and weighted
 * sums of rows are the table rows, each times the weight of all tokens with its code.
 *
 * Four queries (the lanes) share each read of a code. Codes of a token are read in groups, so that tables stay near the core.
 */
#ifndef PONDERA_LOOKUPS_H
#define PONDERA_LOOKUPS_H

#include <stdlib.h>

#include "halves.h"

enum {
    LANES = 4,  /* queries at once */
    GROUP = 11, /* the most codes of a token at once; measured */
    RUN = 1024  /* tokens whose sums stay in the L1 cache */
};

typedef float Lanes __attribute__((vector_size(4 * LANES)));

/* With a compile-time number of codes, loops over them are unrolled. */
#define BY_GROUP(size, call_of)                                                                                             \
    switch (size) {                                                                                                         \
    case 1: call_of(1); break;                                                                                              \
    case 2: call_of(2); break;                                                                                              \
    case 3: call_of(3); break;                                                                                              \
    case 4: call_of(4); break;                                                                                              \
    case 5: call_of(5); break;                                                                                              \
    case 6: call_of(6); break;                                                                                              \
    case 7: call_of(7); break;                                                                                              \
    case 8: call_of(8); break;                                                                                              \
    case 9: call_of(9); break;                                                                                              \
    case 10: call_of(10); break;                                                                                            \
    default: call_of(GROUP);                                                                                                \
    }

INLINE void look(Lanes *restrict sums, const uint8_t *codes, long step, long tokens, const Lanes *restrict table, long K, int group)
{
    for (long s = 0; s < tokens; s++) {
        Lanes sum = sums[s];
        for (int c = 0; c < group; c++)
            sum += table[c * K + codes[s * step + c]];
        sums[s] = sum;
    }
}

/* The sums of the table entries of the codes of up to RUN tokens; entries of a table are K apart. */
INLINE void look_up(const uint8_t *codes, long step, long tokens, const Lanes *table, long K, long C, Lanes *sums)
{
    const long groups = (C + GROUP - 1) / GROUP;
    for (long group = 0; group < groups; group++) {
        const long c = C * group / groups, size = C * (group + 1) / groups - c;
#define LOOK(size) look(sums, codes + c, step, tokens, table + c * K, K, size)
        BY_GROUP(size, LOOK)
    }
}

INLINE void count(const Lanes *restrict weights, const uint8_t *codes, long step, long tokens, Lanes *restrict table, long K,
                  int group)
{
    for (long s = 0; s < tokens; s++)
        for (int c = 0; c < group; c++)
            table[c * K + codes[s * step + c]] += weights[s];
}

/* Adds the weights of up to RUN tokens to the entries of their codes. */
INLINE void tally_up(const uint8_t *codes, long step, long tokens, const Lanes *weights, long K, long C, Lanes *table)
{
    const long groups = (C + GROUP - 1) / GROUP;
    for (long group = 0; group < groups; group++) {
        const long c = C * group / groups, size = C * (group + 1) / groups - c;
#define COUNT(size) count(weights, codes + c, step, tokens, table + c * K, K, size)
        BY_GROUP(size, COUNT)
    }
}

/* Numbers of the lanes of many tokens, [lanes, tokens], as one vector per token. */
INLINE void into_lanes(const float *from, long step, long lanes, long tokens, Lanes *to)
{
    for (long s = 0; s < tokens; s++)
        for (long lane = 0; lane < LANES; lane++)
            to[s][lane] = lane < lanes ? from[lane * step + s] : 0;
}

/* Products of four queries with 2 * WIDTH rows of a table whose rows are columns of `table_CK`. */
INLINE void products_of_columns(const float *query_CL, const float *table_CK, long C, long K, int lanes, Lanes *to)
{
    Floats sum[LANES][2] = {0};
    for (long c = 0; c < C; c++)
        for (int lane = 0; lane < lanes; lane++)
            for (int half = 0; half < 2; half++)
                sum[lane][half] += query_CL[c * LANES + lane] * load(table_CK + c * K + half * WIDTH);
#ifdef __AVX512F__
    for (int half = 0; half < 2; half++) {
        const __m512 a = (__m512)sum[0][half], b = (__m512)sum[1][half], c = (__m512)sum[2][half], d = (__m512)sum[3][half];
        const __m512 ab = _mm512_unpacklo_ps(a, b), cd = _mm512_unpacklo_ps(c, d);
        const __m512 ab2 = _mm512_unpackhi_ps(a, b), cd2 = _mm512_unpackhi_ps(c, d);
        const __m512 rows[4] = {/* quarter q of row r has column 4 q + r */
                                _mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee),
                                _mm512_shuffle_ps(ab2, cd2, 0x44), _mm512_shuffle_ps(ab2, cd2, 0xee)};
        const __m512 low = _mm512_shuffle_f32x4(rows[0], rows[1], 0x44), low2 = _mm512_shuffle_f32x4(rows[2], rows[3], 0x44);
        const __m512 high = _mm512_shuffle_f32x4(rows[0], rows[1], 0xee), high2 = _mm512_shuffle_f32x4(rows[2], rows[3], 0xee);
        float *at = (float *)(to + half * WIDTH);
        _mm512_storeu_ps(at, _mm512_shuffle_f32x4(low, low2, 0x88));
        _mm512_storeu_ps(at + 16, _mm512_shuffle_f32x4(low, low2, 0xdd));
        _mm512_storeu_ps(at + 32, _mm512_shuffle_f32x4(high, high2, 0x88));
        _mm512_storeu_ps(at + 48, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
#else
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < WIDTH; i++)
            for (int lane = 0; lane < LANES; lane++)
                to[half * WIDTH + i][lane] = sum[lane][half][i];
#endif
}

/* Weighted sums of rows: weights [rows, LANES], rows [rows, E], added to the sums [LANES, E] of the first lanes. */
INLINE void sums_of_rows(const Lanes *weights, const float *rows, long count, long E, int lanes, float *to)
{
    enum { VECTORS_AT_ONCE = WIDTH == 16 ? 4 : 2 };
    long e = 0;
    for (; e + VECTORS_AT_ONCE * WIDTH <= E; e += VECTORS_AT_ONCE * WIDTH) {
        Floats sum[LANES][VECTORS_AT_ONCE];
        for (int lane = 0; lane < lanes; lane++)
            for (int v = 0; v < VECTORS_AT_ONCE; v++)
                sum[lane][v] = load(to + lane * E + e + v * WIDTH);
        for (long k = 0; k < count; k++)
            for (int v = 0; v < VECTORS_AT_ONCE; v++) {
                const Floats row = load(rows + k * E + e + v * WIDTH);
                for (int lane = 0; lane < lanes; lane++)
                    sum[lane][v] += weights[k][lane] * row;
            }
        for (int lane = 0; lane < lanes; lane++)
            for (int v = 0; v < VECTORS_AT_ONCE; v++)
                store(to + lane * E + e + v * WIDTH, sum[lane][v]);
    }
    for (; e < E; e++)
        for (int lane = 0; lane < lanes; lane++)
            for (long k = 0; k < count; k++)
                to[lane * E + e] += weights[k][lane] * rows[k * E + e];
}

/* With a compile-time number of lanes, sums stay in registers. */
#define BY_LANES(lanes, call_of)                                                                                            \
    switch (lanes) {                                                                                                        \
    case 1: call_of(1); break;                                                                                              \
    case 2: call_of(2); break;                                                                                              \
    case 3: call_of(3); break;                                                                                              \
    default: call_of(LANES);                                                                                                \
    }

#endif
