"""Refuses the DeepSpeed settings under which another optimizer than the one asked for would train, silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_optimizer_swap(args: Any) -> None:
    """Refuse training arguments whose DeepSpeed configuration replaces the optimizer.

    Args:
        args: TrainingArguments after their `__post_init__`, where `deepspeed_plugin` is set if DeepSpeed is used.

    Raises:
        ValueError: Naming the block or the setting.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        refuse_swap_in_config(plugin.hf_ds_config.config, optim=args.optim)


def refuse_swap_in_config(config: Mapping[str, Any], *, optim: str) -> None:
    """Refuse a DeepSpeed configuration that replaces the optimizer.

    Args:
        config: The DeepSpeed configuration as a dictionary.
        optim: What the user asked for, for the message.

    Raises:
        ValueError: Naming the block or the setting.
    """
    if "optimizer" in config:
        name = config["optimizer"].get("type", "unnamed")
        raise ValueError(
            f'The "optimizer" block of the DeepSpeed configuration ({name}) would replace --optim {optim}: remove it.'
        )
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f'With "offload_optimizer" and "zero_force_ds_cpu_optimizer" (true by default) DeepSpeedCPUAdam would '
            f'replace --optim {optim}: set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration.'
        )
