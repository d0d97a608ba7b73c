"""Models and tokenizers by name, and the adapter on top."""

from pathlib import Path
from typing import Any

import torch
from peft import TaskType, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_tam.integrations.peft import find_wrapped_adapters
from recipes.support import adapters, quantization
from recipes.support.arguments import ModelArguments
from recipes.support.errors import RecipeError


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; padding falls to the end-of-text token where it has none of its own.

    Raises:
        RecipeError: no model was named, or it is neither a folder nor to be had from the hub.
    """
    if not arguments.model_name_or_path:
        raise RecipeError(
            "no model: data was named, so the demo model does not step in."
            " Give --model_name_or_path FOLDER_OR_NAME ('demo' asks for the demo model)."
        )
    tokenizer = _load(AutoTokenizer, arguments)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Load the configuration of a model.

    Raises:
        RecipeError: it is neither a folder nor to be had from the hub.
    """
    return _load(AutoConfig, arguments)


def load_model(
    auto_class: Any,
    arguments: ModelArguments,
    *,
    config: PreTrainedConfig | None = None,
    new_head: bool = False,
    tp_size: int = 1,
    quantize: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load a model by one of transformers' Auto classes.

    Args:
        auto_class: for example AutoModelForCausalLM.
        arguments: the name, revision, dtype and attention.
        config: the model's configuration, where it is not to be the one it was saved with.
        new_head: whether weights whose shape `config` alters start afresh, which transformers lists in a warning.
        tp_size: over how many processes the weights are cut; each loads its own part.
        quantize: whether 4 or 8 bits are taken where `arguments` ask for them.
        options: what `from_pretrained` takes besides.

    Raises:
        RecipeError: it is neither a folder nor to be had from the hub, or cannot be quantised.
    """
    if config is not None:
        options["config"] = config
    if tp_size > 1:
        from transformers import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=tp_size)
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype or "float32")
    if quantize and quantization.is_asked_for(arguments):
        computed = getattr(load_config(arguments), "dtype", None) if dtype == "auto" else dtype
        options |= quantization.load_options(arguments, computed or torch.float32, tp_size=tp_size)
    model = _load(auto_class, arguments, dtype=dtype, ignore_mismatched_sizes=new_head, **options)
    quantization.keep_layout(model)
    return model


def add_adapter(model: PreTrainedModel, arguments: ModelArguments, task: TaskType | None) -> Any:
    """Put a new LoRA adapter on `model`, or return it as it is where every weight is trained.

    Raises:
        RecipeError: the model has no layer of the names given, or is not quantised although that was asked for.
    """
    if not arguments.use_peft:
        return model
    if quantization.is_asked_for(arguments) and not quantization.is_quantized(model):
        raise RecipeError("load_in_4bit: this recipe does not load its model in 4 bits: drop it.")
    find_wrapped_adapters()
    config = adapters.make_config(model, arguments, task)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(_of_targets(arguments, " ".join(str(error).split()))) from error


def require_weights(folder: Path) -> None:
    """Check, where an adapter was saved to `folder`, that it is not empty.

    Raises:
        RecipeError: the file holds no weights.
    """
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise RecipeError(f"{path} was saved without any weights: take those of the last checkpoint.")


def parameter_size(parameter: torch.Tensor) -> int:
    """Return how many numbers a parameter has.

    ZeRO-3 leaves an empty tensor in its place and notes the size; one byte of bitsandbytes holds two numbers.
    """
    if hasattr(parameter, "quant_storage"):
        return 2 * parameter.numel() * parameter.element_size()
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; before FSDP1 cuts the model."""
    sizes = [(parameter_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _of_targets(arguments: ModelArguments, reason: str) -> str:
    """Put the flag before peft's reason, which names a parameter or its wrapper where it is of parameters (0.21)."""
    if arguments.lora_target_parameters and "Param" in reason:
        named = " ".join(arguments.lora_target_parameters)
        return (
            f"lora_target_parameters = {named}: {reason} (the weight of a layer is adapted by"
            " --lora_target_modules; other parameters with --lora_dropout 0 and without --use_dora)"
        )
    return (
        f"lora_target_modules = {arguments.lora_target_modules}: {reason}"
        f" ({adapters.ALL_LINEAR}: every linear layer but the output layer)"
    )


def _load(auto_class: Any, arguments: ModelArguments, **kwargs: Any) -> Any:
    name = arguments.model_name_or_path
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())  # the adapter names its base, and must find it from any folder
    try:
        return auto_class.from_pretrained(name, revision=arguments.model_revision, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"model '{name}' cannot be loaded: {reason} Without a network, give the folder of a downloaded model."
        ) from error
