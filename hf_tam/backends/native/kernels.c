/* A step over tensors in plain memory: the sums that the angle is made of, and the update, in one call each or in one.
 *
 * Every tensor is cut into chunks, and these into blocks. A block is summed in float, 32 terms a lane (relative error
 * below 1e-6 of the sum of the absolute terms), or in double where float might overflow or lose small terms: what is
 * not finite in a sum was not finite in the tensors. The sums of the blocks are added up in double, in the order of
 * blocks and chunks, so they do not depend on the number of threads. bf16 is computed in float and rounded once, to
 * nearest even; where the CPU has instructions for bf16, Adam's update of whole groups of 32 and the sums in float
 * take what is below 2^-126 for 0.
 */
#define _POSIX_C_SOURCE 199309L /* nanosleep */
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "passes.h"
#include "scalar_stage.h"

enum {
    BYTES_TO_SHARE = 4 << 20, /* a tensor of more is shared by the threads: what its sums have read would be gone */
    LONGEST_RUN = 16,         /* chunks that a thread takes of it at a time */
    RUNS_A_THREAD = 4,        /* at least, where there are as many chunks */
    LOOKS = 1000,             /* at what another thread has yet to do, before others may have the core */
    YIELDS = 100,             /* before it sleeps */
    PAUSE = 50000             /* nanoseconds */
};

/* Writes COLUMNS for each tensor. */
int hf_tam_sums(const tensor *tensors, int64_t count, int64_t threads, double *rows) {
    return pass_over(&(job){.tensors = tensors, .count = count}, threads, rows);
}

int hf_tam_adam(const tensor *tensors, int64_t count, int64_t threads, const adam_row *rows, double clip) {
    return pass_over(&(job){.tensors = tensors, .count = count, .adam = rows, .clip = clip}, threads, NULL);
}

int hf_tam_sgd(const tensor *tensors, int64_t count, int64_t threads, const sgd_row *rows, double clip) {
    return pass_over(&(job){.tensors = tensors, .count = count, .sgd = rows, .clip = clip}, threads, NULL);
}

/* --- the whole step, tensor by tensor, where no tensor waits for another: what the sums have read is still in the
 * cache when it is updated ---------------------------------------------------------------------------------------- */

typedef struct {
    const tensor *tensors;
    int64_t count, next; /* `next` is the tensor that a thread takes next */
    const numbers *numbers; /* of each param group */
    int is_adaptive, skips_nonfinite;
    float *scalars;  /* rows step, exp_avg_scale (Adam's only) and torque, a column a tensor */
    double *reports; /* REPORTS for each tensor */
    int64_t num_shared, threads;
    struct shared *shared;
    double *sums; /* COLUMNS for each chunk of a shared tensor: the next one's sums begin when these are added up */
} step;

/* From the sums of a tensor to the numbers of its update. Returns 0 where it is left out. */
static int advance(const step *step, int64_t at, coefficients *out) {
    double *report = step->reports + REPORTS * at;
    int is_kept = !step->skips_nonfinite || isfinite(report[RAW_SQ]);
    scalar_stage(&step->numbers[step->tensors[at].group], step->is_adaptive, is_kept, step->scalars + at, step->count,
                 report, out);
    return is_kept;
}

/* The scalar stage alone, to be tried against its other dialects. */
int hf_tam_scalar_stage(
    int64_t count, const numbers *numbers, int is_adaptive, const int64_t *groups, float *scalars, double *reports,
    coefficients *out
) {
    for (int64_t at = 0; at < count; at++)
        scalar_stage(&numbers[groups[at]], is_adaptive, 1, scalars + at, count, reports + REPORTS * at, out + at);
    return 0;
}

INLINE pass update_by(const step *step, const coefficients *numbers) {
    pass pass = {.clip = 1.0};
    if (step->is_adaptive) pass.adam = &numbers->adam;
    else pass.sgd = &numbers->sgd;
    return pass;
}

/* A tensor that the threads share. Each takes some chunks at a time, first of the sums, and goes on to the update when
 * all sums are there, whoever took them: nothing depends on how many threads have come. */
typedef struct shared {
    int64_t at, next_sum, summed, next_update; /* `at` is the tensor's place; the others are counted in chunks */
    int is_ready, is_kept;                     /* the step's numbers are there; it is not left out */
    coefficients numbers;
} shared;

INLINE int is_shared(const tensor *t) { return t->count * (t->kind == FLOAT32 ? 4 : 2) > BYTES_TO_SHARE; }

static void finish_sums(const step *step, shared *mine, int64_t chunks) {
    double *report = step->reports + REPORTS * mine->at;
    for (int column = 0; column < COLUMNS; column++) {
        report[column] = 0.0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) report[column] += step->sums[COLUMNS * chunk + column];
    }
    mine->is_kept = advance(step, mine->at, &mine->numbers);
    __atomic_store_n(&mine->is_ready, 1, __ATOMIC_RELEASE);
}

/* Not by a lock: what is waited for is mostly there within microseconds. */
static void wait_for(const int *flag) {
    for (int looks = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE);) {
        if (looks < LOOKS + YIELDS) looks++;
        if (looks >= LOOKS + YIELDS) nanosleep(&(struct timespec){.tv_nsec = PAUSE}, NULL);
        else if (looks >= LOOKS) sched_yield();
    }
}

/* The end of the next run of chunks, which begins at `*begin`; 0 where there is none. */
INLINE int64_t next_run(int64_t *next, int64_t chunks, int64_t threads, int64_t *begin) {
    int64_t run = chunks / (RUNS_A_THREAD * threads);
    run = run < 1 ? 1 : run > LONGEST_RUN ? LONGEST_RUN : run;
    *begin = __atomic_fetch_add(next, run, __ATOMIC_RELAXED);
    return *begin >= chunks ? 0 : *begin + run < chunks ? *begin + run : chunks;
}

static void take_part(const step *step, shared *mine) {
    const tensor *t = &step->tensors[mine->at];
    const int64_t chunks = num_chunks(t);
    for (int64_t begin, end; (end = next_run(&mine->next_sum, chunks, step->threads, &begin));) {
        for (int64_t chunk = begin; chunk < end; chunk++)
            visit(t, chunk, &(pass){.sums = step->sums + COLUMNS * chunk});
        /* Acquire and release: whoever adds the last chunks reads the sums that the others have written. */
        int64_t summed = __atomic_add_fetch(&mine->summed, end - begin, __ATOMIC_ACQ_REL);
        if (summed == chunks) finish_sums(step, mine, chunks);
    }
    wait_for(&mine->is_ready);
    if (!mine->is_kept) return;
    const pass update = update_by(step, &mine->numbers);
    /* The last runs first: they are what the cache still holds. Each of them forwards, as the CPU fetches ahead: one
     * chunk before the other, a step took up to 1.2 times as long. */
    for (int64_t begin, end; (end = next_run(&mine->next_update, chunks, step->threads, &begin));)
        for (int64_t chunk = chunks - end; chunk < chunks - begin; chunk++) visit(t, chunk, &update);
}

static void take_whole(const step *step, int64_t at) {
    const tensor *t = &step->tensors[at];
    const int64_t chunks = num_chunks(t);
    double *report = step->reports + REPORTS * at, sums[COLUMNS];
    for (int column = 0; column < COLUMNS; column++) report[column] = 0.0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        visit(t, chunk, &(pass){.sums = sums});
        for (int column = 0; column < COLUMNS; column++) report[column] += sums[column];
    }
    coefficients numbers;
    if (!advance(step, at, &numbers)) return;
    const pass update = update_by(step, &numbers);
    for (int64_t end = chunks, begin; end > 0; end = begin) { /* the last run first here too */
        begin = end > LONGEST_RUN ? end - LONGEST_RUN : 0;
        for (int64_t chunk = begin; chunk < end; chunk++) visit(t, chunk, &update);
    }
}

static void *take_tensors(void *argument) {
    step *step = *(void **)argument;
    for (int64_t i = 0; i < step->num_shared; i++) take_part(step, &step->shared[i]);
    for (int64_t at; (at = __atomic_fetch_add(&step->next, 1, __ATOMIC_RELAXED)) < step->count;)
        if (!is_shared(&step->tensors[at])) take_whole(step, at);
    return NULL;
}

/* Returns 0, or 1 where there is no memory. */
int hf_tam_step(
    const tensor *tensors, int64_t count, int64_t threads, const numbers *numbers, int is_adaptive,
    int skips_nonfinite, float *scalars, double *reports
) {
    int64_t elements = 0, chunks = 0, num_shared = 0;
    for (int64_t at = 0; at < count; at++) {
        elements += tensors[at].count;
        if (!is_shared(&tensors[at])) continue;
        num_shared++;
        if (num_chunks(&tensors[at]) > chunks) chunks = num_chunks(&tensors[at]);
    }
    threads = worthwhile(threads, elements);
    step step = {.tensors = tensors, .count = count, .numbers = numbers, .is_adaptive = is_adaptive,
                 .skips_nonfinite = skips_nonfinite, .scalars = scalars, .reports = reports,
                 .num_shared = num_shared, .threads = threads};
    /* One more than there are: malloc(0) may give NULL, which is no lack of memory. */
    step.shared = calloc(num_shared + 1, sizeof *step.shared);
    step.sums = malloc((COLUMNS * chunks + 1) * sizeof *step.sums);
    int is_out_of_memory = !step.shared || !step.sums;
    if (!is_out_of_memory) {
        for (int64_t at = 0, i = 0; at < count; at++)
            if (is_shared(&tensors[at])) step.shared[i++].at = at;
        void *shares[MAX_THREADS];
        for (int64_t i = 0; i < threads; i++) shares[i] = &step;
        run(take_tensors, shares, sizeof *shares, threads);
    }
    free(step.shared);
    free(step.sums);
    return is_out_of_memory;
}
