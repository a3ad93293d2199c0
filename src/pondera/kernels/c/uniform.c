/* Attention over uniformly quantized keys and values: decodes one token at a time into the cache of a core and uses it there.
 *
 * The numbers of a token are packed, the first in the lowest bits. A number is `least + level * step`; least and step are
 * float16 and shared by a group: `group` tokens of one channel, or `group` channels of one token.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "floats.h"
#include "halves.h"
#include "unpack.h"
#include "parallel.h"

enum { MOST = 1024, BLOCK = 128 }; /* width of a head; tokens per work item, a multiple of every group */
enum { DECODE, DOT, MIX };

typedef struct {
    const uint8_t *codes;         /* a token is contiguous, and so are the tokens of a head; other strides in elements: */
    const uint16_t *least, *step; /* [B, G, S / group, D] by channel, [B, G, S, D / group] by token */
    const float *given;           /* queries [B, G, N, D] of DOT, weights [B, G, N, S] of MIX; else NULL */
    float *out;                   /* [B, G, S, D], scores [B, G, N, S], or sums [B, G, N, D] */
    int64_t codes_B, codes_G, least_B, least_G, step_B, step_G;
    int64_t B, G, S, D, N, bits, group, by_channel, block, mode, threads;
    float *sums; /* of MIX, per work item: [N, D] */
    long blocks; /* of the tokens of a head */
} Uniform;

INLINE void scale(const uint8_t *restrict levels, const float *restrict least, const float *restrict step,
                  float *restrict row, long D)
{
    for (long d = 0; d < D; d++)
        row[d] = least[d] + step[d] * (float)levels[d];
}

INLINE float product(const float *restrict a, const float *restrict b, long D)
{
    Floats sum = spread(0);
    float rest = 0;
    long d = 0;
    for (; d + WIDTH <= D; d += WIDTH)
        sum += load(a + d) * load(b + d);
    for (; d < D; d++)
        rest += a[d] * b[d];
    return rest + sum_of(sum);
}

/* Sets the least numbers and steps of a token, if they are not those of the token before. */
static void set_steps(const Uniform *u, const uint16_t *least, const uint16_t *step, long s, long first, float *lows, float *steps)
{
    const long D = u->D, g = u->group;
    if (u->by_channel) {
        if (s != first && s % g)
            return;
        for (long d = 0; d < D; d++) {
            lows[d] = from_half(least[s / g * D + d]);
            steps[d] = from_half(step[s / g * D + d]);
        }
        return;
    }
    for (long part = 0; part < D / g; part++) {
        const float low = from_half(least[s * (D / g) + part]), one = from_half(step[s * (D / g) + part]);
        for (long d = part * g; d < (part + 1) * g; d++) {
            lows[d] = low;
            steps[d] = one;
        }
    }
}

static void block(void *task, long item)
{
    const Uniform *u = task;
    const long D = u->D, N = u->N, S = u->S, head = item / u->blocks, b = head / u->G, g = head % u->G;
    const long first = item % u->blocks * u->block, end = first + u->block < S ? first + u->block : S;
    const uint8_t *codes = u->codes + b * u->codes_B + g * u->codes_G;
    const uint16_t *least = u->least + b * u->least_B + g * u->least_G, *step = u->step + b * u->step_B + g * u->step_G;
    float lows[MOST], steps[MOST], space[MOST];
    uint8_t levels[MOST];
    float *sums = u->mode == MIX ? u->sums + item * N * D : NULL;
    for (long s = first; s < end; s++) {
        float *row = u->mode == DECODE ? u->out + (head * S + s) * D : space;
        set_steps(u, least, step, s, first, lows, steps);
        unpack_any(codes + s * (D * u->bits / 8), levels, D, (int)u->bits);
        scale(levels, lows, steps, row, D);
        for (long n = 0; n < N && u->mode == DOT; n++)
            u->out[(head * N + n) * S + s] = product(u->given + (head * N + n) * D, row, D);
        for (long n = 0; n < N && u->mode == MIX; n++) {
            const float weight = u->given[(head * N + n) * S + s];
            for (long d = 0; d < D; d++)
                sums[n * D + d] += weight * row[d];
        }
    }
}

int uniform(Uniform *u)
{
    u->block = BLOCK % u->group || !u->by_channel ? (u->by_channel ? u->group : BLOCK) : BLOCK;
    u->blocks = (u->S + u->block - 1) / u->block;
    const long heads = u->B * u->G, items = heads * u->blocks, sums = u->N * u->D;
    if (u->mode == MIX && !(u->sums = calloc(items * sums + 1, sizeof(float))))
        return 1;
    parallel(items, u->threads, block, u);
    if (u->mode == MIX) {
        memset(u->out, 0, heads * sums * sizeof(float));
        for (long item = 0; item < items; item++)
            for (long i = 0; i < sums; i++)
                u->out[item / u->blocks * sums + i] += u->sums[item * sums + i];
        free(u->sums);
    }
    return 0;
}
