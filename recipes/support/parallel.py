"""Models that several processes share: what tensor parallelism asks for, and where no process holds a whole model."""

from importlib.metadata import version

import torch
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from packaging.version import Version
from transformers import PreTrainedConfig

from recipes.support.adapters import is_pattern
from recipes.support.arguments import LmModelArguments
from recipes.support.errors import RecipeError
from recipes.support.reporting import warn

# Adapters on a model that transformers itself cuts: peft/tuners/lora/model.py, get_tp_plan_and_mesh.
_TRANSFORMERS_WITH_TENSOR_PARALLEL_ADAPTERS = Version("5.17.0")


def tensor_parallel_size(arguments: LmModelArguments) -> int:
    """Return how many processes share one model: `--tp_size`, else what the accelerate configuration says, else 1.

    Raises:
        RecipeError: the two differ, or the number of processes is another one.
    """
    configured, num_processes = ParallelismConfig().tp_size, PartialState().num_processes
    size = configured if arguments.tp_size is None else arguments.tp_size
    if size != configured != 1:
        raise RecipeError(f"tp_size is {size} and the accelerate configuration says {configured}: drop one of them.")
    if size not in (1, num_processes):
        raise RecipeError(
            f"tp_size is {size}, but {num_processes} processes run: tensor parallelism of this recipe takes all of"
            f" them (accelerate launch --num_processes {size})."
        )
    return size


def require_tensor_parallel(config: PreTrainedConfig, arguments: LmModelArguments, *, saves_state: bool) -> None:
    """Refuse, before weights are loaded, what cannot work with a model cut by tensor parallelism.

    Args:
        config: of the model.
        arguments: which layers get an adapter.
        saves_state: whether the run writes checkpoints that hold the optimizer.

    Raises:
        RecipeError: with the flag that helps.
    """
    installed = Version(version("transformers"))
    if installed < _TRANSFORMERS_WITH_TENSOR_PARALLEL_ADAPTERS:
        raise RecipeError(
            f"tensor parallelism needs transformers {_TRANSFORMERS_WITH_TENSOR_PARALLEL_ADAPTERS} or later,"
            f" this is {installed}."
        )
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise RecipeError(
            f"transformers has no tensor-parallel plan for a {config.model_type} model: launch with"
            " recipes/accelerate/fsdp2.yaml."
        )
    if saves_state:
        raise RecipeError(
            "under tensor parallelism the optimizer cannot be saved, so a run cannot be continued: give"
            " --save_strategy no (the result is saved all the same)."
        )
    if arguments.use_peft:
        if is_pattern(arguments.lora_target_modules):
            raise RecipeError("lora_target_modules: under tensor parallelism give names, not a regular expression.")
        _require_column_wise(plan, arguments.lora_target_modules)


def _require_column_wise(plan: dict[str, str], targets: list[str] | str | None) -> None:
    """Refuse adapters on layers cut by rows: their gradient is wrong in shape (peft 0.21, transformers 5.23)."""
    styles = {name.rsplit(".", 1)[-1]: style for name, style in plan.items()}
    if targets is None:
        return  # peft's choice, attention alone in the models it knows
    names = [targets] if isinstance(targets, str) else targets
    named = list(styles) if names == ["all-linear"] else [target.rsplit(".", 1)[-1] for target in names]
    refused = [name for name in named if styles.get(name, "colwise") != "colwise"]
    if refused:
        possible = " ".join(name for name, style in styles.items() if style == "colwise")
        raise RecipeError(
            f"lora_target_modules = {' '.join(names)}: under tensor parallelism there can be no adapter on"
            f" {', '.join(refused)}, whose weights are not cut by columns: give --lora_target_modules {possible}"
        )


def describe_strategy(accelerator: Accelerator) -> str:
    """Name how the processes share the work, as the table of docs/strategies.md does."""
    kind, num_processes = accelerator.distributed_type, accelerator.num_processes
    if kind == DistributedType.DEEPSPEED:
        name = f"ZeRO-{_zero_stage(accelerator)}"
    elif is_tensor_parallel(accelerator):
        name = "tensor parallelism"
    elif kind == DistributedType.FSDP:
        config = accelerator.parallelism_config
        replicated = config is not None and config.dp_replicate_enabled
        name = "HSDP" if replicated else f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}"
    elif num_processes > 1:
        name = "DDP"
    else:
        return "single process"
    return f"{name}, {num_processes} processes"


def is_tensor_parallel(accelerator: Accelerator) -> bool:
    """Whether the processes share every layer, and so see the same batches."""
    config = accelerator.parallelism_config
    return config is not None and config.tp_enabled


def is_whole(accelerator: Accelerator) -> bool:
    """Whether every process holds a whole model outside of a forward pass; not so under FSDP and ZeRO-3."""
    return accelerator.distributed_type != DistributedType.FSDP and _zero_stage(accelerator) != 3


def num_pieces(accelerator: Accelerator) -> tuple[int, int, int]:
    """Return into how many pieces weights, gradients and optimizer states are cut, of which a process holds one."""
    kind, count = accelerator.distributed_type, accelerator.num_processes
    if kind == DistributedType.DEEPSPEED:
        stage = _zero_stage(accelerator)
        return (count if stage >= 3 else 1), (count if stage >= 2 else 1), (count if stage >= 1 else 1)
    config = accelerator.parallelism_config
    if is_tensor_parallel(accelerator):
        return (config.tp_size,) * 3
    if kind == DistributedType.FSDP:
        return (config.dp_shard_size if config is not None and config.dp_replicate_enabled else count,) * 3
    return 1, 1, 1


def leave_group(accelerator: Accelerator) -> None:
    """End the trackers and the process group, whose threads must not outlive the interpreter.

    Call it once every process has done its last collective. No communication by itself.
    """
    accelerator.end_training()


def num_sample_generations(accelerator: Accelerator, wanted: int) -> int:
    """Return `wanted`, or 0 with a notice where no process could generate by itself."""
    if wanted and not is_whole(accelerator):
        warn(
            f"no sample generations under {describe_strategy(accelerator)}: no process holds the whole model."
            " Load the adapter afterwards to see what it says (recipes/README.md)"
        )
        return 0
    return wanted


def keep_all_copies(accelerator: Accelerator) -> None:
    """Have `gather_for_metrics` keep all that was gathered, where every process evaluates every record.

    So under tensor parallelism each record counts as often as any other. accelerate would take the copies for padding
    and cut them off, in the last batch only (1.15).
    """
    if is_tensor_parallel(accelerator):
        accelerator.gather_for_metrics = accelerator.gather


def leave_embeddings_apart(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Have FSDP2 make units of the layers, and not of what holds the input embeddings, which become one by themselves.

    Of a unit that holds them accelerate (1.14, 1.15, `fsdp2_prepare_model`) would cut the embeddings twice, and fail:
    that is so wherever transformers counts a class like BertEmbeddings among those that are not to be split.
    """
    plugin = accelerator.state.fsdp_plugin
    names = set(getattr(model, "_no_split_modules", None) or ())
    if plugin.fsdp_version != 2 or plugin.transformer_cls_names_to_wrap is not None or not names:
        return
    embeddings = model.get_input_embeddings()
    holders = {type(part).__name__ for part in model.modules() if any(each is embeddings for each in part.modules())}
    present = {type(part).__name__ for part in model.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(names & present - holders)


def _zero_stage(accelerator: Accelerator) -> int:
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)
