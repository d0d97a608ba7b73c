"""Where a new adapter starts, by peft, and how one that took a part of the base with it is saved for the base alone.

Sources: PiSSA (https://huggingface.co/papers/2404.02948), OLoRA (https://huggingface.co/papers/2406.01775), EVA
(https://huggingface.co/papers/2410.07170), LoftQ (https://huggingface.co/papers/2310.08659).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, initialize_lora_eva_weights, replace_lora_weights_loftq
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from recipes.support import parallel, quantization
from recipes.support.arguments import LmModelArguments
from recipes.support.errors import RecipeError

INITIAL_NAME = "initial_adapter"
# EVA looks at what goes into each layer, for so many batches at most.
_NUM_BATCHES = 8


def check(arguments: LmModelArguments) -> None:
    """Refuse what cannot start like that.

    Raises:
        RecipeError: LoftQ without weights of 4 bits, or PiSSA and OLoRA with them, or with DoRA.
    """
    start = arguments.init_lora_weights
    if start == "loftq" and not arguments.load_in_4bit:
        raise RecipeError(
            "init_lora_weights = loftq mends what 4 bits round off: add --load_in_4bit, or take another."
        )
    if start == "loftq" and not torch.cuda.is_available():
        raise RecipeError("init_lora_weights = loftq: peft computes it on a GPU, and there is none: take another.")
    if takes_from_the_base(start) and quantization.is_asked_for(arguments):
        raise RecipeError(
            f"init_lora_weights = {start} changes the base, which quantised weights do not take: drop one."
        )
    if takes_from_the_base(start) and arguments.use_dora:
        raise RecipeError(
            f"init_lora_weights = {start}: with use_dora no adapter for the base as it was says the same: drop one."
        )


def takes_from_the_base(start: str | None) -> bool:
    """Whether what the adapter starts with is taken out of the weights below it."""
    return start is not None and start.startswith(("pissa", "olora"))


def is_converted(arguments: LmModelArguments) -> bool:
    """Whether the adapter is a new one that took a part of the base, and is saved for the base as it was."""
    return takes_from_the_base(arguments.init_lora_weights) and arguments.adapter_name_or_path is None


@contextmanager
def as_it_is(model: Any) -> Iterator[None]:
    """Let an adapter be added beside that of `model`, by the same configuration, without changing the base again."""
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, str):
        yield
        return
    config.init_lora_weights = True
    try:
        yield
    finally:
        config.init_lora_weights = start


def begin(trainer: Any, arguments: LmModelArguments, *, resumes: bool) -> None:
    """Give the adapter of `trainer` its start, which peft had no data or no weights for before.

    Of one that took a part of the base, what it started with is written to output_dir/initial_adapter.

    No communication: every process looks at the same records.

    Raises:
        RecipeError: the launch cuts the weights, of which no process could tell what the adapter started with.
    """
    start, model = arguments.init_lora_weights, trainer.model
    if not isinstance(model, PeftModel) or arguments.adapter_name_or_path:
        return
    if takes_from_the_base(start):
        if not parallel.is_whole(trainer.accelerator) or parallel.is_tensor_parallel(trainer.accelerator):
            raise RecipeError(
                f"init_lora_weights = {start}: where weights are cut it cannot be saved for the base alone: launch"
                " with recipes/accelerate/ddp.yaml or zero2.yaml, or drop it."
            )
        folder = Path(trainer.args.output_dir) / INITIAL_NAME
        if trainer.is_world_process_zero() and not (resumes and folder.is_dir()):
            model.save_pretrained(folder, selected_adapters=["default"])
    elif start == "loftq" and not resumes:
        base = arguments.model_name_or_path
        replace_lora_weights_loftq(model, base if base and Path(base).is_dir() else None)
    elif start == "eva" and not resumes:
        initialize_lora_eva_weights(
            model, dataloader=_inputs(trainer), gather_distributed_inputs=False, show_progress_bar=False
        )


def save_for_the_base_alone(trainer: Any, arguments: LmModelArguments) -> None:
    """Write the adapter as the difference to its start, of twice the rank, which goes on the base as it was.

    On one process, after the model was saved. peft (0.21) writes the matrices alone, without the modules that were
    trained whole: https://github.com/huggingface/peft/pull/1828.
    """
    if not is_converted(arguments):
        return
    output_dir = Path(trainer.args.output_dir)
    path = output_dir / SAFETENSORS_WEIGHTS_NAME
    whole = {name: weight for name, weight in load_file(path).items() if "lora_" not in name}
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(output_dir, path_initial_model_for_weight_conversion=str(output_dir / INITIAL_NAME))
    if whole:
        save_file({**whole, **load_file(path)}, path, metadata={"format": "pt"})


def _inputs(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Return what the model takes of the first records, on its device."""
    size = trainer.args.per_device_train_batch_size
    rows = trainer.train_dataset.select(range(min(_NUM_BATCHES * size, len(trainer.train_dataset))))
    device = trainer.accelerator.device
    return [
        {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
        for batch in DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator)
    ]
