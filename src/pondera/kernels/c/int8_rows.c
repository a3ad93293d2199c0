/* y = x W^T + bias for many rows of x, with x and W in int8: the linear layers of a model that reads a prompt.
 *
 * W has one scale per output. Each group of 32 inputs of a row of x has a step of its own, so that a large number costs the
 * precision of its group only. Sums within a group are integers and exact; the groups are added up in float32, in their order.
 * So a row of y does not depend on other rows, threads or instructions.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define VNNI 1
#else
#define VNNI 0
#endif

#include "parallel.h"

enum {
    GROUP = 32,            /* inputs that share a step */
    QUAD = 4,              /* inputs that one instruction adds up */
    QUADS = GROUP / QUAD,  /* per group */
    LANES = 16,            /* outputs of a vector */
    PAIR = 2 * LANES,      /* outputs of a tile */
    ROWS = 6,              /* rows of a tile: 12 sums in int32, 12 in float32, and 2 vectors of weights fit into registers */
    OUTPUTS = 3 * PAIR,    /* outputs per work item */
    MOST_ROWS = 1024,      /* rows per work item; the weights are packed again for the next */
    LARGEST = 127          /* codes are from -127 to 127 */
};
static const uint32_t FLIP = 0x80808080; /* adds 128 to four signed bytes, which makes them unsigned */

typedef struct {
    const float *x;       /* [rows, inputs], contiguous */
    const int8_t *weight; /* [outputs, inputs], contiguous */
    const float *scale;   /* [outputs] */
    const float *bias;    /* [outputs], or NULL */
    float *y;             /* [rows, outputs] */
    int64_t rows, inputs, outputs, threads, plain;
    /* Of the call: */
    long groups;
    int8_t *codes;    /* [rows, groups, GROUP] */
    float *steps;     /* [rows, groups] */
    int32_t *offsets; /* [rows, groups]: -128 times the sum of the codes, as weights are 128 too large */
    int failed;       /* whether a thread could not allocate memory */
} Call;

/* Codes of up to GROUP numbers, of which those of padding are 0. If a number is not finite, the step is not a number. */
static void encode_group(const float *x, long count, int8_t *codes, float *step, int32_t *offset)
{
    float numbers[GROUP] = {0};
    uint32_t bits[GROUP], most_bits = 0; /* as integers, magnitudes have the same order, and the compiler finds the largest */
    float most;
    int32_t sum = 0;
    memcpy(numbers, x, count * sizeof *x);
    memcpy(bits, numbers, sizeof bits);
    for (long i = 0; i < GROUP; i++) {
        const uint32_t size = bits[i] & 0x7fffffff;
        most_bits = size > most_bits ? size : most_bits;
    }
    memcpy(&most, &most_bits, sizeof most);
    const int finite = most_bits < 0x7f800000;
    const float inverse = most > 0 && finite ? LARGEST / most : 0;
    for (long i = 0; i < GROUP; i++) {
        const int32_t code = finite ? (int32_t)rintf(numbers[i] * inverse) : 0;
        codes[i] = (int8_t)code;
        sum += code;
    }
    *step = finite ? most / LARGEST : NAN;
    *offset = -128 * sum;
}

static void encode(void *given, long row)
{
    const Call *c = given;
    for (long g = 0; g < c->groups; g++) {
        const long first = g * GROUP, at = row * c->groups + g;
        const long count = c->inputs - first < GROUP ? c->inputs - first : GROUP;
        encode_group(c->x + row * c->inputs + first, count, c->codes + at * GROUP, c->steps + at, c->offsets + at);
    }
}

/* Weights of PAIR outputs as [groups, QUADS, PAIR] unsigned quads; those of padding are 128, which stands for 0. */
static void pack(const Call *c, long first, uint32_t *packed)
{
    for (long o = 0; o < PAIR; o++) {
        const int8_t *row = c->weight + (first + o) * c->inputs;
        const long whole = first + o < c->outputs ? c->inputs / QUAD : 0, quads = c->groups * QUADS;
        for (long q = 0; q < whole; q++) {
            uint32_t quad;
            memcpy(&quad, row + q * QUAD, QUAD);
            packed[q * PAIR + o] = quad ^ FLIP;
        }
        for (long q = whole; q < quads; q++) {
            uint32_t quad = 0;
            if (first + o < c->outputs && q * QUAD < c->inputs)
                memcpy(&quad, row + q * QUAD, c->inputs - q * QUAD);
            packed[q * PAIR + o] = quad ^ FLIP;
        }
    }
}

/* Scales the sums of a tile, and stores those of existing outputs. */
static void put(const Call *c, long row, long rows, long first, float sums[ROWS][PAIR])
{
    const long count = c->outputs - first < PAIR ? c->outputs - first : PAIR;
    for (long r = 0; r < rows; r++)
        for (long o = 0; o < count; o++) {
            const float sum = sums[r][o] * c->scale[first + o];
            c->y[(row + r) * c->outputs + first + o] = c->bias ? sum + c->bias[first + o] : sum;
        }
}

static void plain_tile(const Call *c, long row, long rows, const uint32_t *packed, float sums[ROWS][PAIR])
{
    for (long r = 0; r < rows; r++)
        for (long g = 0; g < c->groups; g++) {
            const long at = (row + r) * c->groups + g;
            for (long o = 0; o < PAIR; o++) {
                int32_t sum = c->offsets[at];
                for (long q = 0; q < QUADS; q++) {
                    const uint8_t *quad = (const uint8_t *)(packed + (g * QUADS + q) * PAIR + o);
                    for (long i = 0; i < QUAD; i++)
                        sum += quad[i] * c->codes[at * GROUP + q * QUAD + i];
                }
                sums[r][o] = fmaf((float)sum, c->steps[at], sums[r][o]);
            }
        }
}

#if VNNI
/* `rows` is a constant, so that sums are in registers. */
static inline __attribute__((always_inline)) void tile(const Call *c, long row, int rows, const uint32_t *packed,
                                                       float found[ROWS][PAIR])
{
    __m512 sums[ROWS][2];
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long g = 0; g < c->groups; g++) {
        const long at = row * c->groups + g;
        const int8_t *codes = c->codes + at * GROUP;
        __m512i parts[ROWS][2];
        for (int r = 0; r < rows; r++)
            parts[r][0] = parts[r][1] = _mm512_set1_epi32(c->offsets[at + r * c->groups]);
        for (long q = 0; q < QUADS; q++, packed += PAIR, codes += QUAD) {
            const __m512i left = _mm512_loadu_si512(packed), right = _mm512_loadu_si512(packed + LANES);
            for (int r = 0; r < rows; r++) {
                int32_t quad;
                memcpy(&quad, codes + r * c->groups * GROUP, QUAD);
                const __m512i x = _mm512_set1_epi32(quad);
                parts[r][0] = _mm512_dpbusd_epi32(parts[r][0], left, x);
                parts[r][1] = _mm512_dpbusd_epi32(parts[r][1], right, x);
            }
        }
        for (int r = 0; r < rows; r++) {
            const __m512 step = _mm512_set1_ps(c->steps[at + r * c->groups]);
            sums[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[r][0]), step, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(parts[r][1]), step, sums[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(found[r], sums[r][0]);
        _mm512_storeu_ps(found[r] + LANES, sums[r][1]);
    }
}

static void vnni_tile(const Call *c, long row, long rows, const uint32_t *packed, float sums[ROWS][PAIR])
{
    switch (rows) {
    case 1: return tile(c, row, 1, packed, sums);
    case 2: return tile(c, row, 2, packed, sums);
    case 3: return tile(c, row, 3, packed, sums);
    case 4: return tile(c, row, 4, packed, sums);
    case 5: return tile(c, row, 5, packed, sums);
    default: return tile(c, row, ROWS, packed, sums);
    }
}
#endif

static long blocks(long count, long size) { return (count + size - 1) / size; }

/* A block of outputs for a block of rows. */
static void multiply(void *given, long item)
{
    Call *c = given;
    const long of_rows = blocks(c->rows, MOST_ROWS), first = item / of_rows * OUTPUTS, begin = item % of_rows * MOST_ROWS;
    const long end = begin + MOST_ROWS < c->rows ? begin + MOST_ROWS : c->rows, size = c->groups * QUADS * PAIR;
    const long pairs = blocks((c->outputs - first < OUTPUTS ? c->outputs - first : OUTPUTS), PAIR);
    uint32_t *packed = malloc(pairs * size * sizeof *packed);
    if (!packed) {
        __atomic_store_n(&c->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (long p = 0; p < pairs; p++)
        pack(c, first + p * PAIR, packed + p * size);
    for (long p = 0; p < pairs; p++)
        for (long row = begin; row < end; row += ROWS) {
            const long rows = end - row < ROWS ? end - row : ROWS;
            float sums[ROWS][PAIR] = {{0}};
#if VNNI
            if (!c->plain)
                vnni_tile(c, row, rows, packed + p * size, sums);
            else
#endif
                plain_tile(c, row, rows, packed + p * size, sums);
            put(c, row, rows, first + p * PAIR, sums);
        }
    free(packed);
}

/* Computes y; `plain` leaves instructions for int8 out. Returns 0, or 1 if memory allocation fails. */
int int8_rows(const float *x, const int8_t *weight, const float *scale, const float *bias, float *y, int64_t rows, int64_t inputs,
              int64_t outputs, int64_t threads, int64_t plain)
{
    const long groups = blocks(inputs, GROUP);
    Call c = {x, weight, scale, bias, y, rows, inputs, outputs, threads, plain, groups, NULL, NULL, NULL, 0};
    c.codes = malloc(rows * groups * GROUP);
    c.steps = malloc(rows * groups * sizeof *c.steps);
    c.offsets = malloc(rows * groups * sizeof *c.offsets);
    c.failed = !c.codes || !c.steps || !c.offsets;
    if (!c.failed) {
        parallel(rows, threads, encode, &c);
        parallel(blocks(outputs, OUTPUTS) * blocks(rows, MOST_ROWS), threads, multiply, &c);
    }
    free(c.codes);
    free(c.steps);
    free(c.offsets);
    return c.failed;
}

/* Whether the CPU has instructions for it; without them, products of floats are faster. */
int int8_rows_are_fast(void) { return VNNI; }
