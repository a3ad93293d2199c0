/* The fused attention of torch for one query per head, bit-identical, with a cache-friendly loop order.
 *
 * torch processes all keys and values for one query head, then for the next, so it reads them from memory once per query head.
 * Here the heads that share a block of keys are processed while the block is in the cache of a core. The operations of one head
 * and their order are the same: the block size, the matrix products of torch, its softmax. The caller must verify that results
 * are bit-identical, because they depend on how torch and this file were compiled.
 */
#include <stdlib.h>

#include "floats.h"
#include "parallel.h"

enum {
    BLOCK = 512, /* keys per block, as in torch */
    LINE = 16    /* numbers per cache line, the alignment of buffers in torch */
};

/* sgemm of torch: C = alpha op(A) op(B) + beta C, column-major. */
typedef void Gemm(const char *op_a, const char *op_b, const int *m, const int *n, const int *k, const float *alpha,
                  const float *a, const int *lda, const float *b, const int *ldb, const float *beta, float *c,
                  const int *ldc);

typedef struct {
    Gemm *gemm;
    const float *query, *keys, *values;    /* [B, H, D], [B, G, S, D], [B, G, S, D]; rows are contiguous */
    int64_t B, G, R, S, D;                 /* H = G R */
    int64_t heads, threads;                /* heads: query heads per work item, at most R */
    int64_t query_B, query_H, keys_B, keys_G, keys_S, values_B, values_G, values_S; /* strides, in numbers */
    double scaling;
    float *out_BHD;
} Stock;

typedef struct {
    const Stock *a;
    int failed;
} Work;

/* The offset of the scores of a head in torch, counted from the start of a cache line, because the bits of its products depend
 * on alignment. Its threads process equal ranges of heads; the scores, maximum, sum and weighted values of each thread follow
 * those of the thread before. */
static long offset(const Stock *a, long head)
{
    const long heads = a->B * a->G * a->R, threads = a->threads < heads ? a->threads : heads;
    const long thread = head / ((heads + threads - 1) / threads), block = a->S < BLOCK ? a->S : BLOCK;
    return thread * (block + 2 + a->D) % LINE;
}

/* Sum of the lanes in the order of torch: halves onto halves. */
INLINE float lanes(Floats x)
{
    float part[WIDTH];
    store(part, x);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            part[lane] += part[lane + half];
    return part[0];
}

INLINE Floats floor_of(Floats x)
{
    Floats whole = __builtin_convertvector(__builtin_convertvector(x, Ints), Floats); /* towards 0; |x| < 2^7 */
    return whole + choose(whole > x, spread(-1), spread(0));
}

/* The fast exponential of torch (20 units in the last place), with the same coefficients and order. */
INLINE Floats quick_exponential(Floats x)
{
    const Floats lowest = spread(-0x1.5d58ap+6f), highest = spread(0x1.62e43p+6f);
    const Ints nothing = x < lowest;
    x = choose(x < highest, x, highest);
    x = choose(x > lowest, x, lowest);
    const Floats whole = floor_of(x * 0x1.715476p+0f + 0.5f), rest = x - whole * 0x1.62e43p-1f;
    Floats power = rest * 0.00828929059f + 0.0418978221f;
    power = power * rest + 0.166676521f;
    power = power * rest + 0.499991506f;
    power = power * rest + 0.999999701f;
    power = power * rest + 1;
    const Ints exponent = __builtin_convertvector(whole - 1, Ints) + 127;
    return power * choose(nothing, spread(0), (Floats)(exponent << 23)) * 2;
}

/* Scales products and returns the highest. */
static float scale(float *scores, long count, float scaling)
{
    Floats most = spread(-INFINITY);
    float highest = -INFINITY;
    long s = 0;
    for (; s + WIDTH <= count; s += WIDTH) {
        const Floats score = load(scores + s) * scaling;
        store(scores + s, score);
        most = choose(score > most, score, most);
    }
    for (; s < count; s++) {
        scores[s] *= scaling;
        highest = scores[s] > highest ? scores[s] : highest;
    }
    for (int lane = 0; lane < WIDTH; lane++)
        highest = most[lane] > highest ? most[lane] : highest;
    return highest;
}

/* Turns scores into weights; returns their sum. */
static float weights(float *scores, long count, float highest)
{
    Floats sums = {0};
    long s = 0;
    for (; s + WIDTH <= count; s += WIDTH) {
        const Floats weight = quick_exponential(load(scores + s) - highest);
        store(scores + s, weight);
        sums += weight;
    }
    float sum = lanes(sums);
    for (; s < count; s++) {
        scores[s] = exp(scores[s] - highest);
        sum += scores[s];
    }
    return sum;
}

static void attend_heads(void *given, long item)
{
    Work *work = given;
    const Stock *a = work->a;
    const long parts = (a->R + a->heads - 1) / a->heads, part = item % parts, bg = item / parts, b = bg / a->G, g = bg % a->G;
    const long first = part * a->heads, heads = a->R - first < a->heads ? a->R - first : a->heads, head = g * a->R + first;
    const float *query = a->query + b * a->query_B + head * a->query_H;
    const float *keys = a->keys + b * a->keys_B + g * a->keys_G, *values = a->values + b * a->values_B + g * a->values_G;
    float *out = a->out_BHD + (b * a->G * a->R + head) * a->D;
    const int one = 1, width = a->D, key_step = a->keys_S, value_step = a->values_S, query_step = a->D;
    const float unit = 1, nothing = 0, scaling = a->scaling;
    const long block = a->S < BLOCK ? a->S : BLOCK, room = (LINE + block + 2 + a->D + LINE - 1) / LINE * LINE;
    float *buffer = aligned_alloc(LINE * sizeof(float), heads * room * sizeof(float));
    if (!buffer) {
        work->failed = 1;
        return;
    }
    float *scores[heads], highest[heads], sum[heads];
    for (long h = 0; h < heads; h++) {
        scores[h] = buffer + h * room + offset(a, b * a->G * a->R + head + h);
        highest[h] = -INFINITY, sum[h] = 0;
    }
    for (long start = 0; start < a->S; start += BLOCK) {
        const int count = a->S - start < BLOCK ? a->S - start : BLOCK;
        for (long h = 0; h < heads; h++)
            a->gemm("T", "N", &count, &one, &width, &unit, keys + start * a->keys_S, &key_step, query + h * a->query_H,
                    &query_step, &nothing, scores[h], &count);
        for (long h = 0; h < heads; h++) {
            float *row = scores[h], *to = row + block + 2, most = scale(row, count, scaling);
            most = highest[h] > most ? highest[h] : most;
            const float added = weights(row, count, most), shrink = expf(highest[h] - most);
            sum[h] = added + shrink * sum[h];
            highest[h] = most;
            for (long d = 0; d < a->D && start; d++)
                to[d] *= shrink;
            a->gemm("N", "N", &width, &one, &count, &unit, values + start * a->values_S, &value_step, row, &count,
                    start ? &unit : &nothing, to, &width);
        }
    }
    for (long h = 0; h < heads; h++) {
        const float share = 1 / sum[h];
        for (long d = 0; d < a->D; d++)
            out[h * a->D + d] = scores[h][block + 2 + d] * share;
    }
    free(buffer);
}

/* Returns 0 on success; 1 if memory allocation fails, or if there are no threads where the products of torch run serially. */
int stock(const Stock *a)
{
    Work work = {a, 0};
    Queue queue = {0, a->B * a->G * ((a->R + a->heads - 1) / a->heads), attend_heads, &work};
    if (a->threads > 1) {
        if (!parallel_in_openmp(&queue, a->threads))
            return 1;
    } else
        take_items(&queue);
    return work.failed;
}
