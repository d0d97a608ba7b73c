"""What DPOTrainer ends in a traceback by, or learns nothing from, and can be known before a model is loaded."""

import math
from typing import Any

from recipes.support.arguments import LmModelArguments
from recipes.support.errors import RecipeError

# Of TRL 1.16, which looks at them at the first step.
LOSS_TYPES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot")
LOSS_TYPES += ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Those of a difference of rewards, in which what a divergence adds cancels.
OF_A_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SORTED = ("aot", "aot_unpaired")


def check(of_model: LmModelArguments, arguments: Any) -> None:
    """Check the loss, and the reference.

    Raises:
        RecipeError: the first that is wrong, with its value and what to do.
    """
    _check_loss(arguments)
    if arguments.sync_ref_model:
        _check_moving_reference(of_model, arguments)


def _check_loss(arguments: Any) -> None:
    losses, smoothing = arguments.loss_type, arguments.label_smoothing
    for loss in losses:
        if loss not in LOSS_TYPES:
            raise RecipeError(f"loss_type = {loss}: there are {', '.join(LOSS_TYPES)}.")
    divergence = arguments.f_divergence_type
    if divergence not in DIVERGENCES:
        raise RecipeError(f"f_divergence_type = {divergence}: there are {', '.join(DIVERGENCES)}.")
    alone = [loss for loss in losses if loss not in OF_A_DIFFERENCE]
    if divergence != "reverse_kl" and alone:
        raise RecipeError(
            f"f_divergence_type = {divergence}: not with loss_type {alone[0]}: take reverse_kl, or one of"
            f" {', '.join(OF_A_DIFFERENCE)}."
        )
    if set(losses) != {"sft"} and not 0.0 < arguments.beta < math.inf:
        raise RecipeError(f"beta = {arguments.beta}: must be above 0, or no preference is learned: give 0.1.")
    if "exo_pair" in losses and not 0.0 < smoothing < 1.0:
        raise RecipeError(f"label_smoothing = {smoothing}: exo_pair takes one above 0 and below 1: give 1e-3.")
    if "robust" in losses and not 0.0 <= smoothing < 0.5:
        raise RecipeError(f"label_smoothing = {smoothing}: robust takes one from 0 to below 0.5: give 0.1.")
    if "discopop" in losses and not 0.0 < arguments.discopop_tau < math.inf:
        raise RecipeError(f"discopop_tau = {arguments.discopop_tau}: must be above 0: give 0.05.")
    if arguments.ld_alpha is not None and not 0.0 <= arguments.ld_alpha <= 1.0:
        raise RecipeError(f"ld_alpha = {arguments.ld_alpha}: must be from 0 to 1.")
    if arguments.use_weighting and (chosen := [loss for loss in losses if loss in _SORTED]):
        raise RecipeError(f"use_weighting: {chosen[0]} sorts the pairs, which then lose their weights: drop one.")


def _check_moving_reference(of_model: LmModelArguments, arguments: Any) -> None:
    if of_model.has_adapter:
        raise RecipeError(
            "sync_ref_model: an adapter's reference is the model below it, which cannot move: train every weight"
            " (without use_peft), or drop sync_ref_model."
        )
    if arguments.precompute_ref_log_probs:
        raise RecipeError(
            "sync_ref_model and precompute_ref_log_probs exclude each other: what was computed before is of a"
            " reference that moves: drop one."
        )
    if arguments.ref_model_sync_steps < 1:
        raise RecipeError(f"ref_model_sync_steps = {arguments.ref_model_sync_steps}: must be at least 1.")
    if not 0.0 < arguments.ref_model_mixup_alpha <= 1.0:
        raise RecipeError(
            f"ref_model_mixup_alpha = {arguments.ref_model_mixup_alpha}: must be above 0, and at most 1."
        )
