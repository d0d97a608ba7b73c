"""What a run would do and how much memory it would take, told without loading weights or writing anything."""

import dataclasses
import math
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import TaskType, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from recipes.support import adapters, causal_demo, models, narrow_weights, parallel, reporting
from recipes.support.arguments import DEMO, LmModelArguments
from recipes.support.errors import RecipeError

# bitsandbytes: half a byte a number, and for each block of 64 an fp32 scale, or with double quantisation a byte and,
# for each 256 of these, an fp32 scale of scales.
_BYTES_OF_4_BITS = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
# DeepSpeed trains 16-bit weights beside a copy in fp32.
_BYTES_OF_A_MASTER_COPY = 4
_SAMPLE_SHAPE = (64, 128)

_PLAIN = (bool, int, float, str, list)
_NOT_REPEATED = ("config", "dry_run", "gradient_checkpointing")  # the last is an alias


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one process holds between steps."""

    weights: float
    gradients: float
    states: float | None  # unknown for an optimizer that cannot be tried out by itself


def report(groups: tuple[Any, ...]) -> int:
    """Print the arguments that differ from their defaults, the numbers of parameters, and the memory.

    Args:
        groups: the arguments of the run: run, model, data and training.

    Returns:
        The exit status, 0.

    Raises:
        RecipeError: there is no such model, or the adapter does not fit it.
    """
    _, model_arguments, _, arguments = groups
    narrow_weights.keep_steps(groups)
    accelerator = Accelerator(cpu=arguments.use_cpu, deepspeed_plugin=arguments.deepspeed_plugin)
    model = build_on_meta(model_arguments)
    if not accelerator.is_main_process:
        return 0
    for group in groups:
        print(f"# {type(group).__name__}\n{_as_yaml(group)}", end="")
    trained, total = models.count_parameters(model)
    memory = estimate(model, model_arguments, arguments, accelerator)
    rows = {
        "strategy": parallel.describe_strategy(accelerator),
        "trained_parameters": f"{trained:,} of {total:,} ({trained / total:.2%})",
        "weights": _in_words(memory.weights),
        "gradients": _in_words(memory.gradients),
        "optimizer_states": _in_words(memory.states),
        "together": _in_words(None if memory.states is None else memory.weights + memory.gradients + memory.states),
    }
    reporting.print_table("memory a process, without activations (nothing was written)", rows)
    return 0


def build_on_meta(arguments: LmModelArguments) -> Any:
    """Return the model with its adapter and without any weights, from its configuration alone."""
    config = causal_demo.describe_base() if arguments.model_name_or_path == DEMO else models.load_config(arguments)
    dtype = getattr(config, "dtype", None) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
            if not arguments.use_peft:
                return model
            return get_peft_model(model, adapters.make_config(model, arguments, TaskType.CAUSAL_LM))
    except ValueError as error:
        raise RecipeError(f"model '{arguments.model_name_or_path}': {' '.join(str(error).split())}") from error


def estimate(
    model: torch.nn.Module, of_model: LmModelArguments, arguments: TrainingArguments, accelerator: Accelerator
) -> Memory:
    """Return the memory of one process: what the strategy does not cut, every process holds."""
    weights = gradients = 0.0
    states: float | None = 0.0
    quantized = _quantized(model) if of_model.load_in_4bit else set()
    is_mixed_zero = accelerator.distributed_type == DistributedType.DEEPSPEED and (arguments.bf16 or arguments.fp16)
    for param in model.parameters():
        size = 2 if is_mixed_zero else param.element_size()
        is_small = id(param) in quantized
        weights += param.numel() * (_BYTES_OF_4_BITS[of_model.use_bnb_nested_quant] if is_small else size)
        if param.requires_grad:
            gradients += param.numel() * size
            each = states_per_number(arguments, torch.float32 if is_mixed_zero else param.dtype)
            master = _BYTES_OF_A_MASTER_COPY if is_mixed_zero else 0
            states = None if states is None or each is None else states + param.numel() * (each + master)
    of_weights, of_gradients, of_states = parallel.num_pieces(accelerator)
    return Memory(weights / of_weights, gradients / of_gradients, None if states is None else states / of_states)


_measured: dict[tuple[str, str | None, torch.dtype], float | None] = {}


def states_per_number(arguments: TrainingArguments, dtype: torch.dtype) -> float | None:
    """Return the bytes of state that `--optim` keeps for each number of a matrix, found out by a step on a small one.

    Returns:
        None where the optimizer cannot be tried out by itself, because it needs the model or is not installed.
    """
    key = (str(arguments.optim), arguments.optim_args, dtype)
    if key not in _measured:
        try:
            _measured[key] = _try_out(arguments, dtype)
        except Exception:  # whatever an optimizer raises that wants a model, a GPU or a package
            _measured[key] = None
    return _measured[key]


def _try_out(arguments: TrainingArguments, dtype: torch.dtype) -> float:
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments)
    param = torch.nn.Parameter(torch.ones(_SAMPLE_SHAPE, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = optimizer_class([param], **kwargs)
    optimizer.step()
    held = [value for value in optimizer.state[param].values() if torch.is_tensor(value) and value.dim()]
    return sum(value.numel() * value.element_size() for value in held) / math.prod(_SAMPLE_SHAPE)


def _quantized(model: Any) -> set[int]:
    """Return the ids of the weights that bitsandbytes would hold in 4 bits: those of frozen linear layers."""
    output = model.get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not output)
    return {id(layer.weight) for layer in layers if not layer.weight.requires_grad}


def _as_yaml(group: Any) -> str:
    """Write a group so that it can be given as `--config`."""
    settings = {name: getattr(value, "value", value) for name, value in reporting.changed_settings(group).items()}
    kept = {
        name: value
        for name, value in settings.items()
        if isinstance(value, _PLAIN) and value != [] and name not in _NOT_REPEATED
    }
    return yaml.safe_dump(kept, sort_keys=False)


def _in_words(size: float | None) -> str:
    if size is None:
        return "unknown for this optimizer"
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
