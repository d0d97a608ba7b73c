"""From local partial sums to those of whole logical tensors.

A logical tensor is the parameter as the model defines it. What a rank holds of it is the strategy's business, one file
each; `select_reducer` is the one place that chooses, and refuses what it does not know: the angle of a part of a
tensor is another angle, so there is nothing to fall back to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hf_tam.ownership import OwnedParameters, is_frozen, shape_of
from hf_tam.sharding.marks import mark_of_part, several_processes

if TYPE_CHECKING:
    from hf_tam.sharding.groups import ShardGroups

FSDP1_MARK = "_fsdp_flattened"
"""Attribute of the parameters that FSDP1 keeps slices of."""
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
    params: Sequence[Tensor],
    owned: OwnedParameters,
    *,
    names: Sequence[str | None],
    logical: Sequence[Tensor | None] = (),
    modules: Sequence[nn.Module] = (),
) -> Reducer:
    """Choose the reducer for the tensors an optimizer is about to update.

    Communication: under ZeRO one all_gather_object for each buffer, for the partition map; otherwise none. That the
    ranks of a shard group hold the same is left to `Agreement`.

    Args:
        params: What stands in `param_groups` now, in order.
        owned: The parameters that the user handed over, or that an attached module owns.
        names: The names of the logical tensors, None where unknown.
        logical: Where ZeRO has put its buffers into `param_groups`, what the user handed over, in order; None for what
            no attached module has.
        modules: The attached modules.

    Raises:
        RuntimeError: A tensor is flattened, says that it is a part, was cut or was put in place of the user's
            parameters by a wrapper.
    """
    partitioned = is_partitioned(logical)
    own_names = [None] * len(params) if partitioned else names
    refuse_parts(params, names=own_names, modules=modules)
    kinds = [_kind(param, owned, partitioned=partitioned) for param in params]
    for position, param in enumerate(params):
        if kinds[position] == "stranger":
            reason = _why_not_whole(param, owned, kinds)
            if reason is not None:
                raise RuntimeError(_refusal(param, own_names[position], position, reason))
    different = {kind for kind in kinds if kind not in ("whole", "stranger")}
    if len(different) > 1 or ("zero" in different and len(set(kinds)) > 1):
        position = kinds.index(max(different))
        reason = f"{' and '.join(sorted(set(kinds) - {'stranger'}))} share one step"
        raise RuntimeError(_refusal(params[position], own_names[position], position, reason))
    if "fsdp1" in different:
        from hf_tam.sharding.fsdp1 import Fsdp1Reducer

        return Fsdp1Reducer(params, names=names, modules=modules)
    if "dtensor" in different:
        from hf_tam.sharding.dtensor import DTensorReducer

        return DTensorReducer(params, names=names)
    if "zero" in different:
        from hf_tam.sharding.zero import ZeroReducer

        return ZeroReducer(params, logical, names=names, shapes=owned.shapes_in_order())
    return LocalReducer()


def refuse_parts(params: Sequence[Tensor], *, names: Sequence[str | None], modules: Sequence[nn.Module]) -> None:
    """Refuse tensors that say themselves that they are not whole. No communication.

    Raises:
        RuntimeError: Naming the first one, and what is known of it.
    """
    marked = several_processes()
    for position, param in enumerate(params):
        reason = None
        if param.device.type == "xla":
            reason = "it is on an XLA device, where under SPMD it cannot be seen how it is cut"
        elif getattr(param, "_is_flat_param", False):
            reason = "FSDP1 put it in a flat parameter; wrap the model with use_orig_params=True"
        elif marked and not is_frozen(param):
            reason = mark_of_part(param, modules)
        if reason is not None:
            raise RuntimeError(_refusal(param, names[position], position, reason))


def _refusal(param: Tensor, name: str | None, position: int, reason: str) -> str:
    what = f"parameter {position if name is None else name} (shape {tuple(param.shape)})"
    return f"hf_tam cannot take the angle of {what}: {reason}. {_REMEDY}"


def is_partitioned(logical: Iterable[Tensor | None]) -> bool:
    """Whether DeepSpeed ZeRO has taken over any of the parameters that the optimizer was built with."""
    return any(hasattr(param, "_hp_mapping") or hasattr(param, "_z3_optimizer") for param in logical)


def _kind(param: Tensor, owned: OwnedParameters, *, partitioned: bool) -> str:
    """How the tensor is kept: whole, dtensor, fsdp1 or zero; stranger where nobody has said so."""
    if type(param) not in (nn.Parameter, Tensor) and _is_dtensor(param):
        return "dtensor"
    # FSDP1 marks the parameters it keeps slices of; torch/distributed/fsdp/_flat_param.py.
    if getattr(param, FSDP1_MARK, False):
        return "fsdp1"
    if owned.knows(param):
        return "whole"
    return "zero" if partitioned else "stranger"


def _is_flattened(param: Tensor, shapes: Sequence[tuple[int, ...] | None], count: int) -> bool:
    """Whether a vector in the place of more tensors than there are now may hold all of them, with padding."""
    total = sum(math.prod(shape) for shape in shapes if shape is not None)
    return param.ndim == 1 and count < len(shapes) and param.numel() >= total


def _why_not_whole(param: Tensor, owned: OwnedParameters, kinds: Sequence[str]) -> str | None:
    """Why a tensor that somebody put into `param_groups`, or has changed there, is not taken for whole; None if it is.

    torch.optim takes whatever stands there. So does this in one process, as long as it is a parameter, which the
    buffers are not that wrappers make. Among several processes it may be a part of what was there.
    """
    if not owned.has_kind(param):
        return (
            "it is no parameter, and none that this optimizer was built with, so a wrapper put a flat or sharded "
            "buffer, or a copy, in its place (DeepSpeed without ZeRO does, in fp16 and bf16). With DeepSpeed ZeRO, or "
            "if you put it there yourself, call optimizer.attach(module)"
        )
    if set(kinds) == {"stranger"} and _is_flattened(param, owned.shapes_in_order(), len(kinds)):
        return (
            "it is as large as all tensors together that this optimizer was built with, so that something (DeepSpeed "
            "ZeRO, for one) has put a flat buffer in their place, of which one angle would be taken: call "
            "optimizer.attach(module) with what it is a parameter of"
        )
    if not several_processes() or is_frozen(param):
        return None
    if owned.has_shrunk(param):
        return (
            f"its shape was {owned.shape(param)} when the optimizer was given it, so something has cut it, as "
            "DeepSpeed's AutoTP does; if you made it smaller yourself, on every rank alike, build the optimizer anew"
        )
    if set(kinds) == {"stranger"} and shape_of(param) not in owned.shapes_in_order():
        return (
            "all that this optimizer was built with has been replaced, and with several processes it cannot be seen "
            "whether this is whole: if it is, call optimizer.attach(module) with the module that owns it"
        )
    if not set(kinds) <= {"whole", "stranger"}:
        return (
            "it was put in beside sharded parameters, and it cannot be seen whether it is whole: if it is, call "
            "optimizer.attach(module) with the module that owns it"
        )
    return None


def _is_dtensor(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)
