"""From local partial sums to those of whole logical tensors.

A logical tensor is the parameter as the model defines it. What a rank holds of it is the strategy's business, one file
each; `select_reducer` is the one place that chooses, and refuses what it does not know: the angle of a part of a
tensor is another angle, so there is nothing to fall back to.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

_REMEDY = (
    "An angle needs the whole tensor; hf_tam is exact on one device, under DDP, FSDP1 (use_orig_params=True), FSDP2, "
    "HSDP and tensor parallelism: use one of those, or --optim adamw_torch with this wrapper."
)


class Reduced(NamedTuple):
    """Sums of whole tensors.

    Attributes:
        sums: Shape (n, columns), one row a tensor.
        present: Whether any rank has a gradient of the tensor, shape (n,) bool; None where all n have one.
    """

    sums: Tensor
    present: Tensor | None = None


class Reducer(Protocol):
    """Turns the partial sums of what this rank holds into the sums of whole logical tensors."""

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or of its state, a tensor that can be written."""

    def gradient(self, param: Tensor) -> Tensor | None:
        """What this rank holds of the gradient, cut as the parameter is; None where the parameter takes no part."""

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """Make local sums global.

        Args:
            sums: Shape (n, columns), the last column |g|^2 of the raw gradient.
            rows: The position of each of the n tensors among all parameters of the optimizer.
            present: Whether this rank has a gradient of it; not where an empty one stands in.
        """


class LocalReducer:
    """For whole tensors (one device, DDP): the local sums are the global ones. No communication."""

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gradient(self, param: Tensor) -> Tensor | None:
        """The gradient itself."""
        return param.grad

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """Return `sums` as they are."""
        return Reduced(sums)


def select_reducer(
    params: Sequence[Tensor], known: Container[Tensor], *, names: Sequence[str | None], module: nn.Module | None
) -> Reducer:
    """Choose the reducer for the tensors an optimizer is about to update.

    Communication: where tensors are sharded, one all_gather_object in each shard group, by which its ranks check that
    they hold the same logical tensors in the same order.

    Args:
        params: What stands in `param_groups` now, in order.
        known: The parameters that the user handed over, or that an attached module owns.
        names: The parameters' names, None where unknown.
        module: The attached module, if any.

    Raises:
        RuntimeError: A tensor is flattened or was put in place of the user's parameters by a wrapper, is cut in a way
            that is not known, or the ranks of a shard group disagree.
    """
    kinds = [_kind(param, known) for param in params]
    unknown = next(
        (position for position, kind in enumerate(kinds) if kind not in ("whole", "dtensor", "fsdp1")), None
    )
    if unknown is not None:
        raise RuntimeError(_refusal(unknown, params[unknown], kinds[unknown]))
    if "fsdp1" in kinds:
        if "dtensor" in kinds:
            position = kinds.index("dtensor")
            raise RuntimeError(_refusal(position, params[position], "FSDP1 and DTensors share one optimizer"))
        from hf_tam.sharding.fsdp1 import Fsdp1Reducer

        return Fsdp1Reducer(params, names=names, module=module)
    if "dtensor" in kinds:
        from hf_tam.sharding.dtensor import DTensorReducer

        return DTensorReducer(params, names=names)
    return LocalReducer()


def _refusal(position: int, param: Tensor, reason: str) -> str:
    return f"hf_tam cannot take the angle of parameter {position} (shape {tuple(param.shape)}): {reason}. {_REMEDY}"


def _kind(param: Tensor, known: Container[Tensor]) -> str:
    """How the tensor is kept: "whole", "dtensor" or "fsdp1", or else the reason why it is refused."""
    if type(param) not in (nn.Parameter, Tensor) and _is_dtensor(param):
        return "dtensor"
    if getattr(param, "_is_flat_param", False):
        return "FSDP1 put it in a flat parameter; wrap the model with use_orig_params=True"
    # FSDP1 marks the parameters it keeps slices of; torch/distributed/fsdp/_flat_param.py.
    if getattr(param, "_fsdp_flattened", False):
        return "fsdp1"
    if param not in known:
        return (
            "it is not one of the parameters this optimizer was built with, so a wrapper (such as DeepSpeed ZeRO) "
            "put a flat or sharded buffer in their place; if you replaced it yourself, call optimizer.attach(module)"
        )
    return "whole"


def _is_dtensor(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)
