"""Pushing to the hub, by the Trainer, and the model card that goes with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments

from recipes.support import reporting
from recipes.support.arguments import LmModelArguments
from recipes.support.errors import RecipeError

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ what }} of `{{ base }}`, trained on {{ source }} with {{ optimizer }} (`--optim {{ optim }}`).

## Results

| metric | value |
|---|---|
{% for name, value in results.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Training

| setting | value |
|---|---|
{% for name, value in settings.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Versions

{% for name, value in versions.items() -%}
* {{ name }} {{ value }}
{% endfor %}"""


@contextmanager
def naming_the_hub(arguments: TrainingArguments, *, remedy: str) -> Iterator[None]:
    """Name the repository where the hub cannot be reached or refuses.

    Args:
        arguments: say whether anything is pushed, and where to.
        remedy: what to do; a sentence without its first capital.

    Raises:
        RecipeError: pushing was asked for, and failed.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # the errors of huggingface_hub are kinds of these
        if not arguments.push_to_hub or isinstance(error, RecipeError):
            raise
        name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
        raise RecipeError(
            f"push_to_hub: '{name}' cannot be pushed to: {' '.join(str(error).split())[:300]}. To go on: {remedy}."
        ) from error


def use_model_card(trainer: Trainer, write: Callable[[], None]) -> None:
    """Have `trainer` write our card where it would write one of its own, before it pushes."""

    def create_model_card(**kwargs: Any) -> None:
        if trainer.is_world_process_zero():
            write()

    trainer.create_model_card = create_model_card


def write_model_card(
    output_dir: Path, facts: dict[str, Any], metrics: dict[str, float], arguments: tuple[Any, ...], *, source: str
) -> None:
    """Write output_dir/README.md; folders of this machine are named by their last part only.

    Args:
        output_dir: of the run.
        facts: what `reporting.describe_run` returned.
        metrics: of training and evaluation.
        arguments: of the run: run, model, data and training, one group a dataclass.
        source: of the records, as `records.Records` names it.
    """
    _, model, data, training = arguments
    name, is_local = model.model_name_or_path, Path(model.model_name_or_path).is_dir()
    settings = _settings(training) | (_adapter_settings(model) if model.has_adapter else {})
    if getattr(training, "packing", False):
        settings["packing"] = f"rows of {training.max_length} tokens"
    card = ModelCard.from_template(
        ModelCardData(
            base_model=None if is_local else name,
            datasets=[data.dataset_name] if data.dataset_name and "/" in data.dataset_name else None,
            library_name="peft" if model.has_adapter else "transformers",
            pipeline_tag="text-generation",
            tags=["hf-tam", "torque-aware-momentum"] + (["lora"] if model.has_adapter else []),
        ),
        template_str=_TEMPLATE,
        title=(training.hub_model_id or output_dir.absolute().name).split("/")[-1],
        what="A LoRA adapter" if model.has_adapter else "Full fine-tuning",
        base=Path(name).name if is_local else name,
        source=Path(source).name if Path(source).is_file() else source,
        optimizer=facts["optimizer"],
        optim=str(training.optim),
        results=_rounded(metrics),
        settings={**settings, **{key: facts[key] for key in ("strategy", "trained_parameters", "steps")}},
        versions=reporting.versions(),
    )
    card.save(output_dir / "README.md")


def _settings(training: TrainingArguments) -> dict[str, Any]:
    """Return what another run would have to repeat."""
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay")
    names += ("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "seed", "bf16", "fp16")
    settings: dict[str, Any] = {"optim": str(training.optim), "optim_args": training.optim_args or "none"}
    for name in names:
        value = getattr(training, name)
        settings[name] = getattr(value, "value", value)
    return settings


def _adapter_settings(model: LmModelArguments) -> dict[str, Any]:
    if model.adapter_name_or_path:
        return {"continues": Path(model.adapter_name_or_path).name}
    shown = {name: getattr(model, name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
    names = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "init_lora_weights")
    for name in (*names, "use_dora", "use_rslora", "loraplus_lr_ratio"):
        if value := getattr(model, name):
            shown[name] = " ".join(value) if isinstance(value, list) else value
    if model.load_in_4bit:
        double = ", double quantisation" if model.use_bnb_nested_quant else ""
        shown["base"] = f"4 bits, {model.bnb_4bit_quant_type}{double}"
    return shown


def _rounded(metrics: dict[str, float]) -> dict[str, str]:
    kept = {name: value for name, value in metrics.items() if name.startswith("eval") or name == "train_loss"}
    return {name: f"{value:.4g}" for name, value in kept.items() if isinstance(value, float)}
