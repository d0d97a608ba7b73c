"""Finds our optimizer inside what accelerate and DeepSpeed make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

MOST_WRAPPERS = 3
"""accelerate's around DeepSpeed's around the optimizer."""


def find_ours(item: Any) -> TorqueAware | None:
    """The optimizer of ours that `item` is or wraps, None if there is none; see `member_in`."""
    from hf_tam.family import member_in  # which imports torch

    found: TorqueAware | None = member_in(item)
    return found


def innermost(item: Any) -> Any:
    """The optimizer that `item` is or wraps, whosever it is."""
    for _ in range(MOST_WRAPPERS):
        item = getattr(item, "optimizer", item)
    return item
