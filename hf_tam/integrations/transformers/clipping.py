"""Leaves the clipping of a Trainer to an optimizer of ours that clips inside its step.

What is relied on: a Trainer clips by `_clip_grad_norm` and measures by `_get_grad_norm` before optimizer.step(), and
reads the number that they return only when it logs, after the step (transformers 5.3 to 5.23). 5.2 has no such methods
and calls `clip_grad_norm_` of its accelerator.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from hf_tam.integrations.wrapped import find_ours

if TYPE_CHECKING:
    from torch import Tensor

    from hf_tam.torque_aware import TorqueAware

logger = logging.getLogger("hf_tam")


def clipping_inside(trainer: Any) -> TorqueAware | None:
    """The optimizer of a Trainer, if its step makes the clipping of the Trainer superfluous; else None.

    Clipping to one norm, then to a smaller one, is clipping to the smaller one. A larger one does not replace the
    Trainer's.
    """
    optimizer = find_ours(trainer.optimizer)
    if optimizer is None:
        return None
    limits = {group["max_grad_norm"] for group in optimizer.param_groups}
    if len(limits) > 1 or None in limits:  # groups that differ: step() says so
        return None
    wanted = trainer.args.max_grad_norm
    return optimizer if wanted is None or wanted <= 0.0 or limits.pop() <= wanted else None


def take_over_clipping(trainer_class: type) -> list[str]:
    """Patch the methods by which a Trainer clips and measures its gradients.

    The originals run whenever `clipping_inside` finds nothing. Otherwise nothing is computed or communicated: the norm
    comes with the angles of the step.

    Returns:
        What was patched; nothing where a method is missing, see `prepare_clipping`.
    """
    if not _has_methods(trainer_class):
        return []
    # Both: with max_grad_norm=0 the Trainer does not clip, and still takes a norm of all gradients, in
    # `_get_grad_norm`.
    clip, measure = trainer_class._clip_grad_norm, trainer_class._get_grad_norm  # type: ignore[attr-defined]

    @functools.wraps(clip)
    def clip_grad_norm(self: Any, model: Any) -> Any:
        optimizer = clipping_inside(self)
        return clip(self, model) if optimizer is None else optimizer.promise_grad_norm()

    @functools.wraps(measure)
    def get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        optimizer = clipping_inside(self)
        if optimizer is None:
            return measure(self, model, grad_norm=grad_norm)
        return optimizer.promise_grad_norm() if grad_norm is None else grad_norm

    trainer_class._clip_grad_norm = clip_grad_norm  # type: ignore[attr-defined]
    trainer_class._get_grad_norm = get_grad_norm  # type: ignore[attr-defined]
    return [f"{trainer_class.__name__}.{name}" for name in _METHODS]


def prepare_clipping(trainer: Any, *, wanted: bool) -> None:
    """Before training: say who clips under DeepSpeed, and take clipping over where the Trainer has no method for it.

    Args:
        trainer: The Trainer.
        wanted: Whether its `optim_args` have fused_clip=true.
    """
    if wanted and trainer.is_deepspeed_enabled:
        logger.info("fused_clip=true: DeepSpeed's engine clips (max_grad_norm), so that the optimizer does not.")
    if not _has_methods(type(trainer)) and "clip_grad_norm_" not in vars(trainer.accelerator):
        clip = trainer.accelerator.clip_grad_norm_

        @functools.wraps(clip)
        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor | None:
            optimizer = clipping_inside(trainer)
            return clip(parameters, max_norm, norm_type) if optimizer is None else optimizer.promise_grad_norm()

        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_


_METHODS = ("_clip_grad_norm", "_get_grad_norm")


def _has_methods(trainer_class: type) -> bool:
    return all(hasattr(trainer_class, name) for name in _METHODS)
