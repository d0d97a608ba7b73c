"""How steady the gradients of a run were, from the norms that the Trainer has logged."""

from collections.abc import Sequence
from statistics import median
from typing import Any

WINDOW = 20
"""Norms before a step that its own is compared with."""
FACTOR = 3.0
"""A spike is a norm of more than so many times their median, or one that is not finite."""


def grad_norm_metrics(log_history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return `grad_norm_max` and `grad_norm_spikes`, of the logged steps; nothing where too few were logged.

    Args:
        log_history: The Trainer's; with --logging_steps 1 it has every step.
    """
    norms = [float(row["grad_norm"]) for row in log_history if "grad_norm" in row]
    if len(norms) <= WINDOW:
        return {}
    before = [median(norms[step - WINDOW : step]) for step in range(WINDOW, len(norms))]
    # `not <=`, so that a NaN is one too
    spikes = sum(not norm <= FACTOR * usual for norm, usual in zip(norms[WINDOW:], before, strict=True))
    return {"grad_norm_max": max(norms), "grad_norm_spikes": float(spikes)}
