"""What ZeRO leaves on the user's parameters, by which its partition map is found. Nothing here communicates.

ZeRO-1, ZeRO-2 and the BF16 optimizer set `_hp_mapping`, this rank's fragment or None, and `_dp_group`; ZeRO-3 sets
`_z3_optimizer`. Seen in deepspeed 0.19.

References:
    deepspeed/utils/mixed_precision_linkage.py, deepspeed/utils/tensor_fragment.py, deepspeed/runtime/zero/stage3.py
    in https://github.com/deepspeedai/DeepSpeed
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_tam.integrations.torch_private import default_group


def is_partitioned(params: Iterable[Tensor | None]) -> bool:
    """Whether ZeRO has taken over any of the parameters."""
    return any(hasattr(param, "_hp_mapping") or hasattr(param, "_z3_optimizer") for param in params)


def is_optimized(param: Tensor | None) -> bool:
    """Whether ZeRO updates the parameter; frozen ones it only keeps."""
    if param is None:
        return False
    return hasattr(param, "_hp_mapping") or (hasattr(param, "_z3_optimizer") and param.requires_grad)


def data_parallel_group(param: Tensor) -> Any:
    """The process group over which ZeRO cuts the parameter."""
    optimizer = getattr(param, "_z3_optimizer", None)
    group = getattr(param, "_dp_group", None) if optimizer is None else optimizer.dp_process_group
    return getattr(param, "ds_process_group", group) or default_group()


def stage3_optimizer(params: Iterable[Tensor | None]) -> Any:
    """ZeRO-3's optimizer, which owns the parameters; None under the other stages."""
    return next((found for param in params if (found := getattr(param, "_z3_optimizer", None))), None)


def fragment(param: Tensor | None) -> Any:
    """What this rank's buffers hold of the parameter under ZeRO-1 and 2; None where they hold nothing."""
    return getattr(param, "_hp_mapping", None)
