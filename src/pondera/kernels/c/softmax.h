/* Online softmax over parts of the KV slots, and merging of the parts.
 *
 * For each query a part stores the highest score, the sum of exp(score - highest), and the values weighted in this way. The
 * size of the parts does not depend on the number of threads, so results are bit-identical for any number.
 */
#ifndef PONDERA_SOFTMAX_H
#define PONDERA_SOFTMAX_H

#include "floats.h"

typedef struct {
    float highest, sum;
} Found;

/* Turns the scores of count slots (a multiple of WIDTH; -inf for masked slots) into weights; returns the factor that rescales
 * the earlier weighted sums. */
INLINE float take_in(Found *found, float *scores, long count)
{
    Floats most = spread(found->highest);
    for (long s = 0; s < count; s += WIDTH) {
        Floats score = load(scores + s);
        most = choose(score > most, score, most);
    }
    float highest = most[0];
    for (int lane = 1; lane < WIDTH; lane++)
        highest = most[lane] > highest ? most[lane] : highest;
    const float base = highest == -INFINITY ? 0 : highest; /* all slots so far are masked */
    Floats sums = {0};
    for (long s = 0; s < count; s += WIDTH) {
        Floats weight = exponential(load(scores + s) - base);
        store(scores + s, weight);
        sums += weight;
    }
    const float shrink = found->highest == -INFINITY ? 0 : expf(found->highest - base);
    found->highest = highest;
    found->sum = found->sum * shrink + sum_of(sums);
    return shrink;
}

/* Merges the weighted values of all parts; zeros if all slots are masked. */
static void merge(const Found *found, long found_step, const float *values, long values_step, long parts, long width,
                  float *to)
{
    float highest = -INFINITY, sum = 0;
    for (long p = 0; p < parts; p++)
        highest = found[p * found_step].highest > highest ? found[p * found_step].highest : highest;
    memset(to, 0, width * sizeof(float));
    for (long p = 0; p < parts; p++) {
        const Found part = found[p * found_step];
        if (part.highest == -INFINITY && part.sum == 0)
            continue;
        const float weight = part.highest == highest ? 1 : expf(part.highest - highest);
        sum += weight * part.sum;
        for (long d = 0; d < width; d++)
            to[d] += weight * values[p * values_step + d];
    }
    for (long d = 0; d < width && sum != 0; d++)
        to[d] /= sum;
}

#endif
