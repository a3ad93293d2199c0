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

#include "parallel.h"

enum {
    LANES = 4,   /* queries at once */
    GROUP = 4,   /* codes of a token at once */
    BLOCK = 512, /* tokens */
    PART = 8192  /* tokens per work item */
};

typedef float Lanes __attribute__((vector_size(4 * LANES)));

typedef struct {
    const uint8_t *codes_BGSC; /* codes of a token are contiguous, all below K; other strides, in bytes: */
    int64_t codes_B, codes_G, codes_S;
    int64_t B, G, N, S, C, K, threads;
    float *table_BGMCKL; /* M = N / LANES, rounded up; L = LANES: input of lookup, output of tally */
    float *numbers_BGNS; /* scores (output of lookup) or weights (input of tally) */
    Lanes *tallies;      /* per work item */
    long parts;
} Codes;

#define INLINE static inline __attribute__((always_inline))

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

INLINE void look(Lanes *restrict sums, const uint8_t *codes, long step, long tokens, const Lanes *restrict table, long K, int group)
{
    for (long s = 0; s < tokens; s++) {
        Lanes sum = sums[s];
        for (int c = 0; c < group; c++)
            sum += table[c * K + codes[s * step + c]];
        sums[s] = sum;
    }
}

static void lookup_item(void *given, long number)
{
    const Codes *t = given;
    const Item item = item_of(t, number);
    Lanes sums[BLOCK];
    for (long first = item.start; first < item.end; first += BLOCK) {
        const long tokens = item.end - first < BLOCK ? item.end - first : BLOCK;
        const uint8_t *codes = item.codes + first * t->codes_S;
        memset(sums, 0, tokens * sizeof(Lanes));
        long c = 0;
        for (; c + GROUP <= t->C; c += GROUP)
            look(sums, codes + c, t->codes_S, tokens, item.table + c * t->K, t->K, GROUP);
        for (; c < t->C; c++)
            look(sums, codes + c, t->codes_S, tokens, item.table + c * t->K, t->K, 1);
        for (long lane = 0; lane < item.lanes; lane++)
            for (long s = 0; s < tokens; s++)
                item.numbers[lane * t->S + first + s] = sums[s][lane];
    }
}

INLINE void count(const Lanes *restrict weights, const uint8_t *codes, long step, long tokens, Lanes *restrict table, long K,
                  int group)
{
    for (long s = 0; s < tokens; s++)
        for (int c = 0; c < group; c++)
            table[c * K + codes[s * step + c]] += weights[s];
}

static void tally_item(void *given, long number)
{
    const Codes *t = given;
    const Item item = item_of(t, number);
    Lanes weights[BLOCK], *table = t->tallies + number * t->C * t->K;
    memset(table, 0, t->C * t->K * sizeof(Lanes));
    memset(weights, 0, sizeof weights);
    for (long first = item.start; first < item.end; first += BLOCK) {
        const long tokens = item.end - first < BLOCK ? item.end - first : BLOCK;
        const uint8_t *codes = item.codes + first * t->codes_S;
        for (long lane = 0; lane < item.lanes; lane++)
            for (long s = 0; s < tokens; s++)
                weights[s][lane] = item.numbers[lane * t->S + first + s];
        long c = 0;
        for (; c + GROUP <= t->C; c += GROUP)
            count(weights, codes + c, t->codes_S, tokens, table + c * t->K, t->K, GROUP);
        for (; c < t->C; c++)
            count(weights, codes + c, t->codes_S, tokens, table + c * t->K, t->K, 1);
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
