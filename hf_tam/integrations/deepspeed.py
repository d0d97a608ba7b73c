"""Follows what DeepSpeed does to our optimizers, and refuses what would train with another one, or with other angles.

What is relied on: the arguments `model`, `optimizer` and `config_class` of `DeepSpeedEngine.__init__`, the dictionary
in `_param_dict` of the latter, the engine's attribute `optimizer` and its methods `load_checkpoint` and
`load_universal_checkpoint`, and what a universal checkpoint has in `zero/optimizer_state.pt` (deepspeed 0.19).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_tam.integrations.wrapped import find_ours

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

TESTED_RANGE = ">=0.19,<0.20"

logger = logging.getLogger("hf_tam")

patched: list[str] = []


def register(module: ModuleType) -> None:
    """Patch `deepspeed.runtime.engine`, freshly imported or not.

    Raises:
        ImportError: If it lacks a name that is relied on; says which, and the range of versions that was tested.
    """
    engine = getattr(module, "DeepSpeedEngine", None)
    if engine is None or not {"model", "optimizer", "config_class"} <= set(
        inspect.signature(engine.__init__).parameters
    ):
        raise ImportError(
            f"hf_tam cannot follow deepspeed {version('deepspeed')}: DeepSpeedEngine is not as expected. It was "
            f"tested with deepspeed{TESTED_RANGE}: install one of those."
        )
    engine.__init__ = _attaching(engine.__init__)
    engine.load_checkpoint = _giving_groups_back(engine.load_checkpoint)
    patched.extend(["DeepSpeedEngine.__init__", "DeepSpeedEngine.load_checkpoint"])


def _attaching(initialise: Callable[..., None]) -> Callable[..., None]:
    """Wrap `DeepSpeedEngine.__init__`, which PipelineEngine and the hybrid engine call too.

    Before the engine casts, cuts or replaces any parameter, an optimizer of ours learns which module owns its own.
    """
    signature = inspect.signature(initialise)

    @functools.wraps(initialise)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        model, config = bound.arguments["model"], bound.arguments["config_class"]._param_dict
        given = bound.arguments.get("optimizer")
        if find_ours(given) is not None:
            _check_and_attach(given, model, config)
        elif callable(given):  # a function that DeepSpeed calls with the parameters

            @functools.wraps(given)
            def build(parameters: Any) -> Any:
                optimizer = given(parameters)
                _check_and_attach(optimizer, model, config)
                return optimizer

            bound.arguments["optimizer"] = build
        initialise(*bound.args, **bound.kwargs)
        optimizer = find_ours(self.optimizer)
        if optimizer is not None:
            refuse_split_model_scope(self.optimizer, optimizer)

    return wrapped


def _check_and_attach(item: Any, model: Any, config: Mapping[str, Any]) -> None:
    optimizer = find_ours(item)
    if optimizer is None:
        return
    block = config.get("optimizer")
    if block is not None:  # an optimizer that DeepSpeed is given goes before one that is described
        logger.warning(
            'The "optimizer" block of the DeepSpeed configuration (%s) has no effect: %s was passed to DeepSpeed.',
            block.get("type", "unnamed"),
            type(optimizer).__name__,
        )
    refuse_swap_in_config({key: value for key, value in config.items() if key != "optimizer"})
    optimizer.attach(model)


def _giving_groups_back(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DeepSpeedEngine.load_checkpoint`: of a universal checkpoint each param group gets what was its own.

    ZeRO-3 gives all of them the hyperparameters of the first; ZeRO-1 and 2 pass over groups that the checkpoint has
    not, moments and all (deepspeed 0.19.8, runtime/zero/stage3.py and runtime/base_optimizer.py).
    """
    signature = inspect.signature(load_checkpoint)

    @functools.wraps(load_checkpoint)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = find_ours(self.optimizer)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        groups = None
        if optimizer is not None and self.load_universal_checkpoint():
            groups = _universal_groups(optimizer, bound.arguments)
        result = load_checkpoint(self, *args, **kwargs)
        if optimizer is not None and groups is not None:
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                params = group["params"]
                group.clear()
                group.update({**saved, "params": params})
        return result

    return wrapped


def _universal_groups(optimizer: TorqueAware, given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The param groups of a universal checkpoint in `optimizer`'s own form; None where DeepSpeed loads none.

    Args:
        optimizer: The one that is to load it.
        given: The arguments of `load_checkpoint`.

    Raises:
        ValueError: There are more or fewer than the optimizer has, or they are another optimizer's.
    """
    import torch

    from hf_tam.checkpoint import adapt_groups

    folder, tag = Path(given["load_dir"]), given["tag"]
    if tag is None and (folder / "latest_universal").is_file():
        tag = (folder / "latest_universal").read_text(encoding="utf-8").strip()
    path = folder / (tag or "") / "zero" / "optimizer_state.pt"
    if given["load_module_only"] or not given["load_optimizer_states"] or not path.is_file():
        return None  # DeepSpeed says what is missing
    # A pickle that DeepSpeed itself loads in the next moment; ZeRO-3's has the moments of a rank in it, left on disk.
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"{path} was saved with {len(saved)} param group(s), and the optimizer has {len(optimizer.param_groups)} "
            "here, of which DeepSpeed would leave some without their state: build the same param groups"
        )
    return adapt_groups(optimizer, saved)


def refuse_optimizer_swap(plugin: Any) -> None:
    """Refuse a DeepSpeed configuration that replaces the optimizer, or that takes tensors out of its sight.

    Args:
        plugin: accelerate's DeepSpeedPlugin, or None if DeepSpeed is not used.

    Raises:
        ValueError: Naming the block or the setting.
    """
    if plugin is not None:
        refuse_swap_in_config(plugin.hf_ds_config.config)


def refuse_swap_in_config(config: Mapping[str, Any]) -> None:
    """As `refuse_optimizer_swap`, for the configuration as a dictionary.

    Raises:
        ValueError: Naming the block or the setting.
    """
    if "optimizer" in config:
        name = config["optimizer"].get("type", "unnamed")
        raise ValueError(
            f'The "optimizer" block of the DeepSpeed configuration ({name}) would replace the optimizer of hf_tam '
            "without a word: remove it."
        )
    zero = config.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            'With "offload_optimizer" and "zero_force_ds_cpu_optimizer" (true by default) DeepSpeedCPUAdam would '
            'replace the optimizer of hf_tam: set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration.'
        )
    for setting, found, reason, remedy in _settings(config, zero, offload):
        if found:
            raise ValueError(
                f'"{setting}" in the DeepSpeed configuration does not go with an optimizer of hf_tam: {reason}. '
                + remedy
            )


def _settings(
    config: Mapping[str, Any], zero: Mapping[str, Any], offload: Mapping[str, Any]
) -> list[tuple[str, bool, str, str]]:
    """Each refused setting: its name, whether it is on, why it is refused, what to do."""
    half = [name for name in ("fp16", "bf16") if (config.get(name) or {}).get("enabled") is True]
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 1)
    return [
        ("offload_optimizer.ratio", offload.get("ratio", 1) != 1,
         "what is not offloaded would be stepped by torch.optim.AdamW", "Set it to 1."),
        ("offload_optimizer.super_offload", bool(offload.get("super_offload")),
         "it steps with its own CPU Adam", "Remove it."),
        ("offload_optimizer.device: nvme", offload.get("device") == "nvme",
         "only states as large as the parameters are swapped, not those with one number a tensor",
         'Use "device": "cpu".'),
        ("zenflow", bool(zero.get("zenflow")), "it steps with its own CPU Adam", "Remove it."),
        ("elastic_checkpoint", bool(zero.get("elastic_checkpoint")),
         "it cuts the end off every state vector", "Remove it; a universal checkpoint changes the number of ranks."),
        ("round_robin_gradients", bool(zero.get("round_robin_gradients")),
         "DeepSpeed's map of the partitions is wrong with it (seen in 0.19.8)", "Remove it."),
        ("mics_shard_size", zero.get("mics_shard_size", -1) > 0, "replicas of shards are not supported", "Remove it."),
        ("tensor_parallel.autotp_size", tensor_parallel not in (0, 1),
         "a tensor's parts on the other tensor-parallel ranks cannot be seen", "Use accelerate's tp_size."),
        (f"{''.join(half[:1])} without ZeRO", bool(half) and zero.get("stage", 0) == 0,
         "DeepSpeed would step copies that cannot be told from parts of a tensor",
         'Set "zero_optimization": {"stage": 1} or more.'),
    ]  # fmt: skip


def refuse_split_model_scope(zero_optimizer: Any, optimizer: Any) -> None:
    """Refuse scope "model" where DeepSpeed would call step() several times, each time with a part of the model.

    Args:
        zero_optimizer: DeepSpeed's own optimizer.
        optimizer: The one of hf_tam inside it.

    Raises:
        ValueError: With what to change.
    """
    parts = len(getattr(zero_optimizer, "fp16_groups", None) or getattr(zero_optimizer, "bit16_groups", None) or [])
    if parts > 1 and any(group["scope"] == "model" for group in optimizer.param_groups):
        raise ValueError(
            f"scope='model' takes one angle over all parameters, but DeepSpeed hands them over in {parts} parts, one "
            "at a time (a param group under ZeRO-1 and 2, a sub-group under ZeRO-3): use scope='tensor', or one param "
            "group and a sub_group_size larger than the model"
        )
