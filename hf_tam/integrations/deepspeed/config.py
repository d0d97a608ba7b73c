"""Makes a DeepSpeed configuration keep an optimizer of ours, or refuses it by the name of the setting.

Every setting of deepspeed 0.19.8 (runtime/config.py, runtime/zero/config.py) was gone through: what replaces the
optimizer, or cuts, replaces or orders parameters in ways that its partition map does not tell, is refused here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger("hf_tam")

_STOCK_TYPES = ("adam", "adamw")
"""What the configuration files of transformers, accelerate and those after them have in their "optimizer" block."""
_STOCK_VALUES: dict[str, Any] = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}
_HOW_IT_STEPS = ("torch_adam", "foreach")
_WOULD_REPLACE = 'The "optimizer" block of the DeepSpeed configuration ({}) would replace the optimizer of hf_tam'


def prevent_optimizer_swap(plugin: Any, values: Mapping[str, Any] | None = None) -> None:
    """Have a DeepSpeed configuration keep the optimizer of ours that the user named, or refuse it.

    Changed in place, with one log line, is what its stock files bring along without asking for anything: an
    "optimizer" block of "auto" values, "round_robin_gradients" and the forced CPU Adam that is DeepSpeed's default.

    Args:
        plugin: accelerate's DeepSpeedPlugin, or None if DeepSpeed is not used.
        values: What the user asked for otherwise: lr, betas, eps and weight_decay. The block may repeat it.

    Raises:
        ValueError: Naming the block or the setting.
    """
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    changes = [*_take_out_block(config, values or {}), *_step_on_the_cpu(config), *_keep_the_order(config)]
    if changes and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "hf_tam changes the DeepSpeed configuration so that its optimizer trains: %s", "; ".join(changes)
        )
    refuse_swap_in_config(config)


def _take_out_block(config: dict[str, Any], values: Mapping[str, Any]) -> list[str]:
    if "optimizer" not in config:
        return []
    block = config["optimizer"] or {}
    name, params = block.get("type", "unnamed"), block.get("params") or {}
    if "type" in block and str(name).lower() not in _STOCK_TYPES:
        raise ValueError(f"{_WOULD_REPLACE.format(name)}, by another algorithm: remove it.")
    for key, value in params.items():
        known = {**_STOCK_VALUES, **values}
        if value != "auto" and key not in _HOW_IT_STEPS and not (key in known and _same(value, known[key])):
            elsewhere = f", elsewhere {known[key]!r}" if key in known else ""
            raise ValueError(
                f"{_WOULD_REPLACE.format(name)}, and says something else than was asked for "
                f'({key}={value!r}{elsewhere}): remove it, or set its values to "auto".'
            )
    # With the block there the Trainer makes a DummyOptim and never asks what --optim says (transformers 5.23,
    # integrations/deepspeed.py, deepspeed_optim_sched).
    del config["optimizer"]
    return [f'the "optimizer" block ({name}), which asks for nothing of its own, is left out']


def _same(given: Any, asked: Any) -> bool:
    if isinstance(asked, (list, tuple)):
        return isinstance(given, (list, tuple)) and list(map(float, given)) == list(map(float, asked))
    if isinstance(asked, bool) or isinstance(given, (list, tuple, dict)):
        return bool(given == asked)
    try:
        return float(given) == float(asked)
    except (TypeError, ValueError):
        return False


def _step_on_the_cpu(config: dict[str, Any]) -> list[str]:
    if _offload_device(_zero(config)) == "none" or "zero_force_ds_cpu_optimizer" in config:
        return []
    # Where the key is missing accelerate takes it for true and puts DeepSpeedCPUAdam in the place of the optimizer
    # (1.15, accelerator.py, _prepare_deepspeed).
    config["zero_force_ds_cpu_optimizer"] = False
    return ['"zero_force_ds_cpu_optimizer": false is added, for "offload_optimizer"']


def _keep_the_order(config: dict[str, Any]) -> list[str]:
    zero = _zero(config)
    if not zero.get("round_robin_gradients") or zero.get("stage") not in _STAGES_WITH_AN_ORDER:
        return []
    config["zero_optimization"]["round_robin_gradients"] = False
    return ['"round_robin_gradients" is turned off (an order of copying, no other result)']


_STAGES_WITH_AN_ORDER = (1, 2)  # ZeRO-3 does not read the setting (deepspeed 0.19.8)


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    zero = config.get("zero_optimization") or {}
    return {"stage": 1} if zero is True else zero


def zero_stage(config: Mapping[str, Any]) -> int:
    """The stage of ZeRO that a configuration asks for."""
    return int(_zero(config).get("stage", 0))


def _offload_device(zero: Mapping[str, Any]) -> str:
    """Where the optimizer's states are offloaded to; `cpu_offload` is how it was asked for formerly."""
    if zero.get("offload_optimizer"):
        return str(zero["offload_optimizer"].get("device", "none"))
    return "cpu" if zero.get("cpu_offload") else "none"


def refuse_swap_in_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that replaces the optimizer, or that takes tensors out of its sight. Changes nothing.

    Raises:
        ValueError: Naming the block or the setting.
    """
    if "optimizer" in config:
        name = (config["optimizer"] or {}).get("type", "unnamed")
        raise ValueError(f"{_WOULD_REPLACE.format(name)} without a word: remove it.")
    zero = _zero(config)
    if _offload_device(zero) != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            'With "offload_optimizer" and "zero_force_ds_cpu_optimizer" (true by default) DeepSpeedCPUAdam would '
            'replace the optimizer of hf_tam: set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration.'
        )
    for refused in (*_refused_in_zero(zero), *_refused_outside(config, zero)):
        if refused.found:
            raise ValueError(
                f'"{refused.setting}" in the DeepSpeed configuration does not go with an optimizer of hf_tam: '
                f"{refused.reason}. {refused.remedy}"
            )


class _Refused(NamedTuple):
    """A setting that is refused where it is found."""

    setting: str
    found: bool
    reason: str
    remedy: str = "Remove it."


def _refused_in_zero(zero: Mapping[str, Any]) -> list[_Refused]:
    offload, offload_param = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    return [
        _Refused("offload_optimizer.ratio", offload.get("ratio", 1) != 1,
                 "what is not offloaded would be stepped by torch.optim.AdamW", "Set it to 1."),
        _Refused("offload_optimizer.super_offload", bool(offload.get("super_offload")),
                 "it steps with its own CPU Adam"),
        _Refused("offload_optimizer.device: nvme", offload.get("device") == "nvme",
                 "only states as large as the parameters are swapped, not those with one number a tensor",
                 'Use "device": "cpu".'),
        _Refused("offload_param.device: nvme", offload_param.get("device") == "nvme",
                 "parameters that lie on a disk cannot be compared with DeepSpeed's map of the partitions",
                 'Use "device": "cpu".'),
        _Refused("zenflow", bool(zero.get("zenflow")), "it steps with its own CPU Adam"),
        _Refused("elastic_checkpoint", bool(zero.get("elastic_checkpoint")),
                 "it cuts the end off every state vector",
                 "Remove it; a universal checkpoint changes the number of ranks."),
        _Refused("round_robin_gradients",
                 bool(zero.get("round_robin_gradients")) and zero.get("stage") in _STAGES_WITH_AN_ORDER,
                 "DeepSpeed's map of the partitions is wrong with it (seen in 0.19.8)"),
        _Refused("mics_shard_size", zero.get("mics_shard_size", -1) > 0, "replicas of shards are not supported"),
    ]  # fmt: skip


def _refused_outside(config: Mapping[str, Any], zero: Mapping[str, Any]) -> list[_Refused]:
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 1)
    half = [name for name in ("fp16", "bf16", "bfloat16") if (config.get(name) or {}).get("enabled") is True]
    compiled = config.get("compile") or {}
    sharded = zero.get("stage", 0) != 0
    parallel = {"autotp", "autosp"} & set(compiled.get("passes") or ())
    return [
        _Refused("tensor_parallel.autotp_size", tensor_parallel not in (0, 1),
                 "a tensor's parts on the other tensor-parallel ranks cannot be seen", "Use accelerate's tp_size."),
        _Refused(f"compile.passes: {', '.join(sorted(parallel))}", bool(parallel),
                 "the compiler cuts tensors or gradients in its own graph, and leaves no map of it"),
        _Refused("compile.offload_opt_states", bool(compiled.get("offload_opt_states")),
                 "the compiled step moves states that it knows by the names of Adam's"),
        _Refused("expert_parallel", bool((config.get("expert_parallel") or {}).get("enabled")),
                 "DeepSpeed's AutoEP replaces the experts after the optimizer was built, by parts of them",
                 "Use transformers' own expert parallelism."),
        _Refused("sequence_parallel_size", config.get("sequence_parallel_size", 1) > 1 and sharded,
                 "ZeRO then cuts tensors over the ranks of one sequence only",
                 "Use accelerate's ParallelismConfig(sp_backend='deepspeed'), with which it takes all ranks."),
        _Refused("hybrid_engine", bool((config.get("hybrid_engine") or {}).get("enabled")),
                 "its inference containers take the weights over between two steps"),
        _Refused("weight_quantization", bool(config.get("weight_quantization")),
                 "quantised weights have no values to be stepped"),
        _Refused(f"{''.join(half[:1])} without ZeRO", bool(half) and not sharded,
                 "DeepSpeed would step copies that cannot be told from parts of a tensor",
                 'Set "zero_optimization": {"stage": 1} or more.'),
    ]  # fmt: skip
