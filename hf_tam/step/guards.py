"""What may keep a step, or a part of it, from being taken, or make it smaller: NaN and Inf, a norm, a loss scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.hyperparameters import plain
from hf_tam.step.batch import Batch
from hf_tam.step.telemetry import Telemetry

__all__ = ["Scaling", "common_limit", "leave_out_nonfinite", "refuse_nonfinite", "require_one_device"]


def require_one_device(batches: Iterable[Batch]) -> None:
    """One angle is made on one device.

    Raises:
        RuntimeError: The tensors of scope "model" lie on several.
    """
    shared = {batch.options.device for batch in batches if batch.options.scope == "model"}
    if len(shared) > 1:
        names = ", ".join(sorted(map(str, shared)))
        raise RuntimeError(
            f"scope='model' takes one angle over all parameters, which lie on several devices here ({names}); "
            "use scope='tensor', or put the model on one device"
        )


def common_limit(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The `max_grad_norm` of all param groups, None where nothing is clipped.

    Raises:
        ValueError: They have different ones.
    """
    limits = {plain(group["max_grad_norm"]) for group in groups}
    if len(limits) > 1:
        raise ValueError(
            f"the param groups have different values of max_grad_norm ({limits}): what is clipped is the norm of "
            "all gradients together, so give them all the same"
        )
    limit: float | None = next(iter(limits), None)
    return limit


@dataclass(slots=True)
class Scaling:
    """What the gradients are multiplied by, and what may call the step off; a step without it has none.

    Attributes:
        limit: The norm to which they are clipped, if they are.
        found_inf: Not 0 where the step must not be taken, shape () or (1,), or None: torch.amp.GradScaler's, which
            says it to an optimizer that steps by itself (`_step_supports_amp_scaling`).
        grad_scale: What they are to be divided by, shape () or (1,), or None; GradScaler's.
    """

    limit: float | None
    found_inf: Tensor | None
    grad_scale: Tensor | None

    def refuse_repeats(self, *, is_coupled: bool) -> None:
        """A parameter that stands in a group more than once is stepped as often, each time by the same gradient.

        Raises:
            ValueError: That gradient would be clipped or unscaled as often.
        """
        if self.limit is None and not (self.grad_scale is not None and is_coupled):
            return
        what = "the loss scale of GradScaler" if self.limit is None else "max_grad_norm"
        raise ValueError(
            f"a parameter stands in a param group more than once, and is stepped as often; {what} would be applied to "
            "its gradient as often, too. Nothing was changed; hand each parameter over once (dict.fromkeys(params))"
        )

    def apply(self, batches: Sequence[Batch]) -> None:
        """Give every batch the factor on its gradients: 1 / loss scale, then that of clipping."""
        if self.grad_scale is not None:
            inverse = self.grad_scale.reshape(()).to(torch.float32).reciprocal()
            for batch in batches:
                batch.unscale_grads(inverse)
        if self.limit is None or not batches:
            return
        device = batches[0].options.device
        squares = torch.stack([_clipped_square(batch).to(device) for batch in batches])
        # The 1e-6 is that of torch.nn.utils.clip_grad_norm_ (torch/nn/utils/clip_grad.py), whose factor this must be.
        factor = (self.limit / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
        for batch in batches:
            batch.clip_grads(factor.to(batch.options.device))

    def calls_off(self, batches: Sequence[Batch], *, is_sharded: bool) -> bool:
        """Leave everything out where Inf was found. Nothing is read from an accelerator.

        Args:
            batches: All tensors, with their sums.
            is_sharded: Whether another rank may have found what this one has not: then the sums tell.

        Returns:
            Whether the host knows that there is nothing to be done.
        """
        if self.found_inf is None or not batches:
            return False
        device = batches[0].options.device
        is_off = self.found_inf.to(device).reshape(()) != 0
        # torch.amp.GradScaler looks at this rank's gradients alone; it is FSDP1's ShardedGradScaler that asks the
        # others.
        if is_sharded:
            is_off = is_off | ~torch.stack([batch.finite().all().to(device) for batch in batches]).all()
        if all(batch.options.on_host for batch in batches):
            return bool(is_off)
        for batch in batches:
            batch.call_off(is_off.to(batch.options.device))
        return False


def _clipped_square(batch: Batch) -> Tensor:
    """What these gradients add to the square of the norm that is clipped, shape (); skipped ones nothing."""
    # One NaN would make the norm, and by it every gradient, NaN; one Inf would make all others 0. So it goes where
    # clip_grad_norm_ is called before the step, as the Trainer does.
    squares = batch.sums[:, update.RAW_GRAD_SQ]
    skips = batch.options.nonfinite == "skip"
    return (torch.where(batch.finite(), squares, 0.0) if skips else squares).sum()


def refuse_nonfinite(batches: Iterable[Batch], name: Callable[[int], str]) -> None:
    """Look at the gradients of `nonfinite="raise"`; waits for an accelerator.

    Raises:
        FloatingPointError: One of them is not finite; the first is named.
    """
    for batch in batches:
        if batch.options.nonfinite == "raise" and not batch.finite().all():
            first = batch.finite().tolist().index(False)
            raise FloatingPointError(
                f"the gradient of parameter {name(batch.indices[first])} is not finite (nonfinite='raise'); nothing "
                "was changed. Lower the learning rate or look at the batch, or pass nonfinite='skip'"
            )


def leave_out_nonfinite(batches: Sequence[Batch], telemetry: Telemetry) -> None:
    """Where `nonfinite="skip"` a tensor goes by its own gradient, and scope "model" by all of them.

    Args:
        batches: All of one device.
        telemetry: Counts what is left out.
    """
    skipping = [batch for batch in batches if batch.options.nonfinite == "skip"]
    together = [batch for batch in skipping if batch.options.scope == "model"]
    if together:
        whole = torch.cat([batch.finite() for batch in together]).all()
        _leave_out(together, whole, telemetry)
    for batch in skipping:
        if batch.options.scope == "tensor":
            _leave_out([batch], batch.finite(), telemetry)


def _leave_out(batches: Sequence[Batch], keep: Tensor, telemetry: Telemetry) -> None:
    if all(batch.options.on_host for batch in batches) and bool(keep.all()):
        return
    skipped = ~keep
    if batches[0].is_off is not None:  # that is GradScaler's to count
        skipped = skipped & ~batches[0].is_off
    telemetry.count_skipped(skipped)
    for batch in batches:
        batch.leave_out(keep)
