/* Conversion of float16 to float. */
#ifndef PONDERA_HALVES_H
#define PONDERA_HALVES_H

#include "floats.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

INLINE float from_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits;
    float number;
    if (rest >= 0x7c00) { /* infinity and NaN */
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + 0x38000000);
    } else { /* 0 and subnormal numbers: a multiple of 2^-24 */
        number = (float)rest * 5.9604644775390625e-8f;
        return sign ? -number : number;
    }
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE void from_halves(const uint16_t *halves, float *to, long count)
{
    long i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
    for (; i < count; i++)
        to[i] = from_half(halves[i]);
}

#endif
