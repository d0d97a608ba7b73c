"""Plain tensors that are parts of others, and say so: the marks of libraries that cut parameters without DTensor.

Seen in deepspeed 0.19 and megatron-core 0.16, and in the public sources of Transformer Engine, ColossalAI, AxoNN,
Nanotron, fairscale, fairseq, Bagua, FastMoE and Tutel. A mark counts only where there are several processes: in one
alone every tensor is whole, whatever it says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tam.integrations.torch_private import own_parameters


class _Mark(NamedTuple):
    """An attribute of a parameter, the value that makes it a part, and what the part is."""

    attribute: str
    value: object
    meaning: str


_TENSOR_PARALLEL = "this rank's part of a tensor-parallel weight"
_EXPERT = "an expert that other ranks do not have"
_MARKS = (
    _Mark("ds_is_replaced_module", True, "this rank's part of a weight that DeepSpeed's AutoTP has cut"),
    _Mark("tensor_model_parallel", True, f"{_TENSOR_PARALLEL} (Megatron-LM, Transformer Engine)"),
    _Mark("model_parallel", True, f"{_TENSOR_PARALLEL} (Megatron-LM)"),
    _Mark("is_tensor_parallel", True, f"{_TENSOR_PARALLEL} (AxoNN)"),
    _Mark("is_sharded", True, f"{_TENSOR_PARALLEL} (Nanotron)"),
    _Mark("_is_sharded", True, "this rank's part of a flattened parameter (fairscale)"),
    _Mark("allreduce", False, f"{_EXPERT} (DeepSpeed, Megatron-LM)"),
    _Mark("expert", True, f"{_EXPERT} (fairseq, fairscale, Bagua)"),
    _Mark("_tutel_expert", True, f"{_EXPERT} (Tutel)"),
    _Mark("dp_comm", "none", f"{_EXPERT} (FastMoE)"),
)


def mark_of_part(param: Tensor, modules: Sequence[nn.Module]) -> str | None:
    """The mark by which a tensor says that it is a part of another, and what that means; None where it says nothing.

    Args:
        param: The tensor.
        modules: The attached modules. Megatron and Transformer Engine mark weights that are not cut too; the module
            that owns one knows over how many ranks it would be.
    """
    for mark in _MARKS:
        value = getattr(param, mark.attribute, None)
        # The type first: an attribute of the same name may be anything, also what compares element by element, or 0
        # for False.
        says_so = isinstance(value, type(mark.value)) and value == mark.value
        if says_so and not _is_whole_anyway(param, mark.attribute, modules):
            return f"it is marked {mark.attribute}={value}: {mark.meaning}"
    layout = getattr(param, "dist_layout", None)
    if layout is not None and tuple(layout.global_shape) != tuple(param.shape):
        return f"its dist_layout says that it is {_TENSOR_PARALLEL} (ColossalAI)"
    if hasattr(param, "shard_fn") and hasattr(param, "gather_fn"):
        return f"its shard_fn says that it is {_TENSOR_PARALLEL} (ColossalAI)"
    return None


def _is_whole_anyway(param: Tensor, attribute: str, modules: Sequence[nn.Module]) -> bool:
    if attribute == "allreduce":
        return getattr(param, "group_name", None) == "ep_size_1"  # DeepSpeed's experts, all of them on every rank
    if attribute in ("tensor_model_parallel", "model_parallel"):
        return _tensor_parallel_size(param, modules) == 1
    return False


def _tensor_parallel_size(param: Tensor, modules: Sequence[nn.Module]) -> int | None:
    """Over how many ranks a marked weight is cut; None where neither its module nor Megatron says so."""
    for module in modules:
        for part in module.modules():
            if any(own is param for own in own_parameters(part).values()):
                size, group = getattr(part, "tp_size", None), getattr(part, "tp_group", None)
                if isinstance(size, int) or group is not None:
                    return size if isinstance(size, int) else torch.distributed.get_world_size(group)
    megatron: Any = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.model_parallel_is_initialized():
        return int(megatron.get_tensor_model_parallel_world_size())
    return None
