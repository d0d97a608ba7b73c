"""How the parameters of an optimizer are kept: the one place that chooses, and refuses what it does not know.

The angle of a part of a tensor is another angle, so there is nothing to fall back to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_tam.integrations import torch_private
from hf_tam.integrations.deepspeed.partitions import is_partitioned
from hf_tam.integrations.marks import mark_of_part
from hf_tam.sharding.company import several_processes
from hf_tam.sharding.ownership import OwnedParameters, is_frozen, shape_of
from hf_tam.sharding.reducer import LocalReducer, Reducer

_REMEDY = (
    "An angle needs the whole tensor; hf_tam is exact on one device, under DDP, FSDP1 (use_orig_params=True), FSDP2, "
    "HSDP, tensor parallelism and DeepSpeed ZeRO: use one of those, or --optim adamw_torch with this wrapper."
)


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
        elif torch_private.is_flat(param):
            reason = "FSDP1 put it in a flat parameter; wrap the model with use_orig_params=True"
        elif marked and not is_frozen(param):
            reason = mark_of_part(param, modules)
        if reason is not None:
            raise RuntimeError(_refusal(param, names[position], position, reason))


def _refusal(param: Tensor, name: str | None, position: int, reason: str) -> str:
    what = f"parameter {position if name is None else name} (shape {tuple(param.shape)})"
    return f"hf_tam cannot take the angle of {what}: {reason}. {_REMEDY}"


def _kind(param: Tensor, owned: OwnedParameters, *, partitioned: bool) -> str:
    """How the tensor is kept: whole, dtensor, fsdp1 or zero; stranger where nobody has said so."""
    if type(param) not in (nn.Parameter, Tensor) and _is_dtensor(param):
        return "dtensor"
    if torch_private.is_sliced(param):
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
