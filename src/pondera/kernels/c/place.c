/* Stores the key and the value of one new token per batch row in a table of KV slots: in empty slots if every head has one, else
 * after the last slot in use. */
#include <stdint.h>
#include <string.h>

enum { NOTES = 4 }; /* the most notes */

/* A number of each slot. */
typedef struct {
    float *numbers; /* [B, G, room]; slots of a head are contiguous */
    int64_t B, G;   /* strides */
    float start;    /* of a new slot */
} Note;

typedef struct {
    char *keys, *values;     /* [B, G, room, D] and [B, G, room, E] of any dtype; rows are contiguous */
    int32_t *position;       /* [B, G, room]; slots of a head are contiguous */
    const char *key, *value; /* [B, G, D], [B, G, E] */
    int64_t B, G, used, room, number, holes; /* number: position of the new tokens; holes: whether slots may be empty */
    int64_t key_bytes, value_bytes; /* of a row; strides: those of keys and values in bytes, of positions in numbers */
    int64_t keys_B, keys_G, keys_S, values_B, values_G, values_S, position_B, position_G, key_B, key_G, value_B, value_G;
    int64_t notes;
    Note note[NOTES];
} Place;

/* The first empty slot of a head, or -1. */
static long empty_slot(const int32_t *position, long used)
{
    enum { STEP = 64 };
    long s = 0;
    for (; s + STEP <= used; s += STEP) {
        int found = 0;
        for (int i = 0; i < STEP; i++)
            found |= position[s + i] == INT32_MIN;
        if (found)
            break;
    }
    for (; s < used; s++)
        if (position[s] == INT32_MIN)
            return s;
    return -1;
}

/* Returns the number of slots in use; -1 if there is no room, and nothing was stored. */
int64_t place(const Place *p)
{
    int64_t slots[p->B * p->G + 1];
    int holes = p->holes;
    for (long bg = 0; bg < p->B * p->G && holes; bg++) {
        slots[bg] = empty_slot(p->position + bg / p->G * p->position_B + bg % p->G * p->position_G, p->used);
        holes = slots[bg] >= 0;
    }
    if (!holes && p->used == p->room)
        return -1;
    for (long bg = 0; bg < p->B * p->G; bg++) {
        const long b = bg / p->G, g = bg % p->G, s = holes ? slots[bg] : p->used;
        memcpy(p->keys + b * p->keys_B + g * p->keys_G + s * p->keys_S, p->key + b * p->key_B + g * p->key_G, p->key_bytes);
        memcpy(p->values + b * p->values_B + g * p->values_G + s * p->values_S, p->value + b * p->value_B + g * p->value_G,
               p->value_bytes);
        p->position[b * p->position_B + g * p->position_G + s] = (int32_t)p->number;
        for (long n = 0; n < p->notes; n++)
            p->note[n].numbers[b * p->note[n].B + g * p->note[n].G + s] = p->note[n].start;
    }
    return p->used + !holes;
}
