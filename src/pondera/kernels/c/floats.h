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
