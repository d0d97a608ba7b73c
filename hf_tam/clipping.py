"""Clipping to a global norm inside the step: the factor comes from the sums that are taken anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_tam.bucket import Bucket

__all__ = ["common_limit", "set_factors"]


def common_limit(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The `max_grad_norm` of all param groups, None where nothing is clipped.

    Raises:
        ValueError: They have different ones.
    """
    limits = {group["max_grad_norm"] for group in groups}
    if len(limits) > 1:
        raise ValueError(
            f"the param groups have different values of max_grad_norm ({limits}): what is clipped is the norm of "
            "all gradients together, so give them all the same"
        )
    limit: float | None = next(iter(limits))
    return limit


def set_factors(buckets: Sequence[Bucket], limit: float) -> None:
    """Give every bucket the factor by which torch.nn.utils.clip_grad_norm_ would scale the gradients."""
    if not buckets:
        return
    device = buckets[0].device
    squares = torch.stack([bucket.clipped_square().to(device) for bucket in buckets])
    factor = (limit / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
    for bucket in buckets:
        bucket.clip = factor.to(bucket.device)
