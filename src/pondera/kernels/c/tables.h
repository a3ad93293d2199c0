/* Sections whose values are sums of table rows: the weights of all tokens with the same code are added up first, and then each row
 * of a table counts once. Scores come from products of the query with the tables of keys, or from rotation pairs, or from decoded
 * keys.
 */
#ifndef PONDERA_TABLES_H
#define PONDERA_TABLES_H

#include "pairs.h"
#include "parallel.h"
#include "sections.h"

enum { CACHE_LINE = 64 };

typedef struct {
    Work *work;
    long number; /* of the section */
    float *sums; /* of values: [stages, B, G, M, LANES, E] */
} Stages;

/* The branch of a stage; the stage becomes that of the branch. */
static int branch_of(const Rows *rows, long *stage)
{
    const int branch = *stage >= rows->stages[0];
    *stage -= branch ? rows->stages[0] : 0;
    return branch;
}

static void plan(const Sections *a, long number, Plan *plan, long first)
{
    const Section *section = a->sections + number;
    const int by_table = section->values.kind == RESIDUAL && !section->values.first_B && !section->position;
    const long part = by_table && section->tokens >= LEAST ? LONG : PART;
    *plan = (Plan){(section->tokens + part - 1) / part, first, part == LONG, 0, NULL, NULL};
}

/* Asks for some bytes that are needed soon, and returns where the next ones begin. */
INLINE const char *fetch_some(const char *from, const char *end, long bytes)
{
    for (long i = 0; i < bytes && from < end; i += CACHE_LINE, from += CACHE_LINE)
        __builtin_prefetch(from, 0, 2);
    return from;
}

/* The products of all queries with the rows of one stage of keys. */
static void multiply_stage(void *given, long stage)
{
    const Stages *t = given;
    const Sections *a = t->work->a;
    const Section *section = a->sections + t->number;
    const Rows *rows = &section->keys;
    const long K = rows->column_count, M = (a->N + LANES - 1) / LANES, all = stages_of(rows), D = a->D;
    Lanes *products = t->work->plans[t->number].products + stage * K;
    const int branch = branch_of(rows, &stage);
    const long C = rows->width[branch], before = branch ? rows->width[0] : 0;
    float *table = malloc((C * K + C * LANES + a->N * D) * sizeof(float));
    if (!table) {
        t->work->failed = 1;
        return;
    }
    float *query_CL = table + C * K, *query = query_CL + C * LANES;
    from_halves(rows->columns[branch] + stage * C * K, table, C * K);
    /* Meanwhile the next table of the branch comes from memory, a share of it with each product. */
    const long calls = a->B * a->G * M * (K / (2 * WIDTH)), share = (C * K * 2 / calls + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    const char *next = (const char *)(rows->columns[branch] + (stage + 1) * C * K), *end = next + C * K * 2;
    end = stage + 1 < rows->stages[branch] ? end : next;
    for (long bgm = 0; bgm < a->B * a->G * M; bgm++) {
        const long m = bgm % M, bg = bgm / M, lanes = a->N - m * LANES < LANES ? a->N - m * LANES : LANES;
        if (!m)
            take_query(a, section, bg / a->G, bg % a->G, query);
        for (long c = 0; c < C; c++)
            for (long lane = 0; lane < lanes; lane++)
                query_CL[c * LANES + lane] = query[(m * LANES + lane) * D + before + c];
        for (long k = 0; k < K; k += 2 * WIDTH) {
            Lanes *later = products + bgm * all * K + K + k;
            next = fetch_some(next, end, share);
            for (long i = 0; i < 2 * WIDTH * (long)sizeof(Lanes) && next < end; i += CACHE_LINE)
                __builtin_prefetch((char *)later + i, 1, 2);
#define PRODUCTS(lanes) products_of_columns(query_CL, table + k, C, K, lanes, products + bgm * all * K + k)
            BY_LANES(lanes, PRODUCTS)
        }
    }
    free(table);
}

/* Allocates what the parts of a section need, and computes the products with its tables. */
static void begin_tables(Work *work, long number)
{
    const Sections *a = work->a;
    const Rows *keys = &a->sections[number].keys, *values = &a->sections[number].values;
    Plan *plan = &work->plans[number];
    if (!plan->by_table)
        return;
    const long groups = a->B * a->G * ((a->N + LANES - 1) / LANES);
    const long tallies = stages_of(values) * values->K, products = stages_of(keys) * keys->column_count;
    const int looks_up = keys->kind == RESIDUAL && keys->columns[0] && !keys->first_B;
    if (looks_up)
        plan->products = malloc(groups * products * sizeof(Lanes));
    /* The tallies of a head may take the place of its products, which are in the cache of the core then. */
    plan->shared = looks_up && plan->parts == 1 && tallies == products;
    if (!plan->shared)
        plan->tallies = malloc(groups * plan->parts * tallies * sizeof(Lanes));
    work->failed = plan->shared ? !plan->products : !plan->tallies || (looks_up && !plan->products);
    if (looks_up && !work->failed)
        parallel(stages_of(keys), a->threads, multiply_stage, &(Stages){work, number, NULL});
}

static Lanes *tallies_of(const Plan *plan) { return plan->shared ? plan->products : plan->tallies; }

/* Scores of up to RUN tokens by the products with the tables. */
static void look_up_scores(const Sections *a, const Rows *keys, const Lanes *products, long b, long g, long first, long tokens,
                           float *scores)
{
    const long K = keys->column_count, C = stages_of(keys), M = (a->N + LANES - 1) / LANES;
    const uint8_t *codes = (const uint8_t *)keys->data + b * keys->data_B + g * keys->data_G + first * keys->data_S;
    Lanes sums[RUN];
    for (long m = 0; m < M; m++) {
        memset(sums, 0, tokens * sizeof(Lanes));
        look_up(codes, keys->data_S, tokens, products + ((b * a->G + g) * M + m) * C * K, K, C, sums);
        for (long n = m * LANES; n < a->N && n < (m + 1) * LANES; n++)
            for (long s = 0; s < tokens; s++)
                scores[n * LONG + s] = sums[s][n % LANES];
    }
}

/* Scores of a block of decoded keys. */
static void multiply_rows(const Sections *a, const Rows *keys, long b, long g, long first, long tokens, const float *query,
                          float *space, float *scores)
{
    long step;
    float *block = space, *to = space + a->N * BLOCK;
    const float *rows = rows_of(keys, b, g, first, tokens, a->D, to, &step);
    for (long n = 0; n < a->N; n += TILE) {
#define ROW_SCORES(count) score_tile(query + n * a->D, a->D, rows, step, tokens, count, block + n * BLOCK, NULL, 0, 0)
        BY_QUERIES(a->N - n, ROW_SCORES)
    }
    for (long n = 0; n < a->N; n++)
        memcpy(scores + n * LONG, block + n * BLOCK, tokens * sizeof(float));
}

/* The scores of a range of at most LONG tokens; returns 1 if memory allocation fails. */
static int score_range(const Work *work, long number, long b, long g, long start, long end, float *scores)
{
    const Sections *a = work->a;
    const Section *section = a->sections + number;
    const Rows *keys = &section->keys;
    const Lanes *products = work->plans[number].products;
    if (products) {
        for (long s = start; s < end; s += RUN)
            look_up_scores(a, keys, products, b, g, s, end - s < RUN ? end - s : RUN, scores + s - start);
        return 0;
    }
    const int pairs = has_pairs(keys);
    Pairs *shared = malloc(sizeof(Pairs));
    float *query = malloc((a->N * a->D + 2 * a->N * MOST + a->N * BLOCK + BLOCK * a->D) * sizeof(float));
    if (shared && query) {
        float *space = query + a->N * a->D;
        take_query(a, section, b, g, query);
        if (pairs)
            prepare_pairs(keys, g, shared);
        for (long s = start; s < end; s += BLOCK) {
            const long tokens = end - s < BLOCK ? end - s : BLOCK;
            if (pairs)
                score_pairs(shared, b, s, tokens, query, a->D, a->N, space, scores + s - start, LONG);
            else
                multiply_rows(a, keys, b, g, s, tokens, query, space, scores + s - start);
        }
    }
    const int failed = !shared || !query;
    free(shared);
    free(query);
    return failed;
}

/* Scores, softmax and tallies of a part of a section. */
static void attend_tables(Work *work, long number, long bg, long part)
{
    const Sections *a = work->a;
    const Section *section = a->sections + number;
    const Rows *values = &section->values;
    const Plan *plan = &work->plans[number];
    const long N = a->N, b = bg / a->G, g = bg % a->G, M = (N + LANES - 1) / LANES, size = stages_of(values) * values->K;
    Found *found = work->found_BGPN + (bg * work->parts + plan->first + part) * N;
    long start = part * LONG, end = start + LONG < section->tokens ? start + LONG : section->tokens;
    if (section->held) {
        start = section->held[2 * b] > start ? section->held[2 * b] : start;
        end = section->held[2 * b + 1] < end ? section->held[2 * b + 1] : end;
    }
    for (long n = 0; n < N; n++)
        found[n] = (Found){-INFINITY, 0};
    if (start >= end)
        return;
    float *scores = malloc(N * LONG * sizeof(float));
    if (!scores || score_range(work, number, b, g, start, end, scores)) {
        free(scores);
        work->failed = 1;
        return;
    }
    const long tokens = end - start, padded = (tokens + WIDTH - 1) / WIDTH * WIDTH;
    mask_scores(a, section, b, start, tokens, LONG, scores);
    for (long n = 0; n < N; n++) {
        for (long s = tokens; s < padded; s++)
            scores[n * LONG + s] = -INFINITY;
        take_in(&found[n], scores + n * LONG, padded);
    }
    const uint8_t *codes = (const uint8_t *)values->data + b * values->data_B + g * values->data_G + start * values->data_S;
    Lanes weights[RUN], *tallies = tallies_of(plan) + (bg * plan->parts + part) * M * size;
    memset(tallies, 0, M * size * sizeof(Lanes));
    for (long m = 0; m < M; m++)
        for (long s = 0; s < tokens; s += RUN) {
            const long run = tokens - s < RUN ? tokens - s : RUN;
            into_lanes(scores + m * LANES * LONG + s, LONG, N - m * LANES, run, weights);
            tally_up(codes + s * values->data_S, values->data_S, run, weights, values->K, stages_of(values),
                     tallies + m * size);
        }
    free(scores);
}

/* Adds the tallies of all parts of a head to those of the first part, and the same for the sums of weights. */
static void join_parts(const Work *work, const Plan *plan, long bg, long size)
{
    const long N = work->a->N, M = (N + LANES - 1) / LANES;
    Found *found = work->found_BGPN + (bg * work->parts + plan->first) * N;
    Lanes *tallies = tallies_of(plan) + bg * plan->parts * M * size;
    for (long m = 0; m < M; m++) {
        float highest[LANES];
        for (long lane = 0; lane < LANES && m * LANES + lane < N; lane++) {
            highest[lane] = -INFINITY;
            for (long part = 0; part < plan->parts; part++) {
                const float one = found[part * N + m * LANES + lane].highest;
                highest[lane] = one > highest[lane] ? one : highest[lane];
            }
        }
        Found joined[LANES] = {{0, 0}};
        for (long part = 0; part < plan->parts; part++) {
            Lanes share = {0};
            for (long lane = 0; lane < LANES && m * LANES + lane < N; lane++) {
                Found *one = &found[part * N + m * LANES + lane];
                share[lane] = one->highest == -INFINITY ? 0 : expf(one->highest - highest[lane]);
                joined[lane].sum += share[lane] * one->sum;
                joined[lane].highest = highest[lane];
                *one = (Found){-INFINITY, 0};
            }
            const int none = share[0] == 0 && share[1] == 0 && share[2] == 0 && share[3] == 0;
            Lanes *to = tallies + m * size;
            const Lanes *from = tallies + (part * M + m) * size;
            for (long row = 0; row < size && part && !none; row++)
                to[row] += share * from[row];
            for (long row = 0; row < size && !part; row++)
                to[row] = none ? (Lanes){0} : plan->parts > 1 ? share * to[row] : to[row];
        }
        for (long lane = 0; lane < LANES && m * LANES + lane < N; lane++)
            found[m * LANES + lane] = joined[lane];
    }
}

/* The rows of one stage of values, each times its tally. */
static void sum_stage(void *given, long stage)
{
    const Stages *t = given;
    const Sections *a = t->work->a;
    const Rows *rows = &a->sections[t->number].values;
    const Plan *plan = &t->work->plans[t->number];
    const long K = rows->K, N = a->N, M = (N + LANES - 1) / LANES, groups = a->B * a->G * M, size = stages_of(rows) * K;
    float *sums = t->sums + stage * groups * LANES * a->E;
    const Lanes *tallies = tallies_of(plan) + stage * K;
    const int branch = branch_of(rows, &stage);
    const long wide = rows->width[branch];
    const uint16_t *table = rows->table[branch] + stage * K * wide;
    float block[BLOCK * wide];
    const char *next = (const char *)(table + BLOCK * wide), *end = (const char *)(table + K * wide);
    if (stage + 1 < rows->stages[branch])
        end += K * wide * 2;
    const long share = (BLOCK * wide * 2 / groups + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    memset(sums, 0, groups * LANES * a->E * sizeof(float));
    for (long k = 0; k < K; k += BLOCK) {
        const long count = K - k < BLOCK ? K - k : BLOCK;
        from_halves(table + k * wide, block, count * wide);
        for (long bgm = 0; bgm < groups; bgm++) {
            const long m = bgm % M;
            next = fetch_some(next, end, share);
            const Lanes *weights = tallies + (bgm / M * plan->parts * M + m) * size + k;
#define SUMS(lanes) sums_of_rows(weights, block, count, wide, lanes, sums + bgm * LANES * a->E)
            BY_LANES(N - m * LANES, SUMS)
        }
    }
}

/* The weighted values of a section, in place of those of its first part. */
static void end_tables(Work *work, long number)
{
    const Sections *a = work->a;
    const Rows *values = &a->sections[number].values;
    const Plan *plan = &work->plans[number];
    const long N = a->N, E = a->E, M = (N + LANES - 1) / LANES, groups = a->B * a->G * M, stages = stages_of(values);
    if (!plan->by_table)
        return;
    for (long bg = 0; bg < a->B * a->G; bg++)
        join_parts(work, plan, bg, stages * values->K);
    float *sums = malloc(stages * groups * LANES * E * sizeof(float));
    if (!sums) {
        work->failed = 1;
        return;
    }
    parallel(stages, a->threads, sum_stage, &(Stages){work, number, sums});
    for (long bg = 0; bg < a->B * a->G; bg++)
        for (long n = 0; n < N; n++) {
            float *to = work->out_BGPNE + ((bg * work->parts + plan->first) * N + n) * E;
            memset(to, 0, E * sizeof(float));
            for (long each = 0; each < stages; each++) {
                long stage = each;
                const int branch = branch_of(values, &stage);
                const long wide = values->width[branch], before = branch ? values->width[0] : 0;
                const float *from = sums + ((each * groups + bg * M + n / LANES) * LANES) * E + n % LANES * wide;
                for (long e = 0; e < wide; e++)
                    to[before + e] += from[e];
            }
        }
    free(sums);
}

#endif
