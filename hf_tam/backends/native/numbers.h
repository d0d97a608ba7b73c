/* Tensors in memory, and their numbers in registers, one at a time or LANES. */
#pragma once
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

/* Each kind of tensor gets a loop of its own: everything is inlined into `visit`, with constants for the kind. */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16 };
enum {
    LANES = 16,  /* numbers side by side */
    AHEAD = 2048 /* bytes to fetch ahead: what the CPU does by itself ends with a page of 4,096 */
};

/* One row of the table that Python fills. */
typedef struct {
    int64_t count;     /* elements */
    int64_t dtype;     /* FLOAT32 or BFLOAT16, of all four */
    int64_t takes_dot; /* 0: only the norm of the gradient is wanted */
    int64_t negated;   /* 1: the sign of the gradient is turned */
    void *param, *grad, *first, *second;
    double decay;  /* coupled: this many times the parameter belong to the gradient */
    int64_t group; /* whose hyperparameters are its own */
} tensor;

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
    /* A NaN is put back by hand: where all of its bits are set, the carry would make a zero of it. */
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
