/* The sum of the vectors of each code.
 *
 * Vectors are sorted by code (stable), then the vectors of each code are summed; so sums are the same in every run and for any
 * number of threads. RUN vectors are summed in float32, these partial sums in double precision.
 */
#include <stdint.h>
#include <stdlib.h>

#include "parallel.h"

enum {
    ITEM = 16,  /* codes per work item */
    WIDTH = 64, /* numbers of a vector that are summed at once, in registers */
    RUN = 256,
    AHEAD = 8 /* vectors to prefetch ahead */
};

typedef struct {
    const float *x_NC;
    long stride; /* from one vector to the next */
    const float *weight_N;
    long K, C;
    const int64_t *starts; /* start of each code in sorted order, and the end of the last */
    const int32_t *order;
    float *sums_KC, *counts_K;
} Sums;

/* Sums `width` numbers of vectors; if it is a constant, the sums stay in registers. */
static inline void add_run(const Sums *s, const int32_t *order, long run, long first, long width, double *sum)
{
    float part[WIDTH] = {0};
    for (long i = 0; i < run; i++) {
        const float *x = s->x_NC + order[i] * s->stride + first;
        const float weight = s->weight_N ? s->weight_N[order[i]] : 1;
        __builtin_prefetch(s->x_NC + order[i + AHEAD < run ? i + AHEAD : i] * s->stride + first);
        for (long c = 0; c < width; c++)
            part[c] += weight * x[c];
    }
    for (long c = 0; c < width; c++)
        sum[c] += part[c];
}

static void sum_item(void *task, long item)
{
    const Sums *s = task;
    const long last = (item + 1) * ITEM < s->K ? (item + 1) * ITEM : s->K;
    for (long k = item * ITEM; k < last; k++) {
        const int64_t start = s->starts[k], end = s->starts[k + 1];
        for (long first = 0; first < s->C; first += WIDTH) {
            const long width = s->C - first < WIDTH ? s->C - first : WIDTH;
            double sum[WIDTH] = {0};
            for (int64_t i = start; i < end; i += RUN) {
                const long run = end - i < RUN ? end - i : RUN;
                if (width == WIDTH)
                    add_run(s, s->order + i, run, first, WIDTH, sum);
                else
                    add_run(s, s->order + i, run, first, width, sum);
            }
            for (long c = 0; c < width; c++)
                s->sums_KC[k * s->C + first + c] = (float)sum[c];
        }
        double count = s->weight_N ? 0 : end - start;
        for (int64_t i = start; s->weight_N && i < end; i++)
            count += s->weight_N[s->order[i]];
        s->counts_K[k] = (float)count;
    }
}

/* Sums and counts of the N vectors of each of K codes, with weights if given. Vectors with a negative code are ignored. N must
 * be below 2^31. Returns 0, or 1 if memory allocation fails. */
int sums(const float *x_NC, int64_t stride, const int64_t *codes_N, const float *weight_N, int64_t N, int64_t K, int64_t C,
         int64_t threads, float *sums_KC, float *counts_K)
{
    int64_t *starts = calloc(K + 2, sizeof(int64_t));
    int32_t *order = malloc((N + 1) * sizeof(int32_t));
    Sums s = {x_NC, stride, weight_N, K, C, starts, order, sums_KC, counts_K};
    if (starts && order) {
        for (int64_t n = 0; n < N; n++)
            if (codes_N[n] >= 0)
                starts[codes_N[n] + 2]++;
        for (int64_t k = 2; k < K + 2; k++)
            starts[k] += starts[k - 1]; /* shifted by one; corrected below */
        for (int64_t n = 0; n < N; n++)
            if (codes_N[n] >= 0)
                order[starts[codes_N[n] + 1]++] = (int32_t)n;
        parallel((K + ITEM - 1) / ITEM, threads, sum_item, &s);
    }
    const int failed = !starts || !order;
    free(starts);
    free(order);
    return failed;
}
