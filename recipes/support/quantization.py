"""Frozen weights in 4 or 8 bits (QLoRA), by bitsandbytes."""

import dataclasses
import importlib.util
import os
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import get_quantization_config

from recipes.support.arguments import ModelArguments
from recipes.support.errors import RecipeError


def is_asked_for(arguments: ModelArguments) -> bool:
    """Whether the frozen weights are to be in 4 or 8 bits."""
    return arguments.load_in_4bit or arguments.load_in_8bit


def load_options(arguments: ModelArguments, dtype: torch.dtype, *, tp_size: int) -> dict[str, Any]:
    """Return what `from_pretrained` takes besides, so that the linear layers but the output layer are quantised.

    FSDP cuts tensors of floats alone: there the 4-bit weights are kept in tensors of `dtype`.

    Args:
        arguments: the kind of 4 bits.
        dtype: of what is not quantised, and in which the layers compute.
        tp_size: over how many processes the weights are cut.

    Raises:
        RecipeError: bitsandbytes is not installed, or the launch cuts weights in a way that quantised ones cannot be.
    """
    flag = "load_in_4bit" if arguments.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{flag} needs bitsandbytes: pip install 'hf-tam[quantization]'.")
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if strategy := _strategy_that_cannot(arguments, tp_size, is_fsdp=is_fsdp):
        raise RecipeError(
            f"{flag} does not work under {strategy}: launch with recipes/accelerate/ddp.yaml, zero2.yaml or, for 4"
            f" bits, fsdp2.yaml, or drop {flag}."
        )
    storage = arguments.bnb_4bit_quant_storage or (str(dtype).removeprefix("torch.") if is_fsdp else None)
    config = get_quantization_config(dataclasses.replace(arguments, bnb_4bit_quant_storage=storage))
    if arguments.load_in_4bit:
        config.bnb_4bit_compute_dtype = dtype
    # FSDP cuts the weights, and moves its pieces itself.
    return {"quantization_config": config} | ({} if is_fsdp else {"device_map": {"": PartialState().device}})


def keep_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of a model on a CPU at its first evaluation.

    Where the CPU has AVX512-BF16, bitsandbytes 0.50 does so for faster inference. The packed weights have other values
    (scales in bf16, no double quantisation), give no gradient to the layers below when training goes on, and cannot be
    made at all where a layer's width is no multiple of the block size.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the frozen weights are in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _strategy_that_cannot(arguments: ModelArguments, tp_size: int, *, is_fsdp: bool) -> str | None:
    """Name the strategy by which the launch cuts the weights, if bitsandbytes' cannot be cut like that.

    bitsandbytes documents FSDP for 4 bits alone; DeepSpeed has no parameters of its kinds in ZeRO-3 (0.19), where
    transformers loads and cuts each weight before it would be quantised.
    """
    if tp_size > 1:
        return "tensor parallelism"
    if is_fsdp and not arguments.load_in_4bit:
        return "FSDP"
    return "ZeRO-3" if is_deepspeed_zero3_enabled() else None
