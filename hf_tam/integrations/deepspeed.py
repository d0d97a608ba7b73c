"""Refuses the DeepSpeed settings under which another optimizer than the one asked for would train, silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_optimizer_swap(plugin: Any) -> None:
    """Refuse a DeepSpeed configuration that replaces the optimizer.

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
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            'With "offload_optimizer" and "zero_force_ds_cpu_optimizer" (true by default) DeepSpeedCPUAdam would '
            'replace the optimizer of hf_tam: set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration.'
        )
