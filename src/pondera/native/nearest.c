/* Which row of a table is nearest to each vector: the product with the table and the search for the best in one go.
 *
 * A score is an offset of the row plus the product of vector and row. The table is packed into panels of rows side by side,
 * so that a tile of scores, of a few vectors with one panel, is summed up in registers; then every lane keeps the best
 * score it has seen and the panel that it came from. No score is ever stored, so memory is that of the table, once more.
 * A score that is no number is never the best.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "parallel.h"

#ifdef __AVX512F__
enum { WIDTH = 16 };
#else
enum { WIDTH = 8 };
#endif
enum {
    PANEL = 2 * WIDTH,      /* rows of a panel */
    TILE = 6,               /* vectors of a tile: its scores leave a register or more for the panel and the vectors */
    TILES = 32,             /* tiles of an item of work */
    CHUNK_BYTES = 128 << 10 /* of panels that all tiles of an item pass before the next ones: they stay in a core's cache */
};

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

typedef struct {
    Floats score[TILE][2];
    Ints panel[TILE][2];
} Best; /* by lane */

typedef struct {
    const float *x_NC, *centre_C;
    long N, K, C;
    const float *table_KC, *offset_K;
    float *panels; /* of each the offsets, then C times as many rows' numbers */
    int64_t *codes_N;
    int failed;
} Search;

static long num_panels(const Search *s) { return (s->K + PANEL - 1) / PANEL; }

static void pack_panel(void *task, long panel)
{
    const Search *s = task;
    float *to = s->panels + panel * (s->C + 1) * PANEL;
    for (long lane = 0; lane < PANEL; lane++) {
        long k = panel * PANEL + lane;
        int is_row = k < s->K; /* what fills the last panel up is never the best */
        to[lane] = is_row ? s->offset_K[k] : -INFINITY;
        for (long c = 0; c < s->C; c++)
            to[(c + 1) * PANEL + lane] = is_row ? s->table_KC[k * s->C + c] : 0;
    }
}

static inline Floats spread(float value) { return value - (Floats){0}; }

static inline Ints choose(Ints where, Ints yes, Ints no) { return (where & yes) | (~where & no); }

/* The scores of a tile, and of each lane the best so far. */
static inline void meet(const float *x_tC, const float *restrict panel, long C, int32_t number, Best *best)
{
    const Floats *restrict rows = (const Floats *)panel;
    Floats score[TILE][2];
    for (int t = 0; t < TILE; t++)
        for (int half = 0; half < 2; half++)
            score[t][half] = rows[half];
    for (long c = 0; c < C; c++) {
        rows += 2;
        for (int t = 0; t < TILE; t++)
            for (int half = 0; half < 2; half++)
                score[t][half] += spread(x_tC[t * C + c]) * rows[half];
    }
    for (int t = 0; t < TILE; t++)
        for (int half = 0; half < 2; half++) {
            Ints better = score[t][half] > best->score[t][half];
            best->score[t][half] = (Floats)choose(better, (Ints)score[t][half], (Ints)best->score[t][half]);
            best->panel[t][half] = choose(better, (number - (Ints){0}), best->panel[t][half]);
        }
}

/* The first row of all that have the highest score. */
static int64_t first_row(const Best *best, int t)
{
    const float *score = (const float *)best->score[t];
    const int32_t *panel = (const int32_t *)best->panel[t];
    float highest = score[0];
    int64_t row = (int64_t)panel[0] * PANEL;
    for (long lane = 1; lane < PANEL; lane++) {
        int64_t other = (int64_t)panel[lane] * PANEL + lane;
        int better = score[lane] > highest || (score[lane] == highest && other < row);
        highest = better ? score[lane] : highest;
        row = better ? other : row;
    }
    return row;
}

static void search_item(void *task, long item)
{
    Search *s = task;
    const long C = s->C, start = item * TILES * TILE, count = s->N - start < TILES * TILE ? s->N - start : TILES * TILE;
    const long tiles = (count + TILE - 1) / TILE, panels = num_panels(s), step = (C + 1) * PANEL;
    long chunk = CHUNK_BYTES / (long)sizeof(float) / step;
    chunk = chunk > 0 ? chunk : 1;
    Best *best = aligned_alloc(64, tiles * sizeof(Best));
    float *x_nC = malloc(tiles * TILE * C * sizeof(float));
    if (!best || !x_nC) {
        s->failed = 1;
        goto done;
    }
    for (long n = 0; n < tiles * TILE; n++)
        for (long c = 0; c < C; c++)
            x_nC[n * C + c] = n < count ? s->x_NC[(start + n) * C + c] - s->centre_C[c] : 0;
    for (long tile = 0; tile < tiles; tile++)
        for (int t = 0; t < TILE; t++)
            for (int half = 0; half < 2; half++) {
                best[tile].score[t][half] = spread(-INFINITY);
                best[tile].panel[t][half] = (Ints){0};
            }
    for (long first = 0; first < panels; first += chunk)
        for (long tile = 0; tile < tiles; tile++)
            for (long p = first; p < panels && p < first + chunk; p++)
                meet(x_nC + tile * TILE * C, s->panels + p * step, C, p, &best[tile]);
    for (long n = 0; n < count; n++)
        s->codes_N[start + n] = first_row(&best[n / TILE], n % TILE);
done:
    free(best);
    free(x_nC);
}

/* Codes of N vectors, less a centre, by the K rows of a table and their offsets; 0, or 1 where memory is short. */
int nearest(const float *x_NC, const float *centre_C, const float *table_KC, const float *offset_K, int64_t N, int64_t K,
            int64_t C, int64_t threads, int64_t *codes_N)
{
    Search s = {x_NC, centre_C, N, K, C, table_KC, offset_K, NULL, codes_N, 0};
    s.panels = aligned_alloc(64, num_panels(&s) * (C + 1) * PANEL * sizeof(float));
    if (!s.panels)
        return 1;
    parallel(num_panels(&s), threads, pack_panel, &s);
    parallel((N + TILES * TILE - 1) / (TILES * TILE), threads, search_item, &s);
    free(s.panels);
    return s.failed;
}
