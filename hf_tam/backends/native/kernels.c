/* A step over tensors in plain memory: the sums that the angle is made of, and the update, in one call each or in one.
 *
 * Every tensor is cut into chunks, and these into blocks. A block is summed in float, 32 terms a lane (relative error
 * below 1e-6 of the sum of the absolute terms), or in double where float might overflow or lose small terms: what is
 * not finite in a sum was not finite in the tensors. The sums of the blocks are added up in double, in the order of
 * blocks and chunks, so they do not depend on the number of threads. bf16 is computed in float and rounded once, to
 * nearest even; where the CPU has instructions for bf16, these take what is below 2^-126 for 0.
 */
#include <math.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Each kind of tensor gets a loop of its own: everything is inlined into `visit`, with constants for the kind. */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16 };
enum {
    CHUNK = 8192,              /* elements */
    WORTH_A_THREAD = 1 << 16,  /* elements; starting one takes as long as the update of 25,000, more if cores are busy */
    BYTES_TO_SHARE = 4 << 20,  /* a tensor of more is shared by the threads: what its sums have read would be gone */
    RUN = 16,                  /* chunks that a thread takes of it at a time */
    PATIENCE = 1000,           /* looks at what another thread has yet to do, before others may have the core */
    LANES = 16,                /* sums side by side */
    AHEAD = 2048,              /* bytes to fetch ahead: what the CPU does by itself ends with a page of 4,096 */
    BLOCK = 512,               /* elements summed in float, BLOCK / LANES terms a lane, before the sum becomes double */
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

/* Ask for what is AHEAD of place i, once a line of 64 bytes. */
INLINE void fetch_ahead(const void *base, int64_t i, int dtype) {
    int64_t byte = i * (dtype == FLOAT32 ? 4 : 2);
    if (byte % 64 == 0) __builtin_prefetch((const char *)base + byte + AHEAD);
}

INLINE void fetch_all_ahead(const tensor *t, int64_t i, int dtype) {
    fetch_ahead(t->param, i, dtype);
    fetch_ahead(t->grad, i, dtype);
    fetch_ahead(t->first, i, dtype);
    if (t->second) fetch_ahead(t->second, i, dtype);
}

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
    if (t->negated) g = -g;
    return t->decay != 0.0 ? g + (float)t->decay * load(t->param, i, dtype) : g; /* 0 * NaN would be NaN */
}

/* LANES floats. Spelt out, since compilers miss it that a loop with sums is one of these. */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* The numbers from place i on, LANES of fp32 or twice as many of bf16, in no order: a word of memory holds two of bf16,
 * which a shift and a mask take apart. Returns how many vectors that are. */
INLINE int load_unordered(const void *base, int64_t i, int dtype, floats *values) {
    if (dtype == FLOAT32) {
        memcpy(values, (const float *)base + i, sizeof *values);
        return 1;
    }
    words both;
    memcpy(&both, (const uint16_t *)base + i, sizeof both);
    words even = both << 16, odd = both & 0xffff0000;
    memcpy(&values[0], &even, sizeof even);
    memcpy(&values[1], &odd, sizeof odd);
    return 2;
}

INLINE double total(floats lanes) {
    double even = 0.0, odd = 0.0;
    for (int lane = 0; lane < LANES; lane += 2) {
        even += lanes[lane];
        odd += lanes[lane + 1];
    }
    return even + odd;
}

/* The sums, <m, g>, |m|^2, |g|^2 and that of the gradient as it came, and what a whole step reports besides. */
enum { DOT, FIRST_SQ, GRAD_SQ, RAW_SQ, COLUMNS, COSINE = COLUMNS, DAMPING, REPORTS };

/* Whether float holds a sum of squares: nothing has overflowed, and what was lost is nothing beside the rest. */
INLINE int is_safe(double square) { return 1e-24 < square && square < 1e36; }

#ifdef __AVX512BF16__
/* The sums, and the products of 32 numbers of bf16 each, which float holds exactly, two a lane. */
INLINE floats plus_products(floats sums, const void *left, const void *right, int64_t i) {
    __m512bh a = (__m512bh)_mm512_loadu_si512((const uint16_t *)left + i),
             b = (__m512bh)_mm512_loadu_si512((const uint16_t *)right + i);
    return (floats)_mm512_dpbf16_ps((__m512)sums, a, b);
}
#endif

INLINE void sums_of_block(const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, double *out) {
    const float sign = t->negated ? -1.0f : 1.0f, decay = t->decay;
    floats dot = {0}, first_sq = {0}, grad_sq = {0}, raw_sq = {0};
#ifdef __AVX512BF16__
    for (; dtype == BFLOAT16 && !coupled && begin < end; begin += 2 * LANES) {
        fetch_ahead(t->first, begin, dtype);
        fetch_ahead(t->grad, begin, dtype);
        dot = plus_products(dot, t->first, t->grad, begin);
        first_sq = plus_products(first_sq, t->first, t->first, begin);
        grad_sq = plus_products(grad_sq, t->grad, t->grad, begin);
    }
#endif
    for (int64_t i = begin, count; i < end; i += count * LANES) {
        floats m[2], raw[2], p[2];
        fetch_ahead(t->first, i, dtype);
        fetch_ahead(t->grad, i, dtype);
        count = load_unordered(t->first, i, dtype, m);
        load_unordered(t->grad, i, dtype, raw);
        if (coupled) load_unordered(t->param, i, dtype, p);
        for (int at = 0; at < count; at++) {
            floats g = raw[at];
            if (coupled) {
                g = decay != 0.0f ? sign * raw[at] + decay * p[at] : sign * raw[at];
                raw_sq += raw[at] * raw[at];
            }
            dot += m[at] * g;
            first_sq += m[at] * m[at];
            grad_sq += g * g;
        }
    }
    out[DOT] = total(dot);
    out[FIRST_SQ] = total(first_sq);
    out[GRAD_SQ] = total(grad_sq);
    out[RAW_SQ] = coupled ? total(raw_sq) : out[GRAD_SQ];
}

/* The same in double, where products of floats are exact and no sum can overflow. */
static __attribute__((noinline)) void exact_sums(const tensor *t, int64_t begin, int64_t end, double *out) {
    const double sign = t->negated ? -1.0 : 1.0;
    for (int column = 0; column < COLUMNS; column++) out[column] = 0.0;
    for (int64_t i = begin; i < end; i++) {
        double m = t->takes_dot ? load(t->first, i, t->dtype) : 0.0, raw = load(t->grad, i, t->dtype), g = sign * raw;
        if (t->decay != 0.0) g += t->decay * load(t->param, i, t->dtype);
        out[DOT] += m * g;
        out[FIRST_SQ] += m * m;
        out[GRAD_SQ] += g * g;
        out[RAW_SQ] += raw * raw;
    }
}

/* The sums over the elements [begin, end), block by block. */
INLINE void sums_of(const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, double *out) {
    for (int column = 0; column < COLUMNS; column++) out[column] = 0.0;
    for (int64_t i = begin; i < end; i += BLOCK) {
        double sums[COLUMNS];
        int is_whole = end - i >= BLOCK;
        if (is_whole) sums_of_block(t, dtype, coupled, i, i + BLOCK, sums);
        if (!is_whole || !is_safe(sums[FIRST_SQ]) || !is_safe(sums[GRAD_SQ]) || !is_safe(sums[RAW_SQ]))
            exact_sums(t, i, is_whole ? i + BLOCK : end, sums);
        for (int column = 0; column < COLUMNS; column++) out[column] += sums[column];
    }
}

INLINE void square_of(const tensor *t, int dtype, int64_t begin, int64_t end, double *out) {
    double sum = 0.0;
    for (int64_t i = begin; i < end; i += BLOCK) {
        double sums[COLUMNS] = {0.0};
        if (end - i >= BLOCK) {
            int64_t at = i;
            floats lanes = {0}, g[2];
#ifdef __AVX512BF16__
            for (; dtype == BFLOAT16 && at < i + BLOCK; at += 2 * LANES)
                lanes = plus_products(lanes, t->grad, t->grad, at);
#endif
            for (int64_t count; at < i + BLOCK; at += count * LANES) {
                count = load_unordered(t->grad, at, dtype, g);
                for (int of = 0; of < count; of++) lanes += g[of] * g[of];
            }
            sums[RAW_SQ] = total(lanes);
        }
        if (!is_safe(sums[RAW_SQ])) exact_sums(t, i, end - i >= BLOCK ? i + BLOCK : end, sums);
        sum += sums[RAW_SQ];
    }
    out[DOT] = out[FIRST_SQ] = 0.0;
    out[GRAD_SQ] = out[RAW_SQ] = sum;
}

#ifdef __AVX512BW__
/* Thirty-two bf16 numbers as two vectors of floats: those at even places and those at odd ones. A word holds one of
 * each, so that taking them apart and putting them together is a shift or a mask; most of the time of an update in bf16
 * went there. */
typedef struct {
    __m512 even, odd;
} pairs;

INLINE pairs load_pairs(const void *base, int64_t i) {
    __m512i words_ = _mm512_loadu_si512((const uint16_t *)base + i);
    return (pairs){_mm512_castsi512_ps(_mm512_slli_epi32(words_, 16)),
                   _mm512_castsi512_ps(_mm512_and_si512(words_, _mm512_set1_epi32((int)0xffff0000)))};
}

#ifdef __AVX512BF16__
INLINE void store_pairs(void *base, int64_t i, pairs values) {
    static const uint16_t in_turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(values.odd, values.even);
    halves = _mm512_permutexvar_epi16(_mm512_loadu_si512(in_turns), halves);
    _mm512_storeu_si512((uint16_t *)base + i, halves);
}
#else
/* To the nearest bf16, or the even one of two, in the upper halves; what the lower ones hold is of no account. A NaN
 * stays one: those that came from bf16, or out of arithmetic, have zeros below, and nothing is carried up. */
INLINE __m512i rounded(__m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(bits, is_odd, bits, _mm512_set1_epi32(1));
}

INLINE void store_pairs(void *base, int64_t i, pairs values) {
    __m512i even = _mm512_srli_epi32(rounded(values.even), 16), odd = rounded(values.odd);
    _mm512_storeu_si512((uint16_t *)base + i, _mm512_mask_mov_epi16(even, 0xaaaaaaaa, odd));
}
#endif

typedef struct {
    __m512 weight, rest, keep, second_decay, second_weight, step_size, eps, clip, decay;
    int is_near_grad, is_negated, decays, clips;
} adam_numbers;

/* The decay is a factor here: what fp32 does not see of it, bf16 does not either. */
INLINE void adam_lanes(const adam_numbers *n, __m512 *p, __m512 *m, __m512 *v, __m512 g) {
    if (n->is_negated) g = _mm512_sub_ps(_mm512_setzero_ps(), g);
    if (n->decays) g = _mm512_fmadd_ps(n->decay, *p, g);
    if (n->clips) g = _mm512_mul_ps(g, n->clip);
    __m512 way = _mm512_sub_ps(g, *m);
    *m = n->is_near_grad ? _mm512_fnmadd_ps(way, n->rest, g) : _mm512_fmadd_ps(way, n->weight, *m);
    *v = _mm512_fmadd_ps(_mm512_mul_ps(g, n->second_weight), g, _mm512_mul_ps(*v, n->second_decay));
    /* The divider works beside the rest: approximations that Newton's steps improve take longer. */
    __m512 direction = _mm512_div_ps(*m, _mm512_add_ps(_mm512_sqrt_ps(*v), n->eps));
    *p = _mm512_fmsub_ps(*p, n->keep, _mm512_mul_ps(direction, n->step_size));
}

/* Returns the first element that is left to do. */
INLINE int64_t adam_of_pairs(
    const tensor *t, int coupled, int64_t begin, int64_t end, const adam_row *row, float clip
) {
    const adam_numbers n = {
        .weight = _mm512_set1_ps(row->first_weight), .rest = _mm512_set1_ps(1.0 - row->first_weight),
        .keep = _mm512_set1_ps(row->decay), .second_decay = _mm512_set1_ps(row->second_decay),
        .second_weight = _mm512_set1_ps(row->second_weight), .step_size = _mm512_set1_ps(row->step_size),
        .eps = _mm512_set1_ps(row->eps), .clip = _mm512_set1_ps(clip),
        .decay = _mm512_set1_ps(t->decay),
        .is_near_grad = row->first_weight >= 0.5, .is_negated = coupled && t->negated,
        .decays = coupled && t->decay != 0.0, .clips = clip != 1.0f,
    };
    int64_t i = begin;
    for (; i + 32 <= end; i += 32) {
        fetch_all_ahead(t, i, BFLOAT16);
        pairs p = load_pairs(t->param, i), m = load_pairs(t->first, i), v = load_pairs(t->second, i),
              g = load_pairs(t->grad, i);
        adam_lanes(&n, &p.even, &m.even, &v.even, g.even);
        adam_lanes(&n, &p.odd, &m.odd, &v.odd, g.odd);
        store_pairs(t->param, i, p);
        store_pairs(t->first, i, m);
        store_pairs(t->second, i, v);
    }
    return i;
}
#endif

typedef struct {
    float weight, rest, shrink, second_decay, second_weight, step_size, eps, clip;
    int is_near_grad; /* a lerp starts from the nearer end */
} adam_floats;

/* update.adam_step. The decay is subtracted with the step: 1 - 1e-8 would be 1 in float. */
INLINE void adam_at(const tensor *t, int dtype, int coupled, int64_t i, const adam_floats *n) {
    float p = load(t->param, i, dtype), m = load(t->first, i, dtype), v = load(t->second, i, dtype),
          g = gradient(t, i, dtype, coupled) * n->clip;
    m = n->is_near_grad ? g - (g - m) * n->rest : m + (g - m) * n->weight;
    v = v * n->second_decay + g * n->second_weight * g;
    p -= p * n->shrink + m / (sqrtf(v) + n->eps) * n->step_size;
    store(t->param, i, dtype, p);
    store(t->first, i, dtype, m);
    store(t->second, i, dtype, v);
}

INLINE void adam_of(
    const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, const adam_row *row, float clip
) {
    const adam_floats n = {
        .weight = row->first_weight, .rest = 1.0 - row->first_weight, .shrink = 1.0 - row->decay,
        .second_decay = row->second_decay, .second_weight = row->second_weight, .step_size = row->step_size,
        .eps = row->eps, .clip = clip, .is_near_grad = row->first_weight >= 0.5,
    };
#ifdef __AVX512BW__
    if (dtype == BFLOAT16) begin = adam_of_pairs(t, coupled, begin, end, row, clip);
#endif
    for (; begin + LANES <= end; begin += LANES) {
        fetch_all_ahead(t, begin, dtype);
        for (int64_t i = begin; i < begin + LANES; i++) adam_at(t, dtype, coupled, i, &n);
    }
    for (; begin < end; begin++) adam_at(t, dtype, coupled, begin, &n);
}

/* update.sgd_step. */
INLINE void sgd_at(const tensor *t, int dtype, int coupled, int64_t i, const sgd_row *row, float clip) {
    const float momentum = row->momentum, gain = row->gain, step_size = row->step_size;
    float m = load(t->first, i, dtype) * momentum + gradient(t, i, dtype, coupled) * clip * gain;
    store(t->param, i, dtype, load(t->param, i, dtype) - m * step_size);
    store(t->first, i, dtype, m);
}

INLINE void sgd_of(
    const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, const sgd_row *row, float clip
) {
    const sgd_row numbers = *row; /* a copy, which no store can be to */
    for (; begin + LANES <= end; begin += LANES) {
        fetch_all_ahead(t, begin, dtype);
        for (int64_t i = begin; i < begin + LANES; i++) sgd_at(t, dtype, coupled, i, &numbers, clip);
    }
    for (; begin < end; begin++) sgd_at(t, dtype, coupled, begin, &numbers, clip);
}

/* One pass over some elements of a tensor: an update by `adam` or `sgd`, or else the sums. */
typedef struct {
    const adam_row *adam;
    const sgd_row *sgd;
    double clip; /* the factor on every gradient */
    double *sums;
} pass;

INLINE void visit_kind(const tensor *t, int dtype, int coupled, int64_t begin, int64_t end, const pass *pass) {
    if (pass->adam) adam_of(t, dtype, coupled, begin, end, pass->adam, pass->clip);
    else if (pass->sgd) sgd_of(t, dtype, coupled, begin, end, pass->sgd, pass->clip);
    else if (t->takes_dot) sums_of(t, dtype, coupled, begin, end, pass->sums);
    else square_of(t, dtype, begin, end, pass->sums);
}

static void visit(const tensor *tensor_, int64_t chunk, const pass *pass) {
    const tensor t = *tensor_; /* a copy, which no store can be to */
    int64_t begin = chunk * CHUNK, end = t.count - begin < CHUNK ? t.count : begin + CHUNK;
    int coupled = t.negated || t.decay != 0.0;
    if (t.dtype == FLOAT32) {
        if (coupled) visit_kind(&t, FLOAT32, 1, begin, end, pass);
        else visit_kind(&t, FLOAT32, 0, begin, end, pass);
    } else {
        if (coupled) visit_kind(&t, BFLOAT16, 1, begin, end, pass);
        else visit_kind(&t, BFLOAT16, 0, begin, end, pass);
    }
}

INLINE int64_t num_chunks(const tensor *t) { return (t->count + CHUNK - 1) / CHUNK; }

/* Calls `work` with `threads` shares, one on the calling thread. The threads live as long as the call, so that a fork
 * finds none; the shares of those that do not start are taken over. */
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
    double lr, gamma, damping_eps, literal, skip_nonfinite; /* of both */
    double is_adaptive, beta1, beta2, eps, weight_decay;    /* of Adam's */
    double momentum;                                        /* of sgd's */
} settings;

typedef struct {
    const tensor *tensors;
    int64_t count, next; /* `next` is the tensor that a thread takes next */
    const settings *settings;
    float *scalars;  /* rows step, exp_avg_scale (Adam's only) and torque, a column a tensor */
    double *reports; /* REPORTS for each tensor */
    int64_t num_shared;
    struct shared *shared;
    double *sums; /* COLUMNS for each chunk of a shared tensor: the next one's sums begin when these are added up */
} step;

typedef union {
    adam_row adam;
    sgd_row sgd;
} coefficients;

/* The formulas of hf_tam.update: the step's numbers for one tensor from its sums. Returns 0 where it is left out. */
static int advance(const step *step, int64_t at, coefficients *out) {
    const settings *s = step->settings;
    double *report = step->reports + REPORTS * at;
    float *t = step->scalars + at, *scale = t + step->count, *torque = t + (s->is_adaptive ? 2 : 1) * step->count;
    double cosine = report[DOT] / (sqrt(report[FIRST_SQ]) * sqrt(report[GRAD_SQ]));
    if (!isfinite(cosine) || (s->is_adaptive && *scale <= 0.0f)) cosine = 0.0;
    cosine = cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine;
    int is_kept = !s->skip_nonfinite || isfinite(report[RAW_SQ]);
    double moved = is_kept ? s->gamma * *torque + (1.0 - s->gamma) * cosine : *torque;
    report[COSINE] = cosine;
    report[DAMPING] = (1.0 + moved) / 2.0;
    if (!is_kept) return 0;
    double gain = s->damping_eps + report[DAMPING];
    *torque = moved;
    *t += 1.0f;
    if (!s->is_adaptive) {
        out->sgd = (sgd_row){s->momentum, s->literal ? gain : 2.0 * gain, s->lr};
        return 1;
    }
    gain *= s->literal ? 1.0 : 2.0 * (1.0 - s->beta1);
    double moment = s->beta1 * *scale + gain, root = 1.0, step_size = s->lr * moment;
    if (!s->literal) {
        root = sqrt(s->beta2 > 0.0 ? -expm1(*t * log(s->beta2)) : 1.0);
        step_size *= root / (s->beta1 > 0.0 ? -expm1(*t * log(s->beta1)) : 1.0);
    }
    *scale = moment;
    out->adam = (adam_row){1.0 - s->lr * s->weight_decay, moment > 0.0 ? gain / moment : 1.0,
                           s->beta2, 1.0 - s->beta2, step_size, s->eps * root};
    return 1;
}

INLINE pass update_by(const step *step, const coefficients *numbers) {
    pass pass = {.clip = 1.0};
    if (step->settings->is_adaptive) pass.adam = &numbers->adam;
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

INLINE int is_shared(const tensor *t) { return t->count * (t->dtype == FLOAT32 ? 4 : 2) > BYTES_TO_SHARE; }

static void finish_sums(const step *step, shared *mine, int64_t chunks) {
    double *report = step->reports + REPORTS * mine->at;
    for (int column = 0; column < COLUMNS; column++) {
        report[column] = 0.0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) report[column] += step->sums[COLUMNS * chunk + column];
    }
    mine->is_kept = advance(step, mine->at, &mine->numbers);
    __atomic_store_n(&mine->is_ready, 1, __ATOMIC_RELEASE);
}

static void take_part(const step *step, shared *mine) {
    const tensor *t = &step->tensors[mine->at];
    const int64_t chunks = num_chunks(t);
    for (int64_t begin; (begin = __atomic_fetch_add(&mine->next_sum, RUN, __ATOMIC_RELAXED)) < chunks;) {
        int64_t end = begin + RUN < chunks ? begin + RUN : chunks;
        for (int64_t chunk = begin; chunk < end; chunk++)
            visit(t, chunk, &(pass){.sums = step->sums + COLUMNS * chunk});
        if (__atomic_add_fetch(&mine->summed, end - begin, __ATOMIC_ACQ_REL) == chunks) finish_sums(step, mine, chunks);
    }
    for (int turns = 0; !__atomic_load_n(&mine->is_ready, __ATOMIC_ACQUIRE); turns++)
        if (turns > PATIENCE) sched_yield();
    if (!mine->is_kept) return;
    const pass update = update_by(step, &mine->numbers);
    /* The last chunks first: they are what the cache still holds. */
    for (int64_t begin; (begin = __atomic_fetch_add(&mine->next_update, RUN, __ATOMIC_RELAXED)) < chunks;)
        for (int64_t chunk = begin; chunk < begin + RUN && chunk < chunks; chunk++)
            visit(t, chunks - 1 - chunk, &update);
}

static void take_whole(const step *step, int64_t at) {
    const tensor *t = &step->tensors[at];
    int64_t chunks = num_chunks(t);
    double *report = step->reports + REPORTS * at, sums[COLUMNS];
    for (int column = 0; column < COLUMNS; column++) report[column] = 0.0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        visit(t, chunk, &(pass){.sums = sums});
        for (int column = 0; column < COLUMNS; column++) report[column] += sums[column];
    }
    coefficients numbers;
    if (!advance(step, at, &numbers)) return;
    const pass update = update_by(step, &numbers);
    while (chunks-- > 0) visit(t, chunks, &update); /* the last first here too */
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
    const tensor *tensors, int64_t count, int64_t threads, const settings *settings, float *scalars, double *reports
) {
    int64_t elements = 0, chunks = 0, num_shared = 0;
    for (int64_t at = 0; at < count; at++) {
        elements += tensors[at].count;
        if (!is_shared(&tensors[at])) continue;
        num_shared++;
        if (num_chunks(&tensors[at]) > chunks) chunks = num_chunks(&tensors[at]);
    }
    step step = {tensors, count, 0, settings, scalars, reports, num_shared, NULL, NULL};
    step.shared = calloc(num_shared + 1, sizeof *step.shared);
    step.sums = malloc((COLUMNS * chunks + 1) * sizeof *step.sums);
    int is_out_of_memory = !step.shared || !step.sums;
    if (!is_out_of_memory) {
        for (int64_t at = 0, i = 0; at < count; at++)
            if (is_shared(&tensors[at])) step.shared[i++].at = at;
        void *shares[MAX_THREADS];
        threads = worthwhile(threads, elements);
        for (int64_t i = 0; i < threads; i++) shares[i] = &step;
        run(take_tensors, shares, sizeof *shares, threads);
    }
    free(step.shared);
    free(step.sums);
    return is_out_of_memory;
}
