"""Finds our optimizer inside what accelerate and DeepSpeed make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

_MOST_WRAPPERS = 3  # accelerate's around DeepSpeed's around the optimizer


def find_ours(item: Any) -> TorqueAware | None:
    """The optimizer of ours that `item` is or wraps, None if there is none.

    accelerate wraps an optimizer once, DeepSpeed once more; each keeps what it wraps in its attribute `optimizer`.
    """
    from hf_tam.torque_aware import TorqueAware

    for _ in range(_MOST_WRAPPERS):
        if isinstance(item, TorqueAware):
            return item
        item = getattr(item, "optimizer", None)
    return None


def innermost(item: Any) -> Any:
    """The optimizer that `item` is or wraps, whosever it is."""
    for _ in range(_MOST_WRAPPERS):
        item = getattr(item, "optimizer", item)
    return item
