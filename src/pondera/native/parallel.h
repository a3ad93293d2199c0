/* Threads for one call: they take the next of a number of items until there is none, and are gone when it returns.
 *
 * Making a thread takes some 10 microseconds, so an item should be worth a hundred. Nothing is kept between calls; so a
 * process can be forked whenever no kernel runs, and its child uses kernels like any other.
 */
#ifndef PONDERA_PARALLEL_H
#define PONDERA_PARALLEL_H

#include <pthread.h>

enum { MOST_THREADS = 256 };

typedef struct {
    long next, items;
    void (*work)(void *task, long item);
    void *task;
} Queue;

static void *take_items(void *given)
{
    Queue *queue = given;
    for (;;) {
        long item = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (item >= queue->items)
            return NULL;
        queue->work(queue->task, item);
    }
}

/* Calls work(task, item) for every item from 0 to items - 1, on so many threads at most, the caller's among them. */
static void parallel(long items, long threads, void (*work)(void *task, long item), void *task)
{
    Queue queue = {0, items, work, task};
    pthread_t others[MOST_THREADS];
    int made = 0;
    threads = threads < items ? threads : items;
    while (made < threads - 1 && made < MOST_THREADS && !pthread_create(&others[made], NULL, take_items, &queue))
        made++; /* of threads that cannot be made, those that can do the work */
    take_items(&queue);
    for (int other = 0; other < made; other++)
        pthread_join(others[other], NULL);
}

#endif
