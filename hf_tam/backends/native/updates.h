/* The update of a stretch of one tensor. */
#pragma once
#include <float.h>
#include <math.h>

#include "numbers.h"

/* The numbers of one step of one tensor, as in update.AdamCoefficients and update.SgdCoefficients. */
typedef struct {
    double decay, first_weight, second_decay, second_weight, step_size, eps;
} adam_row;

typedef struct {
    double momentum, gain, step_size;
} sgd_row;

#ifdef __AVX512BW__
/* Thirty-two bf16 numbers as two vectors of floats: those at even places and those at odd ones. A word holds one of
 * each, so that taking them apart and putting them together is a shift or a mask; most of the time of an update in
 * bf16 went there. */
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

/* Both halves of precision.joined and precision.split: of a word, 16 bits each belong to an even and an odd place. */
INLINE pairs load_weight_pairs(const tensor *t, int64_t i, int kind) {
    pairs param = load_pairs(t->param, i);
    if (!is_split(kind)) return param;
    __m512i more = _mm512_loadu_si512((const uint16_t *)t->correction + i);
    __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(more, 16), 16), odd = _mm512_srai_epi32(more, 16);
    return (pairs){_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(param.even), even)),
                   _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(param.odd), odd))};
}

INLINE __m512i one_nan(__m512 values) {
    __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_castps_si512(values), is_nan, _mm512_set1_epi32(0x7fc00000));
}

INLINE void store_weight_pairs(const tensor *t, int64_t i, int kind, pairs values) {
    if (!is_split(kind)) {
        store_pairs(t->param, i, values);
        return;
    }
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i even = one_nan(values.even), odd = one_nan(values.odd);
    __m512i high = _mm512_srli_epi32(_mm512_add_epi32(even, half), 16);
    _mm512_storeu_si512((uint16_t *)t->param + i,
                        _mm512_mask_mov_epi16(high, 0xaaaaaaaa, _mm512_add_epi32(odd, half)));
    _mm512_storeu_si512((uint16_t *)t->correction + i,
                        _mm512_mask_mov_epi16(even, 0xaaaaaaaa, _mm512_slli_epi32(odd, 16)));
}

typedef struct {
    __m512 weight, rest, keep, shrink, second_decay, second_weight, step_size, eps, clip, decay;
    int is_near_grad, is_negated, decays, clips;
} adam_numbers;

/* The decay is a factor where the weights are bf16: what fp32 does not see of it, bf16 does not either. */
INLINE void adam_lanes(const adam_numbers *n, int kind, __m512 *p, __m512 *m, __m512 *v, __m512 g) {
    if (n->is_negated) g = _mm512_sub_ps(_mm512_setzero_ps(), g);
    if (n->decays) g = _mm512_fmadd_ps(n->decay, *p, g);
    if (n->clips) g = _mm512_mul_ps(g, n->clip);
    __m512 way = _mm512_sub_ps(g, *m);
    *m = n->is_near_grad ? _mm512_fnmadd_ps(way, n->rest, g) : _mm512_fmadd_ps(way, n->weight, *m);
    *v = _mm512_fmadd_ps(_mm512_mul_ps(g, n->second_weight), g, _mm512_mul_ps(*v, n->second_decay));
    /* As torch's does. The divider works beside the rest: on Zen 5 approximations that are improved take longer. */
    __m512 direction = _mm512_div_ps(*m, _mm512_add_ps(_mm512_sqrt_ps(*v), n->eps));
    __m512 way_on = _mm512_mul_ps(direction, n->step_size);
    if (!is_split(kind)) {
        *p = _mm512_fmsub_ps(*p, n->keep, way_on);
        return;
    }
    const __m512 most = _mm512_set1_ps(FLT_MAX), least = _mm512_set1_ps(-FLT_MAX);
    __m512 finite = _mm512_min_ps(most, _mm512_max_ps(least, *p)); /* of a NaN comes one whatever this is */
    *p = _mm512_sub_ps(*p, _mm512_fmadd_ps(finite, n->shrink, way_on));
}

/* Returns the first element that is left to do. */
INLINE int64_t adam_of_pairs(
    const tensor *t, int kind, int coupled, int64_t begin, int64_t end, const adam_row *row, float clip
) {
    const adam_numbers n = {
        .shrink = _mm512_set1_ps(1.0 - row->decay),
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
        fetch_all_ahead(t, i, kind);
        pairs p = load_weight_pairs(t, i, kind), m = load_pairs(t->first, i), v = load_pairs(t->second, i),
              g = load_pairs(t->grad, i);
        adam_lanes(&n, kind, &p.even, &m.even, &v.even, g.even);
        adam_lanes(&n, kind, &p.odd, &m.odd, &v.odd, g.odd);
        store_weight_pairs(t, i, kind, p);
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
INLINE void adam_at(const tensor *t, int kind, int coupled, int64_t i, const adam_floats *n) {
    floats p = load_weights(t, i, kind), m = load_lanes(t->first, i, moments_of(kind)),
           v = load_lanes(t->second, i, moments_of(kind)), g = gradients(t, i, kind, coupled, p) * n->clip,
           way = g - m;
    m = n->is_near_grad ? g - way * n->rest : m + way * n->weight;
    v = v * n->second_decay + g * n->second_weight * g;
    /* An infinite parameter (a mask) stays what it is: Inf * 0 and Inf - Inf would be NaN. */
    const floats most = {0};
    floats finite = choose(p > most + FLT_MAX, most + FLT_MAX, p);
    finite = choose(finite < most - FLT_MAX, most - FLT_MAX, finite);
    p -= finite * n->shrink + m / (roots(v) + n->eps) * n->step_size;
    store_weights(t, i, kind, p);
    store_lanes(t->first, i, moments_of(kind), m);
    store_lanes(t->second, i, moments_of(kind), v);
}

INLINE void adam_of(
    const tensor *t, int kind, int coupled, int64_t begin, int64_t end, const adam_row *row, float clip
) {
    const adam_floats n = {
        .weight = row->first_weight, .rest = 1.0 - row->first_weight, .shrink = 1.0 - row->decay,
        .second_decay = row->second_decay, .second_weight = row->second_weight, .step_size = row->step_size,
        .eps = row->eps, .clip = clip, .is_near_grad = row->first_weight >= 0.5,
    };
#ifdef __AVX512BW__
    if (kind == BFLOAT16 || kind == SPLIT) begin = adam_of_pairs(t, kind, coupled, begin, end, row, clip);
#endif
    for (; begin + LANES <= end; begin += LANES) {
        fetch_all_ahead(t, begin, kind);
        adam_at(t, kind, coupled, begin, &n);
    }
    if (begin == end) return;
    char room[ROOM];
    tensor rest = with_room(t, kind, begin, end, room);
    adam_at(&rest, kind, coupled, 0, &n);
    take_back(t, kind, begin, end, &rest);
}

/* update.sgd_step. */
INLINE void sgd_at(const tensor *t, int kind, int coupled, int64_t i, const sgd_row *row, float clip) {
    const float momentum = row->momentum, gain = row->gain, step_size = row->step_size;
    floats p = load_weights(t, i, kind);
    floats m = load_lanes(t->first, i, moments_of(kind)) * momentum + gradients(t, i, kind, coupled, p) * clip * gain;
    store_weights(t, i, kind, p - m * step_size);
    store_lanes(t->first, i, moments_of(kind), m);
}

INLINE void sgd_of(
    const tensor *t, int kind, int coupled, int64_t begin, int64_t end, const sgd_row *row, float clip
) {
    const sgd_row numbers = *row; /* a copy, which no store can be to */
    for (; begin + LANES <= end; begin += LANES) {
        fetch_all_ahead(t, begin, kind);
        sgd_at(t, kind, coupled, begin, &numbers, clip);
    }
    if (begin == end) return;
    char room[ROOM];
    tensor rest = with_room(t, kind, begin, end, room);
    sgd_at(&rest, kind, coupled, 0, &numbers, clip);
    take_back(t, kind, begin, end, &rest);
}
