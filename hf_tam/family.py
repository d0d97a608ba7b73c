"""What a torque-aware optimizer is, apart from its tensors: its states, its hyperparameters, where its decay goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_tam.sharding import LogicalTensors
from hf_tam.update import Numbers, moment_unit


@dataclass(frozen=True)
class Family:
    """One of AdaTAMW, AdaTAM and TAM.

    Attributes:
        name: The optimizer's name.
        moments: State keys of the moments, which have the parameter's shape and layout, and `moment_dtype`.
        scalar_states: State keys that hold one fp32 number a tensor.
        coupled: Whether weight decay is part of the gradient.
        numbers: What the step wants of a param group.
    """

    name: str
    moments: tuple[str, ...]
    scalar_states: tuple[str, ...]
    coupled: bool
    numbers: Callable[[Mapping[str, Any]], Numbers]

    def foreign_scalars(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The scalar states of a tensor whose moments torch.optim's counterpart has left."""
        scalars = dict.fromkeys(self.scalar_states, 0.0)
        if "exp_avg_scale" in scalars:
            literal = group["step_size"] == "paper"
            scalars["exp_avg_scale"] = 1.0 / moment_unit(group["betas"][0], averaged=True) if literal else 1.0
        return scalars

    def complete(
        self,
        state: MutableMapping[str, Any],
        param: Tensor,
        group: Mapping[str, Any],
        *,
        shape: tuple[int, ...] = (),
    ) -> None:
        """Fill in what a state lacks: all of it before the first step. Other keys are left alone.

        Args:
            state: `optimizer.state[param]`.
            param: The parameter, or a flat buffer of many.
            group: Its param group.
            shape: That of a scalar state, (logical tensors,) for a buffer.
        """
        has_moment = state.get(self.moments[0]) is not None
        scalars = self.foreign_scalars(group) if has_moment else dict.fromkeys(self.scalar_states, 0.0)
        # Scalars lie beside the parameter: a skipped step must leave `step` alone without the host knowing.
        for key, number in scalars.items():
            if state.get(key) is None:
                state[key] = torch.full(shape, number, dtype=torch.float32, device=param.device)
        dtypes = dict.fromkeys(self.moments, moment_dtype(group, param))
        if is_corrected(group, param):
            dtypes[CORRECTION] = param.dtype
        for key, dtype in dtypes.items():
            if state.get(key) is None:
                # In the parameter's memory order: kernels walk all of them by one index.
                state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


CORRECTION = "param_correction"
"""State key of what a bfloat16 parameter leaves out of its weight, see `hf_tam.precision`; of the group as well."""


def is_corrected(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether what a parameter leaves out of its weight is kept."""
    return group[CORRECTION] is not None and param.dtype == torch.bfloat16


def moment_dtype(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """What the moments of a parameter are kept in: wider than it, never narrower."""
    return param.dtype if group["state_bits"] is None else torch.promote_types(param.dtype, torch.float32)


_MOST_WRAPPERS = 3  # accelerate's around DeepSpeed's around the optimizer


def member_in(item: Any) -> Any:
    """The optimizer of a family that `item` is or wraps, None if there is none.

    accelerate wraps an optimizer once, DeepSpeed once more; each keeps what it wraps in its attribute `optimizer`.
    """
    for _ in range(_MOST_WRAPPERS):
        if isinstance(getattr(item, "family", None), Family):
            return item
        item = getattr(item, "optimizer", None)
    return None


class Member(Protocol):
    """An optimizer of a family, as far as its checkpoints need to know it; see `TorqueAware`."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    defaults: dict[str, Any]
    logical: LogicalTensors

    @property
    def family(self) -> Family:
        """Its states and its numbers."""

    @property
    def step_sizes(self) -> tuple[str, ...]:
        """Accepted values of `step_size`."""
