/* The two passes of a step over tensors in plain memory: the sums that the angle is made of, and the update.
 *
 * Every tensor is cut into chunks, and each thread of a call takes an equal run of them. A sum is taken chunk by chunk
 * in double and added up in the order of the chunks, so it does not depend on the number of threads. The product of
 * two floats is exact in double and cannot overflow it: what is not finite in a sum was not finite in the tensors.
 * bf16 is computed in float and rounded once, to nearest even.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Each kind of tensor gets a loop of its own, so everything is inlined into `work` with constants for the kind. */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16 };
enum {
    CHUNK = 8192,              /* elements */
    CHUNKS_WORTH_A_THREAD = 8, /* starting one takes as long as the update of about 3 */
    LANES = 8,                 /* doubles that are summed side by side */
    MAX_THREADS = 256
};

/* One row of the table that Python fills. */
typedef struct {
    int64_t count;     /* elements */
    int64_t dtype;     /* FLOAT32 or BFLOAT16, of all four */
    int64_t takes_dot; /* 0: only the norm of the gradient is wanted */
    int64_t negated;   /* 1: the sign of the gradient is turned */
    void *param, *grad, *first, *second;
    double decay; /* coupled: this many times the parameter belong to the gradient */
} tensor;

/* The numbers of one step of one tensor, as in update.AdamCoefficients and update.SgdCoefficients. */
typedef struct {
    double decay, first_weight, second_decay, second_weight, step_size, eps;
} adam_row;

typedef struct {
    double momentum, gain, step_size;
} sgd_row;

/* What a call does. */
typedef struct {
    const tensor *tensors;
    int64_t count;
    const int64_t *starts; /* the number of each tensor's first chunk, and that of all chunks at the end */
    double *sums;          /* four for each chunk, or NULL: an update, by one of */
    const adam_row *adam;
    const sgd_row *sgd;
    double clip; /* the factor on every gradient */
} job;

INLINE float load(const void *base, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)base)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void store(void *base, int64_t i, int dtype, float value) {
    if (dtype == FLOAT32) {
        ((float *)base)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ((uint16_t *)base)[i] = (uint16_t)(value != value ? 0x7fc0 : rounded);
}

INLINE float gradient(const tensor *t, int64_t i, int dtype, int coupled) {
    float g = load(t->grad, i, dtype);
    if (!coupled) return g;
    return (t->negated ? -g : g) + (float)t->decay * load(t->param, i, dtype);
}

/* LANES floats, doubles or halves of floats. Spelt out, since compilers miss it that a loop with sums is one of these. */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef double doubles __attribute__((vector_size(8 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE doubles load_lanes(const void *base, int64_t i, int dtype) {
    floats values;
    if (dtype == FLOAT32) {
        memcpy(&values, (const float *)base + i, sizeof values);
    } else {
        halves upper;
        memcpy(&upper, (const uint16_t *)base + i, sizeof upper);
        words bits = __builtin_convertvector(upper, words) << 16;
        memcpy(&values, &bits, sizeof values);
    }
    return __builtin_convertvector(values, doubles);
}

INLINE double total(doubles lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

/* <m, g>, |m|^2, |g|^2 and the square of the gradient as it came, of the elements [begin, end). */
INLINE void sums_of(const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, double *out) {
    const double sign = t->negated ? -1.0 : 1.0;
    doubles dot = {0}, first_sq = {0}, grad_sq = {0}, raw_sq = {0};
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
        doubles m = load_lanes(t->first, i, dtype), raw = load_lanes(t->grad, i, dtype), g = raw;
        if (coupled) {
            g = sign * raw + t->decay * load_lanes(t->param, i, dtype);
            raw_sq += raw * raw;
        }
        dot += m * g;
        first_sq += m * m;
        grad_sq += g * g;
    }
    out[0] = total(dot), out[1] = total(first_sq), out[2] = total(grad_sq), out[3] = total(raw_sq);
    for (; i < end; i++) {
        double m = load(t->first, i, dtype), raw = load(t->grad, i, dtype), g = raw;
        if (coupled) g = sign * raw + t->decay * load(t->param, i, dtype);
        out[0] += m * g, out[1] += m * m, out[2] += g * g, out[3] += raw * raw;
    }
    if (!coupled) out[3] = out[2];
}

INLINE void square_of(const tensor *t, int dtype, int64_t begin, int64_t end, double *out) {
    doubles lanes = {0};
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
        doubles g = load_lanes(t->grad, i, dtype);
        lanes += g * g;
    }
    double sum = total(lanes);
    for (; i < end; i++) sum += (double)load(t->grad, i, dtype) * load(t->grad, i, dtype);
    out[0] = out[1] = 0.0;
    out[2] = out[3] = sum;
}

/* update.adam_step. The decay is subtracted with the step: 1 - 1e-8 would be 1 in float. */
INLINE void adam_of(
    const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, const adam_row *row, float clip
) {
    const int is_near_grad = row->first_weight >= 0.5; /* a lerp starts from the nearer end */
    const float weight = row->first_weight, rest = 1.0 - row->first_weight, shrink = 1.0 - row->decay,
                second_decay = row->second_decay, second_weight = row->second_weight, step_size = row->step_size,
                eps = row->eps;
    for (int64_t i = begin; i < end; i++) {
        float p = load(t->param, i, dtype), m = load(t->first, i, dtype), v = load(t->second, i, dtype),
              g = gradient(t, i, dtype, coupled) * clip;
        m = is_near_grad ? g - (g - m) * rest : m + (g - m) * weight;
        v = v * second_decay + g * second_weight * g;
        p -= p * shrink + m / (sqrtf(v) + eps) * step_size;
        store(t->param, i, dtype, p);
        store(t->first, i, dtype, m);
        store(t->second, i, dtype, v);
    }
}

/* update.sgd_step. */
INLINE void sgd_of(
    const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, const sgd_row *row, float clip
) {
    const float momentum = row->momentum, gain = row->gain, step_size = row->step_size;
    for (int64_t i = begin; i < end; i++) {
        float m = load(t->first, i, dtype) * momentum + gradient(t, i, dtype, coupled) * clip * gain;
        store(t->param, i, dtype, load(t->param, i, dtype) - m * step_size);
        store(t->first, i, dtype, m);
    }
}

INLINE void visit(const job *job, int64_t at, int64_t chunk, int dtype, int coupled) {
    const tensor t = job->tensors[at]; /* a copy, that no store can be to */
    int64_t begin = (chunk - job->starts[at]) * CHUNK;
    int64_t end = t.count - begin < CHUNK ? t.count : begin + CHUNK;
    if (job->adam) adam_of(&t, dtype, coupled, begin, end, &job->adam[at], job->clip);
    else if (job->sgd) sgd_of(&t, dtype, coupled, begin, end, &job->sgd[at], job->clip);
    else if (t.takes_dot) sums_of(&t, dtype, coupled, begin, end, job->sums + 4 * chunk);
    else square_of(&t, dtype, begin, end, job->sums + 4 * chunk);
}

typedef struct {
    const job *job;
    int64_t begin, end; /* chunks */
} share;

static void *work(void *argument) {
    const share *mine = argument;
    const job *job = mine->job;
    int64_t at = 0;
    for (int64_t chunk = mine->begin; chunk < mine->end; chunk++) {
        while (job->starts[at + 1] <= chunk) at++;
        const tensor *t = &job->tensors[at];
        int coupled = t->negated || t->decay != 0.0;
        if (t->dtype == FLOAT32) {
            if (coupled) visit(job, at, chunk, FLOAT32, 1);
            else visit(job, at, chunk, FLOAT32, 0);
        } else {
            if (coupled) visit(job, at, chunk, BFLOAT16, 1);
            else visit(job, at, chunk, BFLOAT16, 0);
        }
    }
    return NULL;
}

/* The threads live as long as the call: none is left behind for a fork to lose. Those that do not start are replaced. */
static void run(const job *job, int64_t threads) {
    share shares[MAX_THREADS];
    pthread_t handles[MAX_THREADS];
    char is_started[MAX_THREADS] = {0};
    int64_t chunks = job->starts[job->count], most = chunks / CHUNKS_WORTH_A_THREAD;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > most) threads = most;
    if (threads < 1) threads = 1;
    for (int64_t i = 0; i < threads; i++) shares[i] = (share){job, chunks * i / threads, chunks * (i + 1) / threads};
    for (int64_t i = 1; i < threads; i++) is_started[i] = pthread_create(&handles[i], NULL, work, &shares[i]) == 0;
    work(&shares[0]);
    for (int64_t i = 1; i < threads; i++)
        if (is_started[i]) pthread_join(handles[i], NULL);
        else work(&shares[i]);
}

/* NULL where there is no memory. */
static int64_t *number_chunks(const tensor *tensors, int64_t count) {
    int64_t *starts = malloc((count + 1) * sizeof *starts), chunks = 0;
    if (!starts) return NULL;
    for (int64_t i = 0; i < count; i++) {
        starts[i] = chunks;
        chunks += (tensors[i].count + CHUNK - 1) / CHUNK;
    }
    starts[count] = chunks;
    return starts;
}

/* Writes rows <m, g>, |m|^2, |g|^2, raw |g|^2. Returns 0, or 1 where there is no memory. */
int hf_tam_sums(const tensor *tensors, int64_t count, int64_t threads, double *rows) {
    int64_t *starts = number_chunks(tensors, count);
    double *sums = starts ? malloc((4 * starts[count] + 1) * sizeof *sums) : NULL;
    const int ok = sums != NULL;
    if (ok) {
        run(&(job){.tensors = tensors, .count = count, .starts = starts, .sums = sums}, threads);
        for (int64_t i = 0; i < count; i++)
            for (int column = 0; column < 4; column++) {
                double sum = 0.0;
                for (int64_t chunk = starts[i]; chunk < starts[i + 1]; chunk++) sum += sums[4 * chunk + column];
                rows[4 * i + column] = sum;
            }
    }
    free(sums);
    free(starts);
    return !ok;
}

static int update(job *job, int64_t threads) {
    int64_t *starts = number_chunks(job->tensors, job->count);
    if (!starts) return 1;
    job->starts = starts;
    run(job, threads);
    free(starts);
    return 0;
}

int hf_tam_adam(const tensor *tensors, int64_t count, int64_t threads, const adam_row *rows, double clip) {
    return update(&(job){.tensors = tensors, .count = count, .adam = rows, .clip = clip}, threads);
}

int hf_tam_sgd(const tensor *tensors, int64_t count, int64_t threads, const sgd_row *rows, double clip) {
    return update(&(job){.tensors = tensors, .count = count, .sgd = rows, .clip = clip}, threads);
}
