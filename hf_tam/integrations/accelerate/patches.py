"""Looks at what `Accelerator.prepare` does to our optimizers: refuses what cannot be right, attaches the module.

Wrappers put other parameters in the place of the user's (FSDP2) or keep slices of them (FSDP1); only the prepared
module knows. What is relied on: the names that `register` asks for, the lists `_models` and `_optimizers` of what was
prepared before, and the attribute `optimizer` of accelerate's and of DeepSpeed's wrappers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_tam.integrations.accelerate.checkpoint import checking_files, exactly_loading, marking_complete
from hf_tam.integrations.accelerate.prepare import (
    FollowedParameters,
    attach_models,
    compare_models,
    warn_of_strangers,
)
from hf_tam.integrations.deepspeed.config import prevent_optimizer_swap
from hf_tam.integrations.deepspeed.patches import refuse_split_model_scope
from hf_tam.integrations.transformers.tensor_parallel import refuse_plain_shards
from hf_tam.integrations.wrapped import find_ours

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

ACCEPTED_RANGE = ">=1.13,<2"

patched: list[str] = []

_UNSUPPORTED = {
    "MEGATRON_LM": "Megatron-LM builds its own optimizer over flat buffers of tensor- and pipeline-parallel shards",
    "XLA": "on XLA devices, under SPMD, it cannot be seen how a tensor is cut",
}
_TRUE = ("1", "true", "t", "yes", "y", "on")


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
            f"hf_tam cannot follow accelerate {version('accelerate')}: it has no {missing[0]}. It is made for "
            f"accelerate{ACCEPTED_RANGE}: install one of those."
        )
    for name, wrap in _METHODS.items():
        setattr(accelerator, name, wrap(getattr(accelerator, name)))
        patched.append(f"Accelerator.{name}")
    # Here for `Accelerator.load_state`, which looks it up in this module; the Trainer has imported it under its own.
    module.load_fsdp_optimizer = exactly_loading(module.load_fsdp_optimizer)  # type: ignore[attr-defined]
    patched.append("load_fsdp_optimizer")


def _attaching(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Accelerator.prepare`.

    Communication: where a model is wrapped for several processes, that of `compare_replicas`, whether or not an
    optimizer of ours is there: all ranks meet in such a call, and which optimizers each of them has must not matter.
    """

    @functools.wraps(prepare)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = [item for item in args if isinstance(item, nn.Module)]
        if any(find_ours(item) is not None for item in args):
            refuse_strategy(self)
            for model in models:
                refuse_plain_shards(model)
        optimizers = _prepared_optimizers(self, args)
        followed = FollowedParameters(optimizers, models)
        prepared = prepare(self, *args, **kwargs)
        # a tuple, but under FSDP2 and tensor parallelism a list (accelerate 1.15)
        items = prepared if isinstance(prepared, (tuple, list)) else (prepared,)
        became = [after for before, after in zip(args, items, strict=True) if isinstance(before, nn.Module)]
        problem = None
        try:
            followed.put_in_place(became)
        except ValueError as error:  # perhaps on this rank alone
            problem = str(error)
        compare_models(became, problem=problem)
        for optimizer in optimizers:
            attach_models(optimizer, [*followed.owners(optimizer, became), *_owners(optimizer, self._models)])
        for item in items:
            ours = find_ours(item)
            if ours is not None:
                warn_of_strangers(ours, models=self._models, optimizers=self._optimizers)
                refuse_split_model_scope(getattr(item, "optimizer", None), ours)
        return prepared

    return wrapped


def _attaching_optimizer(prepare_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Accelerator.prepare_optimizer`, which loops call by itself too, after `prepare_model`."""

    @functools.wraps(prepare_optimizer)
    def wrapped(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        ours = find_ours(optimizer)
        if ours is not None:
            refuse_strategy(self)
            attach_models(ours, _owners(ours, self._models))
        return prepare_optimizer(self, optimizer, *args, **kwargs)

    return wrapped


_METHODS = {
    "prepare": _attaching,
    "prepare_optimizer": _attaching_optimizer,
    "save_state": marking_complete,
    "load_state": checking_files,
}


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
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if name == "FSDP" and plugin is not None and plugin.fsdp_version == 1:
        _refuse_flat(plugin.use_orig_params)
    prevent_optimizer_swap(getattr(accelerator.state, "deepspeed_plugin", None))


def refuse_flat_settings(settings: Mapping[str, Any] | None) -> None:
    """Refuse FSDP1 with flat parameters by its settings alone, before there is a model.

    Args:
        settings: What the plugin of FSDP will be built with, as TrainingArguments has it in `fsdp_plugin_args`; None:
            what `accelerate launch` has put into the environment.

    Raises:
        ValueError: With the setting.
    """
    if settings is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return
        settings = {}
    if int(settings.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")) == 1:
        kept = settings.get("use_orig_params")
        _refuse_flat(os.environ.get("FSDP_USE_ORIG_PARAMS", "false").lower() in _TRUE if kept is None else kept)


def _refuse_flat(use_orig_params: Any) -> None:
    if not use_orig_params:
        raise ValueError(
            "FSDP1 with fsdp_use_orig_params: false puts the parameters of each unit into one flat tensor, in which "
            "hf_tam cannot tell them apart, and of which an optimizer that was built before knows nothing: set "
            "fsdp_use_orig_params: true, or fsdp_version: 2"
        )


def _prepared_optimizers(accelerator: Any, args: Sequence[Any]) -> list[TorqueAware]:
    """Ours, those of this call and those that were prepared before, each once."""
    found = [find_ours(item) for item in (*args, *accelerator._optimizers)]
    return list({id(optimizer): optimizer for optimizer in found if optimizer is not None}.values())


def _owners(optimizer: TorqueAware, models: Sequence[nn.Module]) -> list[nn.Module]:
    """The models that own any parameter that stands in the groups of an optimizer."""
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return [model for model in models if any(id(param) in stepped for param in model.parameters())]
