"""An adapter and its base as one model, which must say what the two say together."""

import argparse
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import GENERATION_CONFIG_NAME

from recipes.support import models, quantization, reporting
from recipes.support.arguments import LmModelArguments, SftRunArguments
from recipes.support.checkpoints import wants_resume
from recipes.support.errors import RecipeError
from recipes.support.output import RESULTS_NAME, naming_a_full_disk

MERGED_NAME = "merged"
# How far a logit may be off, as a share of the largest: the sum of base and adapter is rounded to the base's type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_TEXTS = ("The", "In the morning the", "1, 2, 3,")


def is_finished(output_dir: Path) -> bool:
    """Whether `output_dir` holds the adapter of a run that came to its end."""
    return all((output_dir / name).is_file() for name in ("adapter_config.json", RESULTS_NAME))


def names_finished_run(argv: list[str]) -> bool:
    """Whether `argv` asks to merge, and its output_dir holds a finished run: then the demo does not step in.

    Raises:
        RecipeError: it asks for nothing else, and there is no finished run.
    """
    found, others = _scan(argv)
    if not (found.merge.lower() in ("true", "1", "yes") and found.output_dir):
        return False
    if is_finished(Path(found.output_dir)):
        return True
    if others:
        return False
    raise RecipeError(
        f"merge: there is no finished run in {found.output_dir}; name the output_dir of one, or a model and data to"
        " train on before."
    )


def _scan(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scanner.add_argument("--merge", nargs="?", const="true", default="false")
    scanner.add_argument("--output_dir", "--output-dir")
    return scanner.parse_known_args(argv)


def is_all_to_do(run: SftRunArguments, model: LmModelArguments, arguments: Any) -> bool:
    """Whether the run is finished and only to be merged: nobody asked to repeat or to continue it.

    Raises:
        RecipeError: there is no adapter to merge.
    """
    wanted = run.overwrite or wants_resume(arguments.resume_from_checkpoint)
    if run.merge and not wanted and is_finished(Path(arguments.output_dir)):
        return True
    if run.merge and not model.has_adapter:
        raise RecipeError("merge: without use_peft the result is one model already: drop merge.")
    return False


def merge(output_dir: Path) -> int:
    """Merge the adapter in `output_dir` into its base, as output_dir/merged, which appears whole or not at all.

    A base in 4 bits is brought back to the type in which its layers compute: the result is the model that was
    trained, not the original base with the adapter. Runs on one process.

    Returns:
        The exit status, 0.

    Raises:
        RecipeError: base or adapter cannot be loaded, or the result does not give the same logits.
    """
    unset_hf_deepspeed_config()  # else every process would have to load its part
    model_arguments, options = _arguments_of_the_run(output_dir)
    load = functools.partial(models.load_model, AutoModelForCausalLM, model_arguments, **options)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    base = load(quantize=True)
    expected = logits(PeftModel.from_pretrained(base, output_dir), tokenizer)
    if quantization.is_quantized(base):
        base = load(quantize=True).dequantize()
    else:
        base = load()
    merged = PeftModel.from_pretrained(base, output_dir).merge_and_unload(safe_merge=True)
    if (output_dir / GENERATION_CONFIG_NAME).is_file():
        merged.generation_config = GenerationConfig.from_pretrained(output_dir)
    save_checked(merged, tokenizer, output_dir, AutoModelForCausalLM, lambda model: logits(model, tokenizer), expected)
    return 0


def logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Return what a model makes of a few texts."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = [tokenizer(text, return_tensors="pt")["input_ids"].to(device) for text in _TEXTS]
        return [model(input_ids=row).logits.float().cpu() for row in rows]


def require_saved(base: Any, output_dir: Path, tokenizer: Any, trained: list[torch.Tensor]) -> None:
    """Load the adapter that was saved anew, on its base, and compare it with what was trained.

    Args:
        base: as it was before.
        output_dir: of the run.
        tokenizer: that of the run.
        trained: the logits of the model that was trained.

    Raises:
        RecipeError: they differ.
    """
    tolerance = TOLERANCE[torch.bfloat16 if quantization.is_quantized(base) else base.dtype]
    difference = _difference(trained, logits(PeftModel.from_pretrained(base, output_dir), tokenizer))
    if not difference <= tolerance:
        raise RecipeError(
            f"the adapter saved to {output_dir} is not what was trained: on its base the logits differ by"
            f" {difference:.2g} of the largest, more than {tolerance:.0e}: do not use it."
        )


def save_checked(
    merged: Any,
    processor: Any,
    output_dir: Path,
    auto_class: Any,
    logits_of: Callable[[Any], list[torch.Tensor]],
    expected: list[torch.Tensor],
) -> None:
    """Save a merged model as output_dir/merged, if what is loaded from there gives the logits of base and adapter.

    Args:
        merged: the model.
        processor: its tokenizer or image processor.
        output_dir: of the run.
        auto_class: loads it.
        logits_of: returns a model's logits for some inputs.
        expected: those of base and adapter.

    Raises:
        RecipeError: the logits differ; nothing is left.
    """
    partial = output_dir / f"{MERGED_NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with naming_a_full_disk(output_dir):
        merged.save_pretrained(partial)
        processor.save_pretrained(partial)
    reloaded = auto_class.from_pretrained(partial, dtype="auto")
    difference = _compare(expected, logits_of(reloaded), TOLERANCE[reloaded.dtype], partial)
    shutil.rmtree(output_dir / MERGED_NAME, ignore_errors=True)
    partial.rename(output_dir / MERGED_NAME)
    reporting.announce(
        f"merged: {output_dir / MERGED_NAME}; on {len(expected)} inputs the logits differ from those of base and"
        f" adapter by {difference:.1e} of the largest at most (allowed: {TOLERANCE[reloaded.dtype]:.0e})"
    )


def _arguments_of_the_run(output_dir: Path) -> tuple[LmModelArguments, dict[str, Any]]:
    """Return how the base was loaded; by the adapter's own word for where it is, which holds from any folder."""
    settings = json.loads((output_dir / RESULTS_NAME).read_text(encoding="utf-8"))["settings"]
    if LmModelArguments.__name__ not in settings:
        raise RecipeError(
            f"merge: the run in {output_dir} was made by an earlier version, whose arguments had other names: merge it"
            " by that version, or by peft's merge_and_unload."
        )
    known = {field.name for field in dataclasses.fields(LmModelArguments)}
    named = {name: value for name, value in settings[LmModelArguments.__name__].items() if name in known}
    named["model_name_or_path"] = PeftConfig.from_pretrained(output_dir).base_model_name_or_path
    options = next((group["model_init_kwargs"] for group in settings.values() if "model_init_kwargs" in group), None)
    return LmModelArguments(**named), options or {}


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float, folder: Path) -> float:
    difference = _difference(expected, found)
    if not difference <= tolerance:
        shutil.rmtree(folder, ignore_errors=True)
        raise RecipeError(
            f"merge: the logits of the merged model differ by {difference:.2g} of the largest, more than"
            f" {tolerance:.0e}: nothing was saved; use base and adapter as they are."
        )
    return difference


def _difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))
