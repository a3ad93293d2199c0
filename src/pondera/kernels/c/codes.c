/* Attention over vector-quantized keys and values with look-up tables, without decoding them.
 *
 * A token has C codes; code c is a row index of table c, which has K rows. The score of a token is the sum of the table
 * entries of its codes (`lookup`). The weighted values need, for each row, the sum of the weights of the tokens with that code
 * (`tally`). Four queries share each read of a code. Tokens are processed in blocks, and codes in groups whose tables and sums
 * fit into the L1 cache.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lookups.h"
#include "parallel.h"

enum { PART = 8192 }; /* tokens per work item */

typedef struct {
    const uint8_t *codes_BGSC; /* codes of a token are contiguous, all below K; other strides, in bytes: */
    int64_t codes_B, codes_G, codes_S;
    int64_t B, G, N, S, C, K, threads;
    float *table_BGMCKL; /* M = N / LANES, rounded up; L = LANES: input of lookup, output of tally */
    float *numbers_BGNS; /* scores (output of lookup) or weights (input of tally) */
    Lanes *tallies;      /* per work item */
    long parts;
} Codes;

typedef struct {
    const uint8_t *codes;   /* codes of the first token */
    long start, end, lanes; /* tokens; number of queries */
    float *numbers;         /* of the first query */
    Lanes *table;           /* of the first code */
} Item;

static Item item_of(const Codes *t, long number)
{
    const long M = (t->N + LANES - 1) / LANES, part = number % t->parts, bgm = number / t->parts, m = bgm % M, bg = bgm / M;
    const long start = part * PART, left = t->N - m * LANES;
    return (Item){
        t->codes_BGSC + bg / t->G * t->codes_B + bg % t->G * t->codes_G,
        start,
        start + PART < t->S ? start + PART : t->S,
        left < LANES ? left : LANES,
        t->numbers_BGNS + (bg * t->N + m * LANES) * t->S,
        (Lanes *)t->table_BGMCKL + bgm * t->C * t->K,
    };
}

static void lookup_item(void *given, long number)
{
    const Codes *t = given;
    const Item item = item_of(t, number);
    Lanes sums[RUN];
    for (long first = item.start; first < item.end; first += RUN) {
        const long tokens = item.end - first < RUN ? item.end - first : RUN;
        const uint8_t *codes = item.codes + first * t->codes_S;
        memset(sums, 0, tokens * sizeof(Lanes));
        look_up(codes, t->codes_S, tokens, item.table, t->K, t->C, sums);
        for (long lane = 0; lane < item.lanes; lane++)
            for (long s = 0; s < tokens; s++)
                item.numbers[lane * t->S + first + s] = sums[s][lane];
    }
}

static void tally_item(void *given, long number)
{
    const Codes *t = given;
    const Item item = item_of(t, number);
    Lanes weights[RUN], *table = t->tallies + number * t->C * t->K;
    memset(table, 0, t->C * t->K * sizeof(Lanes));
    for (long first = item.start; first < item.end; first += RUN) {
        const long tokens = item.end - first < RUN ? item.end - first : RUN;
        const uint8_t *codes = item.codes + first * t->codes_S;
        into_lanes(item.numbers + first, t->S, item.lanes, tokens, weights);
        tally_up(codes, t->codes_S, tokens, weights, t->K, t->C, table);
    }
}

static void add_up(void *given, long bgm)
{
    const Codes *t = given;
    const long size = t->C * t->K;
    Lanes *to = (Lanes *)t->table_BGMCKL + bgm * size;
    const Lanes *from = t->tallies + bgm * t->parts * size;
    memcpy(to, from, size * sizeof(Lanes));
    for (long part = 1; part < t->parts; part++)
        for (long row = 0; row < size; row++)
            to[row] += from[part * size + row];
}

static long prepare(Codes *t)
{
    t->parts = t->S > PART ? (t->S + PART - 1) / PART : 1;
    return t->B * t->G * ((t->N + LANES - 1) / LANES);
}

/* The sum of the table entries of the codes of each token. */
int lookup(const Codes *given)
{
    Codes t = *given;
    parallel(prepare(&t) * t.parts, t.threads, lookup_item, &t);
    return 0;
}

/* The sum of the weights of the tokens of each code. Returns 0, or 1 if memory allocation fails. */
int tally(const Codes *given)
{
    Codes t = *given;
    const long tables = prepare(&t);
    t.tallies = aligned_alloc(64, (tables * t.parts * t.C * t.K * sizeof(Lanes) + 63) / 64 * 64);
    if (!t.tallies)
        return 1;
    parallel(tables * t.parts, t.threads, tally_item, &t);
    parallel(tables, t.threads, add_up, &t);
    free(t.tallies);
    return 0;
}
