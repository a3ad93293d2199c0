/* Attention of one token to sections of a cache, exact or coded, in one call: the rows of a block are decoded into the cache of
 * the core, and used there for all query heads that share them. */
#include <stdlib.h>

#include "halves.h"
#include "parallel.h"
#include "softmax.h"
#include "tiles.h"
#include "unpack.h"

enum { PART = 512, MOST = 1024 }; /* tokens per work item, a multiple of BLOCK; widest head */
enum { DENSE, UNIFORM, RESIDUAL, PAIRS };

typedef struct {
    int64_t kind;
    const void *data;             /* DENSE: floats; UNIFORM: bytes, those of a token are contiguous */
    const uint16_t *least, *step; /* of UNIFORM: see uniform.c */
    int64_t data_B, data_G, data_S, least_B, least_G, step_B, step_G; /* strides, in elements */
    int64_t bits, group, by_channel;
    /* RESIDUAL: a row is a sum of one row of each table, [stages, K, width] per branch; branches follow one another, and `order`
     * says which coordinate each number is (NULL: in order; keys only). PAIRS: coordinate d of a head is table[d, code of byte
     * order[d]], with tables [G, D, K]. Tables are float16. */
    const uint16_t *table[2];
    const int64_t *order;
    int64_t K, stages[2], width[2];
    /* Rotary embedding of the rows, angles [positions, P]; first: position of the first token of each row; NULL: none. */
    const float *cosine, *sine;
    const int64_t *first_B;
    int64_t P, interleaved;
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

static void decode_uniform(const Rows *rows, long b, long g, long first, long tokens, long width, float *to)
{
    const long bytes = width * rows->bits / 8, group = rows->group, parts = width / group;
    const uint8_t *codes = (const uint8_t *)rows->data + b * rows->data_B + g * rows->data_G;
    const uint16_t *least = rows->least + b * rows->least_B + g * rows->least_G;
    const uint16_t *steps = rows->step + b * rows->step_B + g * rows->step_G;
    uint8_t levels[MOST];
    float lows[MOST], ups[MOST];
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
}

/* Sums rows of tables; `width` is a compile-time number where it is usual, so that sums stay in registers. */
INLINE void add_rows(const uint8_t *codes, const uint16_t *table, long K, long stages, long width, float *to)
{
#ifdef __AVX512F__
    if (width % 16 == 0 && width <= 64) {
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long l = 0; l < stages; l++)
            for (long v = 0; v < width / 16; v++)
                sums[v] = _mm512_add_ps(
                    sums[v],
                    _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(table + (l * K + codes[l]) * width + v * 16))));
        for (long v = 0; v < width / 16; v++)
            _mm512_storeu_ps(to + v * 16, sums[v]);
        return;
    }
#endif
    float row[MOST];
    memset(to, 0, width * sizeof(float));
    for (long l = 0; l < stages; l++) {
        from_halves(table + (l * K + codes[l]) * width, row, width);
        for (long d = 0; d < width; d++)
            to[d] += row[d];
    }
}

static void decode_residual(const Rows *rows, long b, long g, long first, long tokens, long width, float *to)
{
    const uint8_t *codes = (const uint8_t *)rows->data + b * rows->data_B + g * rows->data_G;
    for (long s = first; s < first + tokens; s++) {
        const uint8_t *mine = codes + s * rows->data_S;
        float *row = to + (s - first) * width;
        for (long branch = 0; branch < 2 && rows->stages[branch]; branch++) {
            const long wide = rows->width[branch], stages = rows->stages[branch];
            if (wide == 64)
                add_rows(mine, rows->table[branch], rows->K, stages, 64, row);
            else if (wide == 32)
                add_rows(mine, rows->table[branch], rows->K, stages, 32, row);
            else
                add_rows(mine, rows->table[branch], rows->K, stages, wide, row);
            mine += stages;
            row += wide;
        }
    }
}

static void decode_pairs(const Rows *rows, long b, long g, long first, long tokens, long width, float *to)
{
    const uint8_t *codes = (const uint8_t *)rows->data + b * rows->data_B;
    const uint16_t *table = rows->table[0] + g * width * rows->K;
    const int64_t *byte = rows->order + g * width;
    uint16_t halves[MOST];
    for (long s = 0; s < tokens; s++) {
        const uint8_t *mine = codes + (first + s) * rows->data_S;
        for (long d = 0; d < width; d++)
            halves[d] = table[d * rows->K + mine[byte[d]]];
        from_halves(halves, to + s * width, width);
    }
}

static void rotate(const Rows *rows, long b, long first, long tokens, long width, float *to)
{
    const long P = rows->P;
    for (long s = 0; s < tokens; s++) {
        const float *cosine = rows->cosine + (rows->first_B[b] + first + s) * P;
        const float *sine = rows->sine + (rows->first_B[b] + first + s) * P;
        float *row = to + s * width;
        for (long p = 0; p < P && !rows->interleaved; p++) {
            const float one = row[p], other = row[p + P];
            row[p] = one * cosine[p] - other * sine[p];
            row[p + P] = other * cosine[p] + one * sine[p];
        }
        for (long p = 0; p < P && rows->interleaved; p++) {
            const float one = row[2 * p], other = row[2 * p + 1];
            row[2 * p] = one * cosine[p] - other * sine[p];
            row[2 * p + 1] = other * cosine[p] + one * sine[p];
        }
    }
}

/* The rows of a block of at most BLOCK tokens from `first` on; `to` is space for them. */
static const float *rows_of(const Rows *rows, long b, long g, long first, long tokens, long width, float *to, long *step)
{
    if (rows->kind == DENSE) {
        *step = rows->data_S;
        return (const float *)rows->data + b * rows->data_B + g * rows->data_G + first * rows->data_S;
    }
    *step = width;
    if (rows->kind == UNIFORM)
        decode_uniform(rows, b, g, first, tokens, width, to);
    else if (rows->kind == RESIDUAL)
        decode_residual(rows, b, g, first, tokens, width, to);
    else
        decode_pairs(rows, b, g, first, tokens, width, to);
    if (rows->first_B)
        rotate(rows, b, first, tokens, width, to);
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
        const int64_t *order = section->keys.kind == RESIDUAL ? section->keys.order : NULL;
        for (long d = 0; d < D; d++)
            query[n * D + d] = from[order ? order[d] : d] * a->scaling;
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
