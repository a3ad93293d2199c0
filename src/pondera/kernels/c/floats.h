/* SIMD vectors of floats, and their exponential for the softmax. */
#ifndef PONDERA_FLOATS_H
#define PONDERA_FLOATS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { WIDTH = 16 };
#else
enum { WIDTH = 8 };
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float *from)
{
    Floats x;
    memcpy(&x, from, sizeof x); /* from any address */
    return x;
}

INLINE void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

INLINE Floats spread(float value) { return value - (Floats){0}; }

INLINE Floats choose(Ints where, Floats yes, Floats no) { return (Floats)((where & (Ints)yes) | (~where & (Ints)no)); }

INLINE float sum_of(Floats x)
{
    typedef float Quarter __attribute__((vector_size(16)));
    Quarter parts[WIDTH / 4];
    memcpy(parts, &x, sizeof x);
    for (int part = 1; part < WIDTH / 4; part++)
        parts[0] += parts[part];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
#if defined(__AVX512F__)
#define PAIRS_OF(a, b, i, j)                                                                                                \
    __builtin_shufflevector(a, b, i, i + 16, j, j + 16, i + 4, i + 20, j + 4, j + 20, i + 8, i + 24, j + 8, j + 24, i + 12, \
                            i + 28, j + 12, j + 28)
#define HALVES_OF(a, b, i)                                                                                                  \
    __builtin_shufflevector(a, b, i, i + 1, i + 16, i + 17, i + 4, i + 5, i + 20, i + 21, i + 8, i + 9, i + 24, i + 25,     \
                            i + 12, i + 13, i + 28, i + 29)
#else
#define PAIRS_OF(a, b, i, j) __builtin_shufflevector(a, b, i, i + 8, j, j + 8, i + 4, i + 12, j + 4, j + 12)
#define HALVES_OF(a, b, i) __builtin_shufflevector(a, b, i, i + 1, i + 8, i + 9, i + 4, i + 5, i + 12, i + 13)
#endif
#endif

/* The sums of four vectors, with a third of the operations that four calls of `sum_of` need. */
INLINE void sums_of_four(const Floats *x, float *to)
{
#ifdef SHUFFLES
    typedef float Quarter __attribute__((vector_size(16)));
    const Floats a = PAIRS_OF(x[0], x[1], 0, 1) + PAIRS_OF(x[0], x[1], 2, 3);
    const Floats b = PAIRS_OF(x[2], x[3], 0, 1) + PAIRS_OF(x[2], x[3], 2, 3);
    const Floats all = HALVES_OF(a, b, 0) + HALVES_OF(a, b, 2);
    Quarter parts[WIDTH / 4];
    memcpy(parts, &all, sizeof all);
    for (int part = 1; part < WIDTH / 4; part++)
        parts[0] += parts[part];
    memcpy(to, parts, sizeof parts[0]);
#else
    for (int i = 0; i < 4; i++)
        to[i] = sum_of(x[i]);
#endif
}

/* exp(x), accurate to one or two units in the last place; 0 below -87, the limit of float32; for x of at most 0. */
INLINE Floats exponential(Floats x)
{
    const Floats magic = spread(12582912.f); /* 1.5 * 2^23: adding it rounds to an integer, in the lowest bits */
    Ints nothing = x < spread(-87.f);
    x = choose(nothing, spread(-87.f), x);
    Floats shifted = x * 1.44269504f + magic, whole = shifted - magic;
    Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats power = spread(1 / 720.f);
    power = power * rest + 1 / 120.f;
    power = power * rest + 1 / 24.f;
    power = power * rest + 1 / 6.f;
    power = power * rest + 0.5f;
    power = power * rest + 1;
    power = power * rest + 1;
    Floats scale = (Floats)(((Ints)shifted << 23) + 0x3f800000);
    return choose(nothing, spread(0), power * scale);
}

#endif
