/* y = x W^T + bias for 1 to 8 rows of x: the linear layers of a model that decodes. Each weight is read once for all rows.
 *
 * A product of so few rows takes as long as its weights take from memory, so weights may be bfloat16, or int8 with one scale
 * per output. Sums are float32. The instruction set is chosen at run time.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    MOST_ROWS = 8,
    MOST_TILE = 4,
    ITEM = 1 << 16, /* bytes of weights per work item */
    STRIP = 256,    /* outputs per work item, at most, where weights are [inputs, outputs] */
    LEAST = 64,     /* outputs per work item, at least, there */
    DEEP = 4        /* inputs at once, there */
};
enum { FLOAT, BFLOAT, INT };  /* kinds of weights */
enum { PLAIN, AVX2, AVX512 }; /* instruction sets */
static const long BYTES[] = {4, 2, 1};

typedef struct {
    const float *x;     /* [rows, inputs], contiguous */
    const void *weight; /* [outputs, inputs], contiguous; [inputs, outputs] if by_input */
    const float *scale; /* [outputs], of int8 weights; else NULL */
    const void *bias;   /* [outputs], float or bfloat16 like y; or NULL */
    void *y;            /* [rows, outputs] */
    int64_t rows, inputs, outputs, kind, by_input, bfloat, threads, set; /* bfloat: x (see products), bias, y are bfloat16 */
} Products;

INLINE float from_bfloat(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    if (number != number)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float weight_at(const char *row, long i, int kind)
{
    if (kind == FLOAT)
        return ((const float *)row)[i];
    return kind == BFLOAT ? from_bfloat(((const uint16_t *)row)[i]) : ((const int8_t *)row)[i];
}

/* Applies scale and bias to a sum, and stores it. */
INLINE void finish(const Products *p, long row, long output, float sum)
{
    const long at = row * p->outputs + output;
    sum = p->scale ? sum * p->scale[output] : sum;
    if (p->bfloat)
        ((uint16_t *)p->y)[at] = to_bfloat(p->bias ? sum + from_bfloat(((const uint16_t *)p->bias)[output]) : sum);
    else
        ((float *)p->y)[at] = p->bias ? sum + ((const float *)p->bias)[output] : sum;
}

/* Adds the products from index `rest` on to the sums of a tile, and finishes them. */
static __attribute__((noinline)) void put(const Products *p, long first, int tile, int rows, int kind, long rest,
                                          const float sums[MOST_TILE][MOST_ROWS])
{
    for (int t = 0; t < tile; t++)
        for (int n = 0; n < rows; n++) {
            const char *weight = (const char *)p->weight + (first + t) * p->inputs * BYTES[kind];
            float sum = sums[t][n];
            for (long i = rest; i < p->inputs; i++)
                sum += p->x[n * p->inputs + i] * weight_at(weight, i, kind);
            finish(p, n, first + t, sum);
        }
}

/* Computes the sums of a strip from index `done` on, and finishes all of them. */
static __attribute__((noinline)) void put_strip(const Products *p, long first, long last, long done, int kind,
                                                float sums[MOST_ROWS][STRIP])
{
    for (long n = 0; n < p->rows; n++)
        for (long o = 0; o < last - first; o++) {
            for (long i = 0; o >= done && i < p->inputs; i++)
                sums[n][o] += p->x[n * p->inputs + i] *
                              weight_at((const char *)p->weight + i * p->outputs * BYTES[kind], first + o, kind);
            finish(p, n, first + o, sums[n][o]);
        }
}

#define LANES 4
#define TILE(rows) ((rows) < 3 ? 4 : (rows) < 5 ? 2 : 1)
#define TARGET
#define NAME(name) plain_##name

typedef float plain_vector __attribute__((vector_size(4 * LANES)));

INLINE plain_vector plain_floats(const float *from)
{
    plain_vector x;
    memcpy(&x, from, sizeof x); /* from any address */
    return x;
}

INLINE plain_vector plain_bfloats(const uint16_t *from)
{
    return (plain_vector){from_bfloat(from[0]), from_bfloat(from[1]), from_bfloat(from[2]), from_bfloat(from[3])};
}

INLINE plain_vector plain_ints(const int8_t *from) { return (plain_vector){from[0], from[1], from[2], from[3]}; }
INLINE float plain_lanes(plain_vector x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#include "product_rows.h"

#ifdef __x86_64__
#include <immintrin.h>

#define LANES 8
#define TILE(rows) ((rows) < 3 ? 4 : (rows) < 5 ? 2 : 1)
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(name) avx2_##name

typedef __m256 avx2_vector;

TARGET INLINE __m256 avx2_floats(const float *from) { return _mm256_loadu_ps(from); }

TARGET INLINE __m256 avx2_bfloats(const uint16_t *from)
{
    const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(halves, 16));
}

TARGET INLINE __m256 avx2_ints(const int8_t *from)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

TARGET INLINE float avx2_lanes(__m256 x)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#include "product_rows.h"

#define LANES 16
#define TILE(rows) ((rows) < 5 ? 4 : 3)
#define TARGET __attribute__((target("avx512f,fma")))
#define NAME(name) avx512_##name

typedef __m512 avx512_vector;

TARGET INLINE __m512 avx512_floats(const float *from) { return _mm512_loadu_ps(from); }

TARGET INLINE __m512 avx512_bfloats(const uint16_t *from)
{
    const __m512i halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}

TARGET INLINE __m512 avx512_ints(const int8_t *from)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

TARGET INLINE float avx512_lanes(__m512 x) { return _mm512_reduce_add_ps(x); }
#include "product_rows.h"
#endif

/* The best instruction set of this CPU. */
int best_set(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return PLAIN;
}

/* Outputs per work item. */
static long per_item(const Products *p)
{
    if (p->by_input) {
        const long share = p->outputs / (4 * p->threads) / LEAST * LEAST; /* so that threads can take turns */
        return share < LEAST ? LEAST : share > STRIP ? STRIP : share;
    }
    const long outputs = ITEM / (p->inputs * BYTES[p->kind]) / MOST_TILE * MOST_TILE;
    return outputs ? outputs : MOST_TILE;
}

static void work(void *given, long item)
{
    const Products *p = given;
    const long count = per_item(p), first = item * count, last = first + count < p->outputs ? first + count : p->outputs;
#ifdef __x86_64__
    if (p->set == AVX512)
        return avx512_outputs(p, first, last);
    if (p->set == AVX2)
        return avx2_outputs(p, first, last);
#endif
    plain_outputs(p, first, last);
}

/* Computes y. If `bfloat` is set, x is bfloat16, too. A `set` that this CPU does not have, or a negative one, is replaced by
 * the best that it has. Returns 0, or 1 if memory allocation fails. */
int products(const Products *given)
{
    Products p = *given;
    const int best = best_set();
    float *copy = NULL;
    p.set = p.set < 0 || p.set > best ? best : p.set;
    if (p.bfloat) {
        copy = malloc(p.rows * p.inputs * sizeof(float));
        if (!copy)
            return 1;
        for (long i = 0; i < p.rows * p.inputs; i++)
            copy[i] = from_bfloat(((const uint16_t *)given->x)[i]);
        p.x = copy;
    }
    parallel((p.outputs + per_item(&p) - 1) / per_item(&p), p.threads, work, &p);
    free(copy);
    return 0;
}
