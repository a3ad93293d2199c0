/* The rows of a section of a cache, exact or coded: what they are stored as, and a block of them as floats. */
#ifndef PONDERA_ROWS_H
#define PONDERA_ROWS_H

#include "halves.h"
#include "unpack.h"

enum { MOST = 1024 }; /* widest head */
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
    /* For look-up tables of RESIDUAL keys: the same tables as columns, [stages, width, columns], zeros after the first K. */
    const uint16_t *columns[2];
    int64_t column_count;
    /* For scores of PAIRS without rows (see pairs.h); NULL: none. */
    const uint16_t *pair_table;
    const int64_t *pair_units;
    const float *near, *frequency;
    int64_t pair_count, token_bytes;
} Rows;

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

#endif
