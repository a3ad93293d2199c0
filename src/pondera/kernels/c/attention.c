/* Attention of a few queries to many KV slots: see attention.h. */
#include "attention.h"

int attention(const Attention *a) { return attend_to_slots(a); }
