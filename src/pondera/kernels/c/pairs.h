/* Scores of keys that are coded by rotation pairs, without their rows: 16 tokens at a time, one pair after another.
 *
 * A pair of a token is one number of 32 bits in a table. It is rotated by the distance of the token from the first one of its
 * block, and the query by the position of that one in the other direction, so that cosines and sines of 64 distances are enough.
 * At high positions float32 rounds angles by some ten thousandths, and the angles of base and distance are not rounded alike; the
 * rotation is corrected by the difference, so that the result is that of the rounded angle of the position.
 */
#ifndef PONDERA_PAIRS_H
#define PONDERA_PAIRS_H

#include "rows.h"
#include "tiles.h"

#ifdef __AVX512F__

enum {
    WORDS = MOST / 4, /* the most words of four codes of a head */
    ANGLES = BLOCK    /* distances */
};

/* A pair of coordinates; the second is negative for a single coordinate, whose table has zeros in its place. */
typedef struct {
    int64_t one, other, byte;
} Unit;

typedef struct {
    const Rows *rows;
    const Unit *units;
    const uint16_t *table; /* of the head: [units, K, 2] */
    long words, offset[WORDS];
    int word[MOST], shift[MOST]; /* of each unit: the word with its code, and the place of the code in it */
} Pairs;

/* What the blocks of a head share. */
static void prepare_pairs(const Rows *rows, long g, Pairs *p)
{
    const long U = rows->pair_count;
    p->rows = rows;
    p->units = (const Unit *)rows->pair_units + g * U;
    p->table = rows->pair_table + g * U * rows->K * 2;
    long least = p->units[0].byte, most = least;
    for (long u = 1; u < U; u++) {
        least = p->units[u].byte < least ? p->units[u].byte : least;
        most = p->units[u].byte > most ? p->units[u].byte : most;
    }
    p->words = (most - least) / 4 + 1;
    for (long w = 0; w < p->words; w++) /* a word must not end after its token */
        p->offset[w] = least + 4 * w < rows->token_bytes - 4 ? least + 4 * w : rows->token_bytes - 4;
    for (long u = 0; u < U; u++) {
        const long byte = p->units[u].byte, word = (byte - least) / 4;
        p->word[u] = (int)word;
        p->shift[u] = (int)(8 * (byte - p->offset[word]));
    }
}

/* The query of each unit, rotated back by the position of the first token of a block: [units, 2, queries]. */
static void turn_back(const Pairs *p, long position, const float *query, long D, long N, float *turned)
{
    const Rows *rows = p->rows;
    for (long u = 0; u < rows->pair_count; u++)
        for (long n = 0; n < N; n++) {
            const long other = p->units[u].other;
            const float a = query[n * D + p->units[u].one], b = other < 0 ? 0 : query[n * D + other];
            const float cosine = u < rows->P ? rows->cosine[position * rows->P + u] : 1;
            const float sine = u < rows->P ? rows->sine[position * rows->P + u] : 0;
            turned[2 * u * N + n] = a * cosine + b * sine;
            turned[(2 * u + 1) * N + n] = b * cosine - a * sine;
        }
}

/* A product that the compiler rounds before it adds to it. */
INLINE __m512 rounded(__m512 a, __m512 b) { return _mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* Scores of 16 tokens of a block that begins at position `base` with a few queries, whose numbers are N apart in `turned`. */
INLINE void score_sixteen(const Pairs *p, const __m512i *words, long base, long distance, const float *turned, long N,
                          int queries, __m512 *sum)
{
    const Rows *rows = p->rows;
    const __m512i code = _mm512_set1_epi32(255);
    const __m512 lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 start = _mm512_set1_ps((float)base), beyond = _mm512_add_ps(_mm512_set1_ps((float)distance), lane);
    const __m512 position = _mm512_add_ps(start, beyond);
    for (int n = 0; n < queries; n++)
        sum[n] = _mm512_setzero_ps();
    for (long u = 0; u < rows->pair_count; u++) {
        const __m512i index = _mm512_and_si512(_mm512_srl_epi32(words[p->word[u]], _mm_cvtsi32_si128(p->shift[u])), code);
        const __m512i both = _mm512_i32gather_epi32(index, p->table + u * rows->K * 2, 4);
        __m512 one = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
        __m512 other = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        if (u < rows->P) {
            const __m512 near_cosine = _mm512_loadu_ps(rows->near + 2 * u * ANGLES + distance), given = one;
            const __m512 near_sine = _mm512_loadu_ps(rows->near + (2 * u + 1) * ANGLES + distance);
            const __m512 frequency = _mm512_set1_ps(rows->frequency[u]), angle = rounded(position, frequency);
            const __m512 off = _mm512_sub_ps(_mm512_sub_ps(angle, rounded(start, frequency)), rounded(beyond, frequency));
            const __m512 cosine = _mm512_fnmadd_ps(near_sine, off, near_cosine);
            const __m512 sine = _mm512_fmadd_ps(near_cosine, off, near_sine);
            one = _mm512_fmsub_ps(given, cosine, _mm512_mul_ps(other, sine));
            other = _mm512_fmadd_ps(other, cosine, _mm512_mul_ps(given, sine));
        }
        for (int n = 0; n < queries; n++) {
            sum[n] = _mm512_fmadd_ps(_mm512_set1_ps(turned[2 * u * N + n]), one, sum[n]);
            sum[n] = _mm512_fmadd_ps(_mm512_set1_ps(turned[(2 * u + 1) * N + n]), other, sum[n]);
        }
    }
}

/* Scores of a block; rows of `scores` are `step` apart and have space for whole vectors. `turned` is space for 2 N numbers per
 * unit. */
static void score_pairs(const Pairs *p, long b, long first, long tokens, const float *query, long D, long N, float *turned,
                        float *scores, long step)
{
    const Rows *rows = p->rows;
    const uint8_t *codes = (const uint8_t *)rows->data + b * rows->data_B;
    const long base = rows->first_B[b] + first;
    turn_back(p, base, query, D, N, turned);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i ahead = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)rows->data_S));
    __m512i words[WORDS];
    for (long s = 0; s < tokens; s += 16) {
        const uint8_t *from = codes + (first + s) * rows->data_S;
        const __mmask16 there = tokens - s < 16 ? (__mmask16)((1u << (tokens - s)) - 1) : 0xffff;
        for (long w = 0; w < p->words; w++)
            words[w] = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, ahead, from + p->offset[w], 1);
        for (long n = 0; n < N; n += TILE) {
            __m512 sum[TILE];
#define PAIR_SCORES(count) score_sixteen(p, words, base, s, turned + n, N, count, sum)
            BY_QUERIES(N - n, PAIR_SCORES)
            for (long each = n; each < N && each < n + TILE; each++)
                _mm512_storeu_ps(scores + each * step + s, sum[each - n]);
        }
    }
}

/* Whether `score_pairs` can read these keys. */
static int has_pairs(const Rows *rows) { return rows->kind == PAIRS && rows->pair_table && rows->first_B; }

#else

typedef struct {
    int none;
} Pairs;

static int has_pairs(const Rows *rows) { return 0 * (rows != NULL); }

static void prepare_pairs(const Rows *rows, long g, Pairs *p) { p->none = 0 * (rows != NULL) * (int)g; }

static void score_pairs(const Pairs *p, long b, long first, long tokens, const float *query, long D, long N, float *turned,
                        float *scores, long step)
{
    (void)p, (void)b, (void)first, (void)tokens, (void)query, (void)D, (void)N, (void)turned, (void)scores, (void)step;
}

#endif

#endif
