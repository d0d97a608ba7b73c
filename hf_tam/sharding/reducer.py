"""From local partial sums to those of whole logical tensors.

A logical tensor is the parameter as the model defines it. What a rank holds of it is the strategy's business, one file
each; `select_reducer` is the one place that chooses, and refuses what it does not know: the angle of a part of a
tensor is another angle, so there is nothing to fall back to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_tam.ownership import OwnedParameters
    from hf_tam.sharding.groups import ShardGroups

_REMEDY = (
    "An angle needs the whole tensor; hf_tam is exact on one device, under DDP, FSDP1 (use_orig_params=True), FSDP2, "
    "HSDP, tensor parallelism and DeepSpeed ZeRO: use one of those, or --optim adamw_torch with this wrapper."
)


class Reduced(NamedTuple):
    """Sums of whole tensors.

    Attributes:
        sums: Shape (n, columns), one row a tensor.
        present: Whether any rank has a gradient of the tensor, shape (n,) bool; None where all n have one.
    """

    sums: Tensor
    present: Tensor | None = None


class Span(NamedTuple):
    """What this rank holds of one logical tensor inside a flat buffer.

    Attributes:
        position: The place of the logical tensor among all of the optimizer.
        start: Its first element in the buffer.
        length: How many elements; 0 where other ranks hold it all.
    """

    position: int
    start: int
    length: int


class Reducer(Protocol):
    """Turns the partial sums of what this rank holds into the sums of whole logical tensors."""

    sees_all: bool
    """Whether one call of step() gets every logical tensor that is trained; if not, there is no angle over all."""
    tells_numbers: bool
    """Whether `share` communicates."""

    @property
    def groups(self) -> ShardGroups | None:
        """Over which ranks it sums; None where every tensor is whole."""

    def spans(self, param: Tensor) -> Sequence[Span] | None:
        """The logical tensors in a flat buffer; None where the parameter itself is one."""

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

    def share(self, numbers: Callable[[], Tensor]) -> Tensor | None:
        """Tell every rank the numbers that go with each logical tensor; None where every rank knows them.

        Args:
            numbers: Gives this rank's, one row a logical tensor of the optimizer, -inf where it knows none.

        Returns:
            The same with the other ranks' numbers in the gaps, -inf where nobody knows any.
        """


class WholeParameters:
    """What holds wherever each parameter stands for one logical tensor."""

    sees_all = True
    tells_numbers = False

    def spans(self, param: Tensor) -> None:
        """The parameter is a logical tensor itself."""

    def share(self, numbers: Callable[[], Tensor]) -> Tensor | None:
        """None: every rank has the parameter, however little of it, and with it its numbers."""
        return None


class LocalReducer(WholeParameters):
    """For whole tensors (one device, DDP): the local sums are the global ones. No communication."""

    groups = None

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
    params: Sequence[Tensor], owned: OwnedParameters, *, names: Sequence[str | None], module: nn.Module | None
) -> Reducer:
    """Choose the reducer for the tensors an optimizer is about to update.

    Communication: under ZeRO one all_gather_object for each buffer, for the partition map; otherwise none. That the
    ranks of a shard group hold the same is left to `Agreement`.

    Args:
        params: What stands in `param_groups` now, in order.
        owned: The parameters that the user handed over, or that an attached module owns.
        names: The names of the logical tensors, None where unknown.
        module: The attached module, if any.

    Raises:
        RuntimeError: A tensor is flattened or was put in place of the user's parameters by a wrapper, or is cut in
            a way that is not known.
    """
    kinds = [_kind(param, owned) for param in params]
    unknown = next((position for position, kind in enumerate(kinds) if kind not in _KNOWN_KINDS), None)
    if unknown is not None:
        raise RuntimeError(_refusal(unknown, params[unknown], kinds[unknown]))
    different = set(kinds) if "zero" in kinds else set(kinds) - {"whole"}
    if len(different) > 1:
        position = kinds.index(max(different))
        raise RuntimeError(_refusal(position, params[position], f"{' and '.join(sorted(different))} share one step"))
    if "fsdp1" in different:
        from hf_tam.sharding.fsdp1 import Fsdp1Reducer

        return Fsdp1Reducer(params, names=names, module=module)
    if "dtensor" in different:
        from hf_tam.sharding.dtensor import DTensorReducer

        return DTensorReducer(params, names=names)
    if "zero" in different:
        from hf_tam.sharding.zero import ZeroReducer

        return ZeroReducer(params, owned.in_order(), names=names)
    return LocalReducer()


def _refusal(position: int, param: Tensor, reason: str) -> str:
    return f"hf_tam cannot take the angle of parameter {position} (shape {tuple(param.shape)}): {reason}. {_REMEDY}"


def is_partitioned(owned: Iterable[Tensor | None]) -> bool:
    """Whether DeepSpeed ZeRO has taken over any of the parameters that the optimizer was built with."""
    return any(hasattr(param, "_hp_mapping") or hasattr(param, "_z3_optimizer") for param in owned)


_KNOWN_KINDS = ("whole", "dtensor", "fsdp1", "zero")


def _kind(param: Tensor, owned: OwnedParameters) -> str:
    """How the tensor is kept: one of `_KNOWN_KINDS`, or else the reason why it is refused."""
    if type(param) not in (nn.Parameter, Tensor) and _is_dtensor(param):
        return "dtensor"
    if param.device.type == "xla":
        return "it is on an XLA device, where under SPMD it cannot be seen how it is cut"
    if getattr(param, "_is_flat_param", False):
        return "FSDP1 put it in a flat parameter; wrap the model with use_orig_params=True"
    # FSDP1 marks the parameters it keeps slices of; torch/distributed/fsdp/_flat_param.py.
    if getattr(param, "_fsdp_flattened", False):
        return "fsdp1"
    if param in owned:
        return "whole"
    if is_partitioned(owned.in_order()):
        return "zero"
    return (
        "it is not one of the parameters this optimizer was built with, so a wrapper put a flat or sharded buffer, or "
        "a copy, in their place (DeepSpeed without ZeRO does, in fp16 and bf16); if you replaced it yourself, call "
        "optimizer.attach(module)"
    )


def _is_dtensor(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)
