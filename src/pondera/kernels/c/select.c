/* Which slots the queries of a layer attend to: the first ones, the latest, and those with the most votes of all heads. */
#include "attention.h"

typedef struct {
    Attention scores;       /* of one query per head and all slots: [B, G, R, S] */
    const int64_t *first_B; /* slots of tokens before this position are always selected */
    float *last;            /* [B, G, R, D]: the queries of the last selection; changed */
    float *note;            /* [B, G, room]: above 0 for slots of the last selection; changed */
    int64_t note_B, note_G;
    int64_t recent, chosen; /* slots from this position on are always selected; number of other selected slots */
    int64_t remember;       /* whether a new selection becomes the last one */
    double reuse;           /* cosine of the queries from which the last selection is used again */
    int64_t *index_BS;      /* output: the selected slots of each row, then -1 */
} Select;

static const int32_t *position_of(const Select *s, long b) { return s->scores.position + b * s->scores.position_B; }

static int is_always(const Select *s, long b, int32_t at) { return at < s->first_B[b] || at >= s->recent; }

/* Whether the queries of a row are similar to those of the last selection. */
static int is_alike(const Select *s, long b)
{
    const Attention *a = &s->scores;
    double product = 0, mine = 0, theirs = 0;
    for (long h = 0; h < a->G * a->R; h++) {
        const float *query = a->query + b * a->query_B + h / a->R * a->query_G + h % a->R * a->query_R;
        const float *last = s->last + (b * a->G * a->R + h) * a->D;
        float one = 0, two = 0, three = 0;
        for (long d = 0; d < a->D; d++) {
            one += query[d] * last[d];
            two += query[d] * query[d];
            three += last[d] * last[d];
        }
        product += one, mine += two, theirs += three;
    }
    return theirs > 0 && product >= s->reuse * sqrt(mine) * sqrt(theirs);
}

/* The sum of the votes of all heads for each selectable slot; each has one vote. Others get -1. */
static void vote(const Select *s, long b, float *votes, float *weights)
{
    const Attention *a = &s->scores;
    const int32_t *position = position_of(s, b);
    const long padded = (a->S + WIDTH - 1) / WIDTH * WIDTH;
    for (long slot = 0; slot < padded; slot++)
        votes[slot] = slot < a->S && position[slot] >= 0 && !is_always(s, b, position[slot]) ? 0 : -1;
    for (long h = 0; h < a->G * a->R; h++) {
        const float *scores = a->score_BGNS + (b * a->G * a->R + h) * a->S;
        for (long slot = 0; slot < padded; slot++)
            weights[slot] = votes[slot] < 0 ? -INFINITY : scores[slot];
        Found found = {-INFINITY, 0};
        take_in(&found, weights, padded);
        const float share = found.sum > 0 ? 1 / found.sum : 0;
        for (long slot = 0; slot < padded; slot++)
            votes[slot] += votes[slot] < 0 ? 0 : share * weights[slot];
    }
}

/* The value that `rank` of the numbers are above or equal to; reorders them. */
static float value_of_rank(float *numbers, long count, long rank)
{
    long low = 0, high = count - 1;
    while (low < high) {
        const float middle = numbers[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (numbers[i] > middle)
                i++;
            while (numbers[j] < middle)
                j--;
            if (i <= j) {
                const float other = numbers[i];
                numbers[i++] = numbers[j];
                numbers[j--] = other;
            }
        }
        if (rank - 1 <= j)
            high = j;
        else if (rank - 1 >= i)
            low = i;
        else
            break;
    }
    return numbers[rank - 1];
}

/* Marks the slots with the most votes; among equal ones the first. */
static void choose_slots(const Select *s, const float *votes, float *space, uint8_t *choice)
{
    const long S = s->scores.S;
    long above = 0;
    memcpy(space, votes, S * sizeof(float));
    const float least = value_of_rank(space, S, s->chosen);
    for (long slot = 0; slot < S; slot++)
        above += votes[slot] > least;
    for (long slot = 0; slot < S; slot++) {
        choice[slot] = votes[slot] > least || (votes[slot] == least && above < s->chosen);
        above += votes[slot] == least && choice[slot];
    }
}

static void remember(const Select *s, long b, const uint8_t *choice)
{
    const Attention *a = &s->scores;
    for (long h = 0; h < a->G * a->R; h++)
        memcpy(s->last + (b * a->G * a->R + h) * a->D,
               a->query + b * a->query_B + h / a->R * a->query_G + h % a->R * a->query_R, a->D * sizeof(float));
    for (long g = 0; g < a->G; g++)
        for (long slot = 0; slot < a->S; slot++)
            s->note[b * s->note_B + g * s->note_G + slot] = choice[slot];
}

/* Returns the most slots that a row selects; 0 if all rows select all slots; -1 if memory allocation fails. */
int64_t select_slots(const Select *s)
{
    const Attention *a = &s->scores;
    const long padded = (a->S + WIDTH - 1) / WIDTH * WIDTH;
    long many = 0, most = 0;
    int free_slots[a->B], scored = 0;
    for (long b = 0; b < a->B; b++) {
        const int32_t *position = position_of(s, b);
        long count = 0;
        for (long slot = 0; slot < a->S; slot++)
            count += position[slot] >= 0 && !is_always(s, b, position[slot]);
        free_slots[b] = count > s->chosen;
        many += free_slots[b];
    }
    if (!many)
        return 0;
    float *votes = malloc(3 * padded * sizeof(float) + a->S);
    if (!votes)
        return -1;
    uint8_t *choice = (uint8_t *)(votes + 3 * padded);
    for (long b = 0; b < a->B; b++) {
        const int32_t *position = position_of(s, b);
        if (!free_slots[b])
            memset(choice, 1, a->S);
        else if (is_alike(s, b))
            for (long slot = 0; slot < a->S; slot++)
                choice[slot] = s->note[b * s->note_B + slot] > 0;
        else {
            if (!scored && attend_to_slots(a)) {
                free(votes);
                return -1;
            }
            scored = 1;
            vote(s, b, votes, votes + padded);
            choose_slots(s, votes, votes + padded, choice);
            if (s->remember)
                remember(s, b, choice);
        }
        long count = 0;
        for (long slot = 0; slot < a->S; slot++) {
            s->index_BS[b * a->S + count] = slot;
            count += position[slot] >= 0 && (choice[slot] || is_always(s, b, position[slot]));
        }
        for (long rest = count; rest < a->S; rest++)
            s->index_BS[b * a->S + rest] = -1;
        most = count > most ? count : most;
    }
    free(votes);
    return most;
}
