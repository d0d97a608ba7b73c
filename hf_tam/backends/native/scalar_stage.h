/* hf_tam.update.scalar_stage in C, for one tensor: from its sums to its torque, and to the numbers of its update. */
#pragma once
#include <math.h>

#include "sums.h"
#include "updates.h"

/* The hyperparameters of a param group: the fields of update.Numbers in their order, which library.py says. */
typedef struct {
    double NUMBERS;
} numbers;

typedef union {
    adam_row adam;
    sgd_row sgd;
} coefficients;

/* 1 - beta^t. */
INLINE double one_minus_power(double log_beta, double t) { return -expm1(t * log_beta); }

/* `states` are step, exp_avg_scale (Adam's only) and torque of this tensor, `stride` floats apart. `report` has the
 * sums and is given the cosine and the damping. Where the tensor is not kept nothing else is written. */
static void scalar_stage(
    const numbers *n, int is_adaptive, int is_kept, float *states, int64_t stride, double *report, coefficients *out
) {
    float *step = states, *scale = states + stride, *torque = states + (is_adaptive ? 2 : 1) * stride;
    double cosine = report[DOT] / (sqrt(report[FIRST_SQ]) * sqrt(report[GRAD_SQ]));
    /* A moment whose scale is 0 is no moment, whatever is stored. */
    if (!isfinite(cosine) || (is_adaptive && !(*scale > 0.0f))) cosine = 0.0;
    cosine = cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine;
    int is_active = *step < n->torque_steps;
    double turned = is_kept && is_active ? n->gamma * *torque + (1.0 - n->gamma) * cosine : *torque;
    double damping = (1.0 + turned) / 2.0;
    report[COSINE] = cosine;
    report[DAMPING] = is_active || !is_kept ? damping : n->neutral;
    if (!is_kept) return;
    double gain = n->unit * (is_active ? n->damping_eps + damping : n->neutral), t = *step + 1.0f;
    *torque = turned;
    *step = t;
    if (!is_adaptive) {
        out->sgd = (sgd_row){n->beta1, gain, n->lr};
        return;
    }
    double moment = n->beta1 * *scale + gain, root = sqrt(one_minus_power(n->log_beta2, t));
    *scale = moment;
    out->adam = (adam_row){
        .decay = 1.0 - n->lr * n->weight_decay,
        .first_weight = moment > 0.0 ? gain / moment : 1.0,
        .second_decay = n->beta2,
        .second_weight = n->second_weight,
        .step_size = n->lr * moment * (root / one_minus_power(n->log_beta1, t)),
        .eps = n->eps * root,
    };
}
