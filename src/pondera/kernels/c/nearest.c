/* Nearest row of a table for each vector: the product with the table and the argmax in one pass.
 *
 * The score of a row is its offset plus the product of vector and row. The table is packed into panels of adjacent rows, so
 * that a tile of scores (a few vectors with one panel) is accumulated in registers; each lane keeps its best score and the
 * panel of that score. Scores are not stored, so the additional memory is a copy of the table. A NaN score is never the best.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"

#ifdef __AVX512F__
enum { WIDTH = 16 };
#else
enum { WIDTH = 8 };
#endif
enum {
    PANEL = 2 * WIDTH,      /* rows of a panel */
    TILE = 6,               /* vectors of a tile, so that scores, panel and vectors fit into registers */
    ITEM = 32 * TILE,       /* vectors per work item */
    FEW = 1 << 17,          /* tables up to this size are packed by one thread */
    CHUNK_BYTES = 128 << 10 /* of panels per pass over the tiles of an item, to fit into the cache of a core */
};

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

typedef struct {
    Floats score[TILE][2];
    Ints panel[TILE][2];
} Best; /* per lane */

typedef struct {
    const float *x_NC;
    long stride; /* from one vector to the next */
    const float *rows_RKC, *centre_RC, *table_RKC, *offset_RK;
    long N, K, C, R;
    float *panels; /* per panel: offsets, then C numbers per row */
    int64_t *codes_NR;
    int failed;
} Search;

static long num_panels(const Search *s) { return (s->K + PANEL - 1) / PANEL; }

static void pack_panel(void *task, long item)
{
    const Search *s = task;
    const long r = item / num_panels(s), first = item % num_panels(s) * PANEL;
    float *to = s->panels + item * (s->C + 1) * PANEL;
    for (long lane = 0; lane < PANEL; lane++) {
        const int is_row = first + lane < s->K; /* padding of the last panel is never the best */
        const long row = r * s->K + first + lane;
        to[lane] = is_row ? s->offset_RK[row] : -INFINITY;
        for (long c = 0; c < s->C; c++)
            to[(c + 1) * PANEL + lane] = is_row ? s->table_RKC[row * s->C + c] : 0;
    }
}

static inline Floats spread(float value) { return value - (Floats){0}; }

static inline Ints choose(Ints where, Ints yes, Ints no) { return (where & yes) | (~where & no); }

/* The scores of a tile, and the best score of each lane so far. */
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

/* The first row with the highest score. */
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

/* The best rows of a table for all tiles of a work item. */
static void search_table(const float *x_nC, long tiles, const float *panels, long count, long C, Best *best)
{
    const long step = (C + 1) * PANEL, fitting = CHUNK_BYTES / (long)sizeof(float) / step, chunk = fitting ? fitting : 1;
    for (long tile = 0; tile < tiles; tile++)
        for (int t = 0; t < TILE; t++)
            for (int half = 0; half < 2; half++) {
                best[tile].score[t][half] = spread(-INFINITY);
                best[tile].panel[t][half] = (Ints){0};
            }
    for (long first = 0; first < count; first += chunk)
        for (long tile = 0; tile < tiles; tile++)
            for (long p = first; p < count && p < first + chunk; p++)
                meet(x_nC + tile * TILE * C, panels + p * step, C, p, &best[tile]);
}

static void search_item(void *task, long item)
{
    Search *s = task;
    const long C = s->C, start = item * ITEM, count = s->N - start < ITEM ? s->N - start : ITEM;
    const long tiles = (count + TILE - 1) / TILE;
    Best *best = aligned_alloc(64, tiles * sizeof(Best));
    float *rest_nC = malloc(count * C * sizeof(float)), *x_nC = calloc(tiles * TILE * C, sizeof(float));
    if (best && rest_nC && x_nC) {
        for (long n = 0; n < count; n++)
            memcpy(rest_nC + n * C, s->x_NC + (start + n) * s->stride, C * sizeof(float));
        for (long r = 0; r < s->R; r++) {
            for (long n = 0; n < count; n++)
                for (long c = 0; c < C; c++)
                    x_nC[n * C + c] = rest_nC[n * C + c] - s->centre_RC[r * C + c];
            search_table(x_nC, tiles, s->panels + r * num_panels(s) * (C + 1) * PANEL, num_panels(s), C, best);
            for (long n = 0; n < count; n++) {
                const int64_t code = first_row(&best[n / TILE], n % TILE);
                s->codes_NR[(start + n) * s->R + r] = code;
                const float *row_C = s->rows_RKC + (r * s->K + code) * C;
                for (long c = 0; c < C && r + 1 < s->R; c++)
                    rest_nC[n * C + c] -= row_C[c];
            }
        }
    } else
        s->failed = 1;
    free(best);
    free(rest_nC);
    free(x_nC);
}

/* Codes of N vectors by R tables of K rows; each table after the first codes the residual of the table before.
 *
 * The scores are products of the centred vectors with `table` (the `rows` in the form used for the search) plus an offset.
 * Returns 0, or 1 if memory allocation fails.
 */
int nearest(const float *x_NC, int64_t stride, const float *rows_RKC, const float *centre_RC, const float *table_RKC,
            const float *offset_RK, int64_t N, int64_t K, int64_t C, int64_t R, int64_t threads, int64_t *codes_NR)
{
    Search s = {x_NC, stride, rows_RKC, centre_RC, table_RKC, offset_RK, N, K, C, R, NULL, codes_NR, 0};
    const long panels = R * num_panels(&s);
    s.panels = aligned_alloc(64, panels * (C + 1) * PANEL * sizeof(float));
    if (!s.panels)
        return 1;
    parallel(panels, R * K * C < FEW ? 1 : threads, pack_panel, &s);
    parallel((N + ITEM - 1) / ITEM, threads, search_item, &s);
    free(s.panels);
    return s.failed;
}
