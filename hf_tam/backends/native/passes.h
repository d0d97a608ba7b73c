/* A pass over tensors, chunk by chunk, by several threads. */
#pragma once
#include <pthread.h>
#include <stdlib.h>

#include "sums.h"
#include "updates.h"

enum {
    CHUNK = 8192,             /* elements */
    WORTH_A_THREAD = 1 << 16, /* elements; starting one takes as long as the update of 25,000, or longer */
    MAX_THREADS = 256
};

/* One pass over some elements of a tensor: an update by `adam` or `sgd`, or else the sums. */
typedef struct {
    const adam_row *adam;
    const sgd_row *sgd;
    double clip; /* the factor on every gradient */
    double *sums;
} pass;

INLINE void visit_kind(const tensor *t, int kind, int coupled, int64_t begin, int64_t end, const pass *pass) {
    if (pass->adam) adam_of(t, kind, coupled, begin, end, pass->adam, pass->clip);
    else if (pass->sgd) sgd_of(t, kind, coupled, begin, end, pass->sgd, pass->clip);
    else if (t->takes_dot) sums_of(t, kind, coupled, begin, end, pass->sums);
    else square_of(t, kind, begin, end, pass->sums);
}

static void visit(const tensor *tensor_, int64_t chunk, const pass *pass) {
    const tensor t = *tensor_; /* a copy, which no store can be to */
    int64_t begin = chunk * CHUNK, end = t.count - begin < CHUNK ? t.count : begin + CHUNK;
    int coupled = t.negated || t.decay != 0.0;
    /* What is usual has a loop without any coupling as well; of the others one each, or compiling takes 7 s. */
    switch (t.kind) {
    case FLOAT32:
        if (coupled) visit_kind(&t, FLOAT32, 1, begin, end, pass);
        else visit_kind(&t, FLOAT32, 0, begin, end, pass);
        break;
    case BFLOAT16:
        if (coupled) visit_kind(&t, BFLOAT16, 1, begin, end, pass);
        else visit_kind(&t, BFLOAT16, 0, begin, end, pass);
        break;
    case SPLIT: visit_kind(&t, SPLIT, coupled, begin, end, pass); break;
    case WIDE: visit_kind(&t, WIDE, coupled, begin, end, pass); break;
    case SPLIT_WIDE: visit_kind(&t, SPLIT_WIDE, coupled, begin, end, pass); break;
    }
}

INLINE int64_t num_chunks(const tensor *t) { return (t->count + CHUNK - 1) / CHUNK; }

/* Calls `work` with `threads` shares, one on the calling thread. The threads live as long as the call, so that a fork
 * finds none; the shares of those that do not start are taken over. Not by OpenMP, as torch's kernels: of its pool a
 * forked child has lost the threads, and on a busy machine it took 1,500 ms for a step of 20. */
static void run(void *(*work)(void *), void *shares, size_t size, int64_t threads) {
    pthread_t handles[MAX_THREADS];
    char is_started[MAX_THREADS];
    for (int64_t i = 1; i < threads; i++)
        is_started[i] = pthread_create(&handles[i], NULL, work, (char *)shares + i * size) == 0;
    work(shares);
    for (int64_t i = 1; i < threads; i++)
        if (is_started[i]) pthread_join(handles[i], NULL);
        else work((char *)shares + i * size);
}

INLINE int64_t worthwhile(int64_t threads, int64_t elements) {
    int64_t most = elements / WORTH_A_THREAD < MAX_THREADS ? elements / WORTH_A_THREAD : MAX_THREADS;
    threads = threads < most ? threads : most;
    return threads > 1 ? threads : 1;
}

/* --- one pass over all tensors: each thread takes an equal run of chunks ---------------------------------------- */

typedef struct {
    const tensor *tensors;
    int64_t count;
    int64_t *starts; /* the number of each tensor's first chunk, and that of all chunks at the end */
    const adam_row *adam;
    const sgd_row *sgd;
    double clip;
    double *sums; /* COLUMNS for each chunk */
} job;

typedef struct {
    const job *job;
    int64_t begin, end; /* chunks */
} chunk_share;

static void *take_chunks(void *argument) {
    const chunk_share *mine = argument;
    const job *job = mine->job;
    int64_t at = 0;
    for (int64_t chunk = mine->begin; chunk < mine->end; chunk++) {
        while (job->starts[at + 1] <= chunk) at++;
        pass pass = {.clip = job->clip};
        if (job->adam) pass.adam = &job->adam[at];
        else if (job->sgd) pass.sgd = &job->sgd[at];
        else pass.sums = job->sums + COLUMNS * chunk;
        visit(&job->tensors[at], chunk - job->starts[at], &pass);
    }
    return NULL;
}

/* Returns 0, or 1 where there is no memory. */
static int pass_over(job *job, int64_t threads, double *rows) {
    job->starts = malloc((job->count + 1) * sizeof *job->starts);
    if (!job->starts) return 1;
    int64_t chunks = 0, elements = 0;
    for (int64_t i = 0; i < job->count; i++) {
        job->starts[i] = chunks;
        chunks += num_chunks(&job->tensors[i]);
        elements += job->tensors[i].count;
    }
    job->starts[job->count] = chunks;
    if (rows && !(job->sums = malloc((COLUMNS * chunks + 1) * sizeof *job->sums))) {
        free(job->starts);
        return 1;
    }
    chunk_share shares[MAX_THREADS];
    threads = worthwhile(threads, elements);
    for (int64_t i = 0; i < threads; i++)
        shares[i] = (chunk_share){job, chunks * i / threads, chunks * (i + 1) / threads};
    run(take_chunks, shares, sizeof *shares, threads);
    for (int64_t i = 0; rows && i < job->count; i++)
        for (int column = 0; column < COLUMNS; column++) {
            rows[COLUMNS * i + column] = 0.0;
            for (int64_t chunk = job->starts[i]; chunk < job->starts[i + 1]; chunk++)
                rows[COLUMNS * i + column] += job->sums[COLUMNS * chunk + column];
        }
    free(job->sums);
    free(job->starts);
    return 0;
}
