/* A parallel loop over work items for one call.
 *
 * If torch has OpenMP threads, they do the work: after an operation of torch they spin for a while, waiting for the next one,
 * and would compete with other threads for the cores. After a fork these threads do not exist and OpenMP would wait forever; in
 * that case, and without OpenMP, threads are created for the call. Creating a thread takes about 10 microseconds, so an item
 * should take 100 or more.
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
/* Entry points of the OpenMP library that torch has loaded, if any; this library is not linked to OpenMP. */
extern void GOMP_parallel(void (*work)(void *), void *task, unsigned threads, unsigned flags) __attribute__((weak));
static int forked;

static void note_fork(void) { forked = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, note_fork); }

static void take_items_of(void *queue) { take_items(queue); }

/* Whether the threads of torch have done the work. */
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

/* Calls work(task, item) for every item from 0 to items - 1, on at most `threads` threads including the caller. */
static void parallel(long items, long threads, void (*work)(void *task, long item), void *task)
{
    Queue queue = {0, items, work, task};
    pthread_t others[MOST_THREADS];
    int made = 0;
    threads = threads < items ? threads : items;
    if (threads > 1 && parallel_in_openmp(&queue, threads))
        return;
    while (made < threads - 1 && made < MOST_THREADS && !pthread_create(&others[made], NULL, take_items, &queue))
        made++; /* if a thread cannot be created, the others do the work */
    take_items(&queue);
    for (int other = 0; other < made; other++)
        pthread_join(others[other], NULL);
}

#endif
