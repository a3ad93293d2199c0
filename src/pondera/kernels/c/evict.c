/* Empties the slots with the lowest scores, in place of a dozen operations per layer and token; and the sums of attention weights
 * that such scores are made of. */
#include <stdlib.h>

#include "floats.h"

typedef struct {
    int32_t *position;    /* [B, G, S]; negative: empty or padding; slots of a head are contiguous */
    const float *score;   /* [B, G, S]; slots of a head are contiguous */
    const int64_t *limit; /* [B, G]: slots that a head may have */
    const int64_t *first; /* [B]: tokens before this position are never evicted (sinks) */
    int64_t B, G, S, position_B, position_G, score_B, score_G;
    int64_t seen, recent, most; /* the latest `recent` tokens are never evicted; -1: as `share` says */
    double share;
} Evict;

/* The slot that goes next: the lowest score, among equal ones the oldest; protected slots go last. -1: there is none. */
static long lowest(const Evict *e, const int32_t *position, const float *score, int64_t first, int64_t newest)
{
    long found = -1;
    float least = 0;
    for (long s = 0; s < e->S; s++) {
        const int32_t at = position[s];
        if (at < 0)
            continue;
        const float mine = at < first || at >= newest ? INFINITY : score[s];
        if (found < 0 || mine < least || (mine == least && at < position[found])) {
            found = s;
            least = mine;
        }
    }
    return found;
}

/* Returns the most slots that a head had to lose: 0 or less, nothing changed; above `most`, nothing changed either. */
int64_t evict(const Evict *e)
{
    int64_t over[e->B * e->G + 1], most = INT64_MIN;
    for (long bg = 0; bg < e->B * e->G; bg++) {
        const int32_t *position = e->position + bg / e->G * e->position_B + bg % e->G * e->position_G;
        int32_t count = 0;
        for (long s = 0; s < e->S; s++)
            count += position[s] >= 0;
        over[bg] = count - e->limit[bg];
        most = over[bg] > most ? over[bg] : most;
    }
    if (most > e->most)
        return most;
    for (long bg = 0; bg < e->B * e->G; bg++) {
        const long b = bg / e->G, g = bg % e->G;
        int32_t *position = e->position + b * e->position_B + g * e->position_G;
        const float *score = e->score + b * e->score_B + g * e->score_G;
        const int64_t recent = e->recent < 0 ? (int64_t)((float)e->limit[bg] * (float)e->share) : e->recent;
        for (long i = 0; i < over[bg]; i++) {
            const long s = lowest(e, position, score, e->first[b], e->seen - recent);
            if (s >= 0)
                position[s] = INT32_MIN;
        }
    }
    return most;
}

typedef struct {
    const float *scores; /* [rows, N, S], contiguous; -inf where a query may not attend */
    float *received;     /* [rows, S] */
    int64_t rows, N, S;
} Received;

/* The attention weights of each slot, summed over queries. Returns 0, or 1 if memory allocation fails. */
int received(const Received *r)
{
    float *weights = malloc((r->S + WIDTH) * sizeof(float));
    if (!weights)
        return 1;
    for (long row = 0; row < r->rows; row++) {
        float *to = r->received + row * r->S;
        memset(to, 0, r->S * sizeof(float));
        for (long n = 0; n < r->N; n++) {
            const float *scores = r->scores + (row * r->N + n) * r->S;
            float highest = -INFINITY;
            for (long s = 0; s < r->S; s++)
                highest = scores[s] > highest ? scores[s] : highest;
            if (highest == -INFINITY)
                continue;
            memcpy(weights, scores, r->S * sizeof(float));
            for (long s = r->S; s < r->S + WIDTH; s++)
                weights[s] = -INFINITY;
            Floats sums = {0};
            for (long s = 0; s < r->S; s += WIDTH) {
                const Floats weight = exponential(load(weights + s) - highest);
                store(weights + s, weight);
                sums += weight;
            }
            const float share = 1 / sum_of(sums);
            for (long s = 0; s < r->S; s++)
                to[s] += weights[s] * share;
        }
    }
    free(weights);
    return 0;
}
