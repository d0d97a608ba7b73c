/* Tensors in memory, and their numbers in registers, one at a time or LANES. */
#pragma once
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Each kind of tensor gets a loop of its own: everything is inlined into `visit`, with constants for the kind. */
#define INLINE static inline __attribute__((always_inline))

/* What a tensor is kept in. The gradient has the parameter's dtype, the moments too unless they are WIDE: fp32 beside
 * bf16. Of SPLIT parameters a correction of 16 bits holds what bf16 leaves out, see hf_tam/precision.py. */
enum { FLOAT32, BFLOAT16, SPLIT, WIDE, SPLIT_WIDE };
enum {
    LANES = 16,  /* numbers side by side */
    AHEAD = 2048 /* bytes to fetch ahead: what the CPU does by itself ends with a page of 4,096 */
};

/* One row of the table that Python fills. */
typedef struct {
    int64_t count;     /* elements */
    int64_t kind;      /* FLOAT32, BFLOAT16, ... */
    int64_t takes_dot; /* 0: only the norm of the gradient is wanted */
    int64_t negated;   /* 1: the sign of the gradient is turned */
    void *param, *grad, *first, *second, *correction;
    double decay;  /* coupled: this many times the parameter belong to the gradient */
    int64_t group; /* whose hyperparameters are its own */
} tensor;

INLINE int is_wide(int kind) { return kind == WIDE || kind == SPLIT_WIDE; }
INLINE int is_split(int kind) { return kind == SPLIT || kind == SPLIT_WIDE; }
INLINE int dtype_of(int kind) { return kind == FLOAT32 ? FLOAT32 : BFLOAT16; }
INLINE int moments_of(int kind) { return is_wide(kind) ? FLOAT32 : dtype_of(kind); }

/* Ask for what is AHEAD of place i, once a line of 64 bytes. */
INLINE void fetch_ahead(const void *base, int64_t i, int dtype) {
    int64_t byte = i * (dtype == FLOAT32 ? 4 : 2);
    if (byte % 64 == 0) __builtin_prefetch((const char *)base + byte + AHEAD);
}

INLINE void fetch_all_ahead(const tensor *t, int64_t i, int kind) {
    fetch_ahead(t->param, i, dtype_of(kind));
    fetch_ahead(t->grad, i, dtype_of(kind));
    fetch_ahead(t->first, i, moments_of(kind));
    if (t->second) fetch_ahead(t->second, i, moments_of(kind));
    if (is_split(kind)) fetch_ahead(t->correction, i, BFLOAT16);
}

INLINE float load(const void *base, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)base)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* precision.joined. */
INLINE float joined(uint32_t param, int32_t correction) {
    uint32_t bits = (param << 16) + (uint32_t)correction;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float load_weight(const tensor *t, int64_t i, int kind) {
    if (!is_split(kind)) return load(t->param, i, dtype_of(kind));
    return joined(((const uint16_t *)t->param)[i], ((const int16_t *)t->correction)[i]);
}

/* LANES floats. Spelt out, since compilers miss it that a loop with sums is one of these. */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int16_t short_integers __attribute__((vector_size(2 * LANES)));

INLINE words bits_of(floats values) {
    words bits;
    memcpy(&bits, &values, sizeof bits);
    return bits;
}

INLINE floats of_bits(words bits) {
    floats values;
    memcpy(&values, &bits, sizeof values);
    return values;
}

/* Where the mask is set the one, elsewhere the other. */
INLINE floats choose(integers mask, floats one, floats other) {
    words set = (words)mask;
    return of_bits((bits_of(one) & set) | (bits_of(other) & ~set));
}

INLINE floats roots(floats values) {
    float each[LANES];
    memcpy(each, &values, sizeof each);
    for (int lane = 0; lane < LANES; lane++) each[lane] = sqrtf(each[lane]);
    memcpy(&values, each, sizeof each);
    return values;
}

/* LANES numbers from place i on. */
INLINE floats load_lanes(const void *base, int64_t i, int dtype) {
    floats values;
    halves narrow;
    if (dtype == FLOAT32) {
        memcpy(&values, (const float *)base + i, sizeof values);
        return values;
    }
    memcpy(&narrow, (const uint16_t *)base + i, sizeof narrow);
    return of_bits(__builtin_convertvector(narrow, words) << 16);
}

INLINE void store_halves(void *base, int64_t i, words values) {
    halves narrow = __builtin_convertvector(values, halves);
    memcpy((uint16_t *)base + i, &narrow, sizeof narrow);
}

INLINE void store_lanes(void *base, int64_t i, int dtype, floats values) {
    if (dtype == FLOAT32) {
        memcpy((float *)base + i, &values, sizeof values);
        return;
    }
    words bits = bits_of(values), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, is_nan = (words)(values != values);
    /* A NaN is put back by hand: where all of its bits are set, the carry would make a zero of it. */
    store_halves(base, i, (rounded & ~is_nan) | (is_nan & 0x7fc0));
}

INLINE floats load_weights(const tensor *t, int64_t i, int kind) {
    if (!is_split(kind)) return load_lanes(t->param, i, dtype_of(kind));
    short_integers narrow;
    memcpy(&narrow, (const int16_t *)t->correction + i, sizeof narrow);
    return of_bits(bits_of(load_lanes(t->param, i, BFLOAT16)) + (words)__builtin_convertvector(narrow, integers));
}

/* precision.split. */
INLINE void store_weights(const tensor *t, int64_t i, int kind, floats values) {
    if (!is_split(kind)) {
        store_lanes(t->param, i, dtype_of(kind), values);
        return;
    }
    words bits = bits_of(values), is_nan = (words)(values != values);
    store_halves(t->param, i, (((bits + 0x8000) >> 16) & ~is_nan) | (is_nan & 0x7fc0));
    store_halves(t->correction, i, bits & ~is_nan);
}

/* The gradients that the angle and the moments see; `weights` are those beside them. */
INLINE floats gradients(const tensor *t, int64_t i, int kind, int coupled, floats weights) {
    floats g = load_lanes(t->grad, i, dtype_of(kind));
    if (!coupled) return g;
    if (t->negated) g = -g;
    return t->decay != 0.0 ? g + (float)t->decay * weights : g; /* 0 * NaN would be NaN */
}

enum { ROOM = 5 * 4 * LANES };

/* The tensor's end, less than LANES, in memory that holds as many: what is beyond is 0. */
INLINE tensor with_room(const tensor *t, int kind, int64_t begin, int64_t end, char *room) {
    tensor rest = *t;
    const int64_t bytes = dtype_of(kind) == FLOAT32 ? 4 : 2, moment_bytes = moments_of(kind) == FLOAT32 ? 4 : 2;
    memset(room, 0, ROOM);
    rest.param = room;
    rest.grad = room + 4 * LANES;
    rest.first = room + 8 * LANES;
    rest.second = room + 12 * LANES;
    rest.correction = room + 16 * LANES;
    memcpy(rest.param, (char *)t->param + bytes * begin, bytes * (end - begin));
    memcpy(rest.grad, (char *)t->grad + bytes * begin, bytes * (end - begin));
    memcpy(rest.first, (char *)t->first + moment_bytes * begin, moment_bytes * (end - begin));
    if (t->second) memcpy(rest.second, (char *)t->second + moment_bytes * begin, moment_bytes * (end - begin));
    if (is_split(kind)) memcpy(rest.correction, (char *)t->correction + 2 * begin, 2 * (end - begin));
    return rest;
}

INLINE void take_back(const tensor *t, int kind, int64_t begin, int64_t end, const tensor *rest) {
    const int64_t bytes = dtype_of(kind) == FLOAT32 ? 4 : 2, moment_bytes = moments_of(kind) == FLOAT32 ? 4 : 2;
    memcpy((char *)t->param + bytes * begin, rest->param, bytes * (end - begin));
    memcpy((char *)t->first + moment_bytes * begin, rest->first, moment_bytes * (end - begin));
    if (t->second) memcpy((char *)t->second + moment_bytes * begin, rest->second, moment_bytes * (end - begin));
    if (is_split(kind)) memcpy((char *)t->correction + 2 * begin, rest->correction, 2 * (end - begin));
}

/* The numbers from place i on, LANES of fp32 or twice as many of bf16, in no order: a word of memory holds two of
 * bf16, which a shift and a mask take apart. Returns how many vectors that are. */
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
