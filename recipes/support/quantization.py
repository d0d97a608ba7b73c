"""Frozen weights in 4 bits (QLoRA), by bitsandbytes."""

import importlib.util
import os
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from recipes.support.arguments import LoraArguments
from recipes.support.errors import RecipeError


def load_options(arguments: LoraArguments, dtype: torch.dtype, *, tp_size: int) -> dict[str, Any]:
    """Return what `from_pretrained` takes besides, so that the linear layers but the output layer become 4 bits.

    Args:
        arguments: the kind of 4 bits.
        dtype: of what is not quantised, and in which the layers compute.
        tp_size: over how many processes the weights are cut.

    Raises:
        RecipeError: bitsandbytes is not installed, or the launch cuts weights, which those of 4 bits cannot be.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("load_in_4bit needs bitsandbytes: pip install 'hf-tam[quantization]'.")
    if strategy := _cutting_strategy(tp_size):
        raise RecipeError(
            f"load_in_4bit does not work under {strategy}, which cuts the weights: launch with recipes/accelerate/"
            "ddp.yaml, zero1.yaml or zero2.yaml, or drop load_in_4bit."
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


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
    """Whether the frozen weights are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def _cutting_strategy(tp_size: int) -> str | None:
    """Name the strategy by which the launch cuts every weight into pieces, if it does."""
    if tp_size > 1:
        return "tensor parallelism"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "ZeRO-3" if is_deepspeed_zero3_enabled() else None
