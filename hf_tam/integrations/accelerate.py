"""Looks at what `Accelerator.prepare` does to our optimizers: refuses what cannot be right, attaches the module.

Wrappers put other parameters in the place of the user's (FSDP2) or keep slices of them (FSDP1); only the prepared
module knows. What is relied on: the names that `register` asks for, the list `_models` of what was prepared before,
and the attribute `optimizer` of accelerate's and of DeepSpeed's wrappers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

from hf_tam.integrations.accelerate_checkpoint import checking_files, exactly_loading, marking_complete
from hf_tam.integrations.deepspeed import refuse_split_model_scope
from hf_tam.integrations.deepspeed_config import prevent_optimizer_swap
from hf_tam.integrations.wrapped import find_ours

TESTED_RANGE = ">=1.12,<2"

patched: list[str] = []

_UNSUPPORTED = {
    "MEGATRON_LM": "Megatron-LM builds its own optimizer over flat buffers of tensor- and pipeline-parallel shards",
    "XLA": "on XLA devices, under SPMD, it cannot be seen how a tensor is cut",
}


def register(module: ModuleType) -> None:
    """Patch `accelerate.accelerator`, freshly imported.

    Raises:
        ImportError: If it lacks a name that is relied on; says which, and the range of versions that was tested.
    """
    accelerator = getattr(module, "Accelerator", None)
    missing = [f"Accelerator.{name}" for name in _METHODS if not hasattr(accelerator, name)]
    if not hasattr(module, "load_fsdp_optimizer"):
        missing.append("load_fsdp_optimizer")
    if missing:
        raise ImportError(
            f"hf_tam cannot follow accelerate {version('accelerate')}: it has no {missing[0]}. It was tested with "
            f"accelerate{TESTED_RANGE}: install one of those."
        )
    for name, wrap in _METHODS.items():
        setattr(accelerator, name, wrap(getattr(accelerator, name)))
        patched.append(f"Accelerator.{name}")
    module.load_fsdp_optimizer = exactly_loading(module.load_fsdp_optimizer)  # type: ignore[attr-defined]
    patched.append("load_fsdp_optimizer")


def _attaching(prepare: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(prepare)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(find_ours(item) is not None for item in args):
            refuse_strategy(self)
        prepared = prepare(self, *args, **kwargs)
        # a tuple, but under FSDP2 and tensor parallelism a list (accelerate 1.15)
        for item in prepared if isinstance(prepared, (tuple, list)) else (prepared,):
            optimizer = find_ours(item)
            if optimizer is not None:
                _attach(optimizer, self._models)
                refuse_split_model_scope(getattr(item, "optimizer", None), optimizer)
        return prepared

    return wrapped


_METHODS = {"prepare": _attaching, "save_state": marking_complete, "load_state": checking_files}


def refuse_strategy(accelerator: Any) -> None:
    """Refuse what would train with another optimizer than ours, or with other angles.

    Raises:
        ValueError: Naming the strategy or the setting, and what to do.
    """
    name = accelerator.distributed_type.name
    if name in _UNSUPPORTED:
        raise ValueError(
            f"hf_tam does not work with accelerate's {name}: {_UNSUPPORTED[name]}. Use DDP, FSDP, tensor parallelism "
            "or DeepSpeed ZeRO, or another optimizer."
        )
    prevent_optimizer_swap(getattr(accelerator.state, "deepspeed_plugin", None))


def _attach(optimizer: Any, models: list[Any]) -> None:
    """Attach the models that own parameters of `optimizer`."""
    for model in models:
        # DeepSpeed's engine would put "module." before every name.
        is_engine = any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)
        with contextlib.suppress(ValueError):  # a model that is none of this optimizer's
            optimizer.attach(model.module if is_engine else model)
