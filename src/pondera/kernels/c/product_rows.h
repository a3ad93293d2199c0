/* Products of one weight matrix with up to 8 rows, for one instruction set. Included once per set by products.c, which defines
 * LANES (floats per vector), TILE(rows) (weight rows at once, as registers allow), TARGET (the instruction set of a function),
 * NAME(name) (the name of a function of this set), and of this set the type `vector` and the functions `floats`, `bfloats`,
 * `ints` (read LANES weights) and `lanes` (adds up a vector).
 *
 * Every output is one sum in a fixed order: LANES partial sums along the row, then these, then the rest of the row. It does not
 * depend on how many rows of x a call has, nor on tiles and threads.
 */

TARGET INLINE NAME(vector) NAME(weights)(const char *row, long i, int kind)
{
    if (kind == FLOAT)
        return NAME(floats)((const float *)row + i);
    return kind == BFLOAT ? NAME(bfloats)((const uint16_t *)row + i) : NAME(ints)((const int8_t *)row + i);
}

/* Outputs `first` to `first + tile - 1` for all rows of x; `tile`, `rows` and `kind` are constants, so sums are in registers.
 * The CPU foresees one row of weights, but not that the next tile continues after the last of them: it is prefetched (to the
 * second level), which doubles the speed. */
TARGET INLINE void NAME(tile)(const Products *p, long first, int tile, int rows, int kind)
{
    const long inputs = p->inputs, step = inputs * BYTES[kind], whole = inputs / LANES * LANES;
    const char *weight = (const char *)p->weight + first * step;
    NAME(vector) sums[MOST_TILE][MOST_ROWS];
    for (int t = 0; t < tile; t++)
        for (int n = 0; n < rows; n++)
            sums[t][n] = (NAME(vector)){0};
    for (long i = 0; i < whole; i += LANES) {
        NAME(vector) w[MOST_TILE];
        for (int t = 0; t < tile; t++) {
            w[t] = NAME(weights)(weight + t * step, i, kind);
            __builtin_prefetch(weight + (t + tile) * step + i * BYTES[kind], 0, 2);
        }
        for (int n = 0; n < rows; n++) {
            const NAME(vector) x = NAME(floats)(p->x + n * inputs + i);
            for (int t = 0; t < tile; t++)
                sums[t][n] += x * w[t];
        }
    }
    float found[MOST_TILE][MOST_ROWS];
    for (int t = 0; t < tile; t++)
        for (int n = 0; n < rows; n++)
            found[t][n] = NAME(lanes)(sums[t][n]);
    put(p, first, tile, rows, kind, whole, found);
}

TARGET INLINE void NAME(range)(const Products *p, long first, long last, int rows, int kind)
{
    for (; first + TILE(rows) <= last; first += TILE(rows))
        NAME(tile)(p, first, TILE(rows), rows, kind);
    for (; first < last; first++)
        NAME(tile)(p, first, 1, rows, kind);
}

/* Adds the products of `deep` inputs from i on to the sums of a strip of outputs; returns how many outputs these are. */
TARGET INLINE long NAME(add_inputs)(const Products *p, long i, int deep, long first, long width, int kind,
                                    float sums[MOST_ROWS][STRIP])
{
    const char *weight = (const char *)p->weight + (i * p->outputs + first) * BYTES[kind];
    const long step = p->outputs * BYTES[kind];
    long o = 0;
    for (; o + LANES <= width; o += LANES) {
        NAME(vector) w[DEEP];
        for (int d = 0; d < deep; d++)
            w[d] = NAME(weights)(weight + d * step, o, kind);
        for (long n = 0; n < p->rows; n++) {
            NAME(vector) sum = NAME(floats)(sums[n] + o);
            for (int d = 0; d < deep; d++)
                sum += w[d] * p->x[n * p->inputs + i + d];
            memcpy(sums[n] + o, &sum, sizeof sum);
        }
    }
    return o;
}

/* Outputs `first` to `last - 1` where the weights of one input are contiguous. */
TARGET INLINE void NAME(strip)(const Products *p, long first, long last, int kind)
{
    float sums[MOST_ROWS][STRIP] = {{0}};
    long i = 0, done = 0;
    for (; i + DEEP <= p->inputs; i += DEEP)
        done = NAME(add_inputs)(p, i, DEEP, first, last - first, kind, sums);
    for (; i < p->inputs; i++)
        done = NAME(add_inputs)(p, i, 1, first, last - first, kind, sums);
    put_strip(p, first, last, done, kind, sums);
}

/* A function of its own for each number of rows and kind of weights: in one function, compilation would take minutes. */
#define RANGE(rows, kind)                                                                                                   \
    TARGET static __attribute__((noinline)) void NAME(range_##rows##_##kind)(const Products *p, long first, long last)      \
    {                                                                                                                       \
        NAME(range)(p, first, last, rows, kind);                                                                            \
    }
#define RANGES(kind)                                                                                                        \
    RANGE(1, kind) RANGE(2, kind) RANGE(3, kind) RANGE(4, kind) RANGE(5, kind) RANGE(6, kind) RANGE(7, kind) RANGE(8, kind)

RANGES(FLOAT)
RANGES(BFLOAT)
RANGES(INT)

#define BY_ROWS(kind)                                                                                                       \
    switch (p->rows) {                                                                                                      \
    case 1: NAME(range_1_##kind)(p, first, last); break;                                                                    \
    case 2: NAME(range_2_##kind)(p, first, last); break;                                                                    \
    case 3: NAME(range_3_##kind)(p, first, last); break;                                                                    \
    case 4: NAME(range_4_##kind)(p, first, last); break;                                                                    \
    case 5: NAME(range_5_##kind)(p, first, last); break;                                                                    \
    case 6: NAME(range_6_##kind)(p, first, last); break;                                                                    \
    case 7: NAME(range_7_##kind)(p, first, last); break;                                                                    \
    default: NAME(range_8_##kind)(p, first, last);                                                                          \
    }

TARGET static void NAME(outputs)(const Products *p, long first, long last)
{
    if (p->by_input && p->kind == FLOAT)
        NAME(strip)(p, first, last, FLOAT);
    else if (p->by_input && p->kind == BFLOAT)
        NAME(strip)(p, first, last, BFLOAT);
    else if (p->by_input)
        NAME(strip)(p, first, last, INT);
    else if (p->kind == FLOAT)
        BY_ROWS(FLOAT)
    else if (p->kind == BFLOAT)
        BY_ROWS(BFLOAT)
    else
        BY_ROWS(INT)
}

#undef BY_ROWS
#undef RANGES
#undef RANGE
#undef LANES
#undef TILE
#undef TARGET
#undef NAME
