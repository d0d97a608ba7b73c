/* The sums that an angle is made of, over a stretch of one tensor. */
#pragma once
#include "numbers.h"

enum { BLOCK = 512 }; /* elements summed in float, BLOCK / LANES terms a lane, before the sum becomes double */

/* The sums, <m, g>, |m|^2, |g|^2 and that of the gradient as it came, and what a whole step reports besides. */
enum { DOT, FIRST_SQ, GRAD_SQ, RAW_SQ, COLUMNS, COSINE = COLUMNS, DAMPING, REPORTS };

/* Whether float holds a sum of squares: nothing has overflowed, and what was lost is nothing beside the rest. False for
 * NaN as well: a comparison that is turned round would let it pass. */
INLINE int is_safe(double square) { return 1e-24 < square && square < 1e36; }

#ifdef __AVX512BF16__
/* The sums, and the products of 32 numbers of bf16 each, which float holds exactly, two a lane. */
INLINE floats plus_products(floats sums, const void *left, const void *right, int64_t i) {
    __m512bh a = (__m512bh)_mm512_loadu_si512((const uint16_t *)left + i),
             b = (__m512bh)_mm512_loadu_si512((const uint16_t *)right + i);
    return (floats)_mm512_dpbf16_ps((__m512)sums, a, b);
}
#endif

/* LANES numbers each of moment, gradient and weight from place i on, or twice as many; returns how many vectors that are.
 * Beside moments of fp32 they are in the order that fp32 tensors have, so that the sums are theirs to the bit. */
INLINE int load_all(const tensor *t, int kind, int coupled, int64_t i, floats *m, floats *g, floats *p) {
    if (is_wide(kind) || (coupled && is_split(kind))) {
        m[0] = load_lanes(t->first, i, moments_of(kind));
        g[0] = load_lanes(t->grad, i, BFLOAT16);
        if (coupled) p[0] = load_weights(t, i, kind);
        return 1;
    }
    if (coupled) load_unordered(t->param, i, dtype_of(kind), p);
    load_unordered(t->grad, i, dtype_of(kind), g);
    return load_unordered(t->first, i, dtype_of(kind), m);
}

INLINE void sums_of_block(const tensor *t, int kind, int coupled, int64_t begin, int64_t end, double *out) {
    const float sign = t->negated ? -1.0f : 1.0f, decay = t->decay;
    floats dot = {0}, first_sq = {0}, grad_sq = {0}, raw_sq = {0};
#ifdef __AVX512BF16__
    for (; (kind == BFLOAT16 || kind == SPLIT) && !coupled && begin < end; begin += 2 * LANES) {
        fetch_ahead(t->first, begin, BFLOAT16);
        fetch_ahead(t->grad, begin, BFLOAT16);
        dot = plus_products(dot, t->first, t->grad, begin);
        first_sq = plus_products(first_sq, t->first, t->first, begin);
        grad_sq = plus_products(grad_sq, t->grad, t->grad, begin);
    }
#endif
    for (int64_t i = begin, count; i < end; i += count * LANES) {
        floats m[2], raw[2], p[2];
        fetch_ahead(t->first, i, moments_of(kind));
        fetch_ahead(t->grad, i, dtype_of(kind));
        if (coupled) fetch_ahead(t->param, i, dtype_of(kind));
        count = load_all(t, kind, coupled, i, m, raw, p);
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
        double m = t->takes_dot ? load(t->first, i, moments_of(t->kind)) : 0.0,
               raw = load(t->grad, i, dtype_of(t->kind)), g = sign * raw;
        if (t->decay != 0.0) g += t->decay * load_weight(t, i, t->kind);
        out[DOT] += m * g;
        out[FIRST_SQ] += m * m;
        out[GRAD_SQ] += g * g;
        out[RAW_SQ] += raw * raw;
    }
}

/* The sums over the elements [begin, end), block by block. */
INLINE void sums_of(const tensor *t, int kind, int coupled, int64_t begin, int64_t end, double *out) {
    for (int column = 0; column < COLUMNS; column++) out[column] = 0.0;
    for (int64_t i = begin; i < end; i += BLOCK) {
        double sums[COLUMNS];
        int is_whole = end - i >= BLOCK;
        if (is_whole) sums_of_block(t, kind, coupled, i, i + BLOCK, sums);
        if (!is_whole || !is_safe(sums[FIRST_SQ]) || !is_safe(sums[GRAD_SQ]) || !is_safe(sums[RAW_SQ]))
            exact_sums(t, i, is_whole ? i + BLOCK : end, sums);
        for (int column = 0; column < COLUMNS; column++) out[column] += sums[column];
    }
}

INLINE void square_of(const tensor *t, int kind, int64_t begin, int64_t end, double *out) {
    const int dtype = dtype_of(kind);
    double sum = 0.0;
    for (int64_t i = begin; i < end; i += BLOCK) {
        double sums[COLUMNS] = {0.0};
        if (end - i >= BLOCK) {
            int64_t at = i;
            floats lanes = {0}, g[2];
#ifdef __AVX512BF16__
            for (; dtype == BFLOAT16 && !is_wide(kind) && at < i + BLOCK; at += 2 * LANES) {
                fetch_ahead(t->grad, at, dtype);
                lanes = plus_products(lanes, t->grad, t->grad, at);
            }
#endif
            for (int64_t count; at < i + BLOCK; at += count * LANES) {
                fetch_ahead(t->grad, at, dtype);
                if (is_wide(kind)) g[0] = load_lanes(t->grad, at, dtype), count = 1;
                else count = load_unordered(t->grad, at, dtype, g);
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
