"""What a classifier leaves behind: a folder that transformers and peft load, with the names of its classes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from recipes.support import merging, training
from recipes.support.output import naming_a_full_disk

_TEXTS = ("The", "In the morning the", "1, 2, 3,")


def save(trainer: Trainer) -> None:
    """Save model or adapter, and beside an adapter the configuration, which alone knows the classes.

    Communication: that of `training.save_model`.
    """
    training.save_model(trainer)
    if trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).config.save_pretrained(trainer.args.output_dir)


def complete(output_dir: Path, auto_class: Any, *, merge: bool) -> int:
    """Put the base beside its adapter, and on request make one model of the two, as output_dir/merged.

    With the base beside it the adapter is all that `from_pretrained` and `pipeline` need: by its own name the base
    would come with a head of two nameless classes, which does not fit. Runs on one process.

    Args:
        output_dir: of a run that is finished; what holds no adapter is left as it is.
        auto_class: for example AutoModelForSequenceClassification.
        merge: whether to merge.

    Returns:
        The exit status, 0.

    Raises:
        RecipeError: the disk is full, or the merged model does not give the same logits.
    """
    if not (output_dir / "adapter_config.json").is_file():
        return 0
    unset_hf_deepspeed_config()  # else every process would have to load its part
    with _no_loading_report():
        base = _load_base(output_dir, auto_class)
        with naming_a_full_disk(output_dir):
            base.save_pretrained(output_dir)
        if merge:
            _merge(output_dir, auto_class, base)
    return 0


def _load_base(output_dir: Path, auto_class: Any) -> Any:
    """Load the base by the adapter's own word for where it is, with the run's configuration, in 4 bits if it was."""
    adapter, config = PeftConfig.from_pretrained(output_dir), AutoConfig.from_pretrained(output_dir)
    return auto_class.from_pretrained(
        adapter.base_model_name_or_path,
        revision=adapter.revision,
        config=config,
        dtype=config.dtype,
        ignore_mismatched_sizes=True,
    )


def _merge(output_dir: Path, auto_class: Any, base: Any) -> None:
    processor, inputs = _examples(output_dir, auto_class)

    def logits_of(model: Any) -> list[torch.Tensor]:
        model.eval()
        device = next(model.parameters()).device
        with torch.no_grad():
            return [model(**batch.to(device)).logits.float().cpu() for batch in inputs]

    expected = logits_of(PeftModel.from_pretrained(base, output_dir))
    whole = _load_base(output_dir, auto_class)
    if getattr(whole, "is_quantized", False):
        whole = whole.dequantize()
    merged = PeftModel.from_pretrained(whole, output_dir).merge_and_unload(safe_merge=True)
    merging.save_checked(merged, processor, output_dir, auto_class, logits_of, expected)


def _examples(folder: Path, auto_class: Any) -> tuple[Any, list[Any]]:
    """Return what prepares the model's inputs, and a few of those: texts, or images of noise."""
    if auto_class is not AutoModelForImageClassification:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer, [tokenizer(text, return_tensors="pt") for text in _TEXTS]
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (len(_TEXTS), 64, 64, 3), dtype=np.uint8)
    return processor, [processor(images=Image.fromarray(image), return_tensors="pt") for image in pixels]


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Leave out that the base lacks the head, which the adapter brings."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
