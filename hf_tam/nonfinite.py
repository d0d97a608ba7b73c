"""What a NaN or Inf in a gradient does: an error before anything is changed, or an update that is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hf_tam.backends import Entry
from hf_tam.bucket import Bucket
from hf_tam.telemetry import Telemetry

__all__ = ["refuse", "skip"]


def refuse(buckets: Iterable[Bucket], names: Callable[[], Sequence[str | None]]) -> None:
    """Look at the gradients of `nonfinite="raise"`; waits for an accelerator.

    Raises:
        FloatingPointError: One of them is not finite; the first is named.
    """
    for bucket in buckets:
        if bucket.group["nonfinite"] == "raise" and not bucket.finite().all():
            raise FloatingPointError(_message(bucket.entries[bucket.finite().tolist().index(False)], names()))


def _message(entry: Entry, names: Sequence[str | None]) -> str:
    name = names[entry.index] or f"number {entry.index}, shape {tuple(entry.owner.shape)}"
    return (
        f"the gradient of parameter {name} is not finite (nonfinite='raise'); nothing was changed. "
        "Lower the learning rate or look at the batch, or pass nonfinite='skip'"
    )


def skip(buckets: Sequence[Bucket], telemetry: Telemetry) -> None:
    """Set `keep` where `nonfinite="skip"`: a tensor goes by its own gradient, scope "model" by all of them.

    Args:
        buckets: All of one device.
        telemetry: Counts what is left out.
    """
    skipping = [bucket for bucket in buckets if bucket.group["nonfinite"] == "skip"]
    together = [bucket for bucket in skipping if bucket.group["scope"] == "model"]
    if together:
        whole = torch.cat([bucket.finite() for bucket in together]).all()
        _keep(together, whole, [whole.expand(len(bucket.entries)) for bucket in together], telemetry)
    for bucket in skipping:
        if bucket.group["scope"] == "tensor":
            _keep([bucket], bucket.finite(), [bucket.finite()], telemetry)


def _keep(buckets: Sequence[Bucket], counted: Tensor, keeps: Sequence[Tensor], telemetry: Telemetry) -> None:
    on_host = all(bucket.on_host for bucket in buckets)
    if on_host and bool(counted.all()):
        return
    telemetry.count_skipped(counted, on_host=on_host)
    for bucket, keep in zip(buckets, keeps, strict=True):
        bucket.keep = keep if bucket.keep is None else keep & bucket.keep
