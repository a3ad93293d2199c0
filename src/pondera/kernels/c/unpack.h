/* Numbers of 1, 2, 4 or 8 bits, packed in bytes, the first in the lowest bits. */
#ifndef PONDERA_UNPACK_H
#define PONDERA_UNPACK_H

#include "floats.h"

INLINE void unpack(const uint8_t *restrict codes, uint8_t *restrict levels, long D, int bits)
{
    const long bytes = D * bits / 8;
    const int each = 8 / bits, most = (1 << bits) - 1;
    for (long byte = 0; byte < bytes; byte++)
        for (int place = 0; place < each; place++)
            levels[byte * each + place] = codes[byte] >> (place * bits) & most;
}

static void unpack_any(const uint8_t *codes, uint8_t *levels, long D, int bits)
{
    if (bits == 4)
        unpack(codes, levels, D, 4);
    else if (bits == 2)
        unpack(codes, levels, D, 2);
    else if (bits == 1)
        unpack(codes, levels, D, 1);
    else
        memcpy(levels, codes, D);
}

#endif
