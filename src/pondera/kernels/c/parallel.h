/* Threads for one call: they take the next of a number of items until there is none.
 *
 * Where torch has threads of OpenMP, it is those that do the work: after an operation of torch's they wait busily for a while
 * for its next one, and would hold up threads of ours on the same cores. A process that was forked has none of them left and
 * would wait for ever; there, and where there is no OpenMP, threads are made for the call and gone when it returns. Making one
 * takes some 10 microseconds, so an item should be worth a hundred.
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

#ifdef __linux__
/* Of the OpenMP that torch has loaded, if any: this library is linked to none. */
extern void GOMP_parallel(void (*work)(void *), void *task, unsigned threads, unsigned flags) __attribute__((weak));
static int forked;

static void note_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, note_fork); }

static void take_items_of(void *queue) { take_items(queue); }

/* Whether torch's threads have done the work. */
static int parallel_in_openmp(Queue *queue, long threads)
{
    if (!GOMP_parallel || forked)
        return 0;
    GOMP_parallel(take_items_of, queue, (unsigned)threads, 0);
    return 1;
}
#else
static int parallel_in_openmp(Queue *queue, long threads) { return 0 * (queue != NULL) * threads; }
#endif

/* Calls work(task, item) for every item from 0 to items - 1, on so many threads at most, the caller's among them. */
static void parallel(long items, long threads, void (*work)(void *task, long item), void *task)
{
    Queue queue = {0, items, work, task};
    pthread_t others[MOST_THREADS];
    int made = 0;
    threads = threads < items ? threads : items;
    if (threads > 1 && parallel_in_openmp(&queue, threads))
        return;
    while (made < threads - 1 && made < MOST_THREADS && !pthread_create(&others[made], NULL, take_items, &queue))
        made++; /* of threads that cannot be made, those that can do the work */
    take_items(&queue);
    for (int other = 0; other < made; other++)
        pthread_join(others[other], NULL);
}

#endif
