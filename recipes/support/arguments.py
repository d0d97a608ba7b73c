"""The arguments of the recipes that transformers' TrainingArguments does not have."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments

DEMO = "demo"

_INITIAL_WEIGHTS = re.compile(r"gaussian|orthogonal|eva|loftq|olora|pissa(_niter_\d+)?")
# Arguments that say something about an adapter alone.
_OF_ADAPTERS = (
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_dora",
    "use_rslora",
    "load_in_4bit",
    "load_in_8bit",
    "init_lora_weights",
    "loraplus_lr_ratio",
)


@dataclass
class RunArguments:
    """How a run starts, and where it writes."""

    config: str | None = field(
        default=None, metadata={"help": "YAML file of arguments, named as the flags are; any flag overrides it."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Go on although output_dir is not empty; the checkpoints and metrics in it are removed."},
    )
    metrics_file: str | None = field(
        default=None, metadata={"help": "Where to log metrics, as JSON lines. Default: output_dir/metrics.jsonl."}
    )
    # Every argument of the run as it was given, before names are resolved.
    given: dict[str, Any] = field(init=False, repr=False, default_factory=dict)


@dataclass
class SftRunArguments(RunArguments):
    """What else a run of sft.py does, or does instead."""

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations in a row that did not improve."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better than the best so far counts as an improvement."}
    )
    merge: bool = field(
        default=False,
        metadata={
            "help": "Also save base and adapter as one model, to output_dir/merged, checked to give the same logits;"
            " where output_dir holds a finished run, do that alone."
        },
    )
    test_file: list[str] | None = field(
        default=None, metadata={"help": "Data that is measured once, at the end, and decides nothing."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print the arguments, the numbers of parameters and the memory they take; write nothing."},
    )

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: an argument is out of its range.
        """
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience = {self.early_stopping_patience}: must be at least 1.")
        if not 0.0 <= self.early_stopping_threshold < math.inf:
            raise ValueError(f"early_stopping_threshold = {self.early_stopping_threshold}: must be at least 0.")


@dataclass
class ModelArguments(ModelConfig):
    """Which model, and what of it is trained: TRL's `ModelConfig`, and what it does not have of adapters."""

    init_lora_weights: str | None = field(
        default=None,
        metadata={
            "help": "Where the adapter starts: gaussian, orthogonal, eva, loftq, olora, pissa or pissa_niter_16."
        },
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the B matrices, as a multiple of learning_rate (LoRA+)."}
    )

    def __post_init__(self) -> None:
        """Check the ranges, and what excludes what.

        Raises:
            ValueError: an argument is out of its range, or would be without effect.
        """
        super().__post_init__()
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout = {self.lora_dropout}: must be in [0, 1).")
        if self.loraplus_lr_ratio is not None and not 0.0 < self.loraplus_lr_ratio < math.inf:
            raise ValueError(f"loraplus_lr_ratio = {self.loraplus_lr_ratio}: must be above 0.")
        if self.init_lora_weights is not None and not _INITIAL_WEIGHTS.fullmatch(self.init_lora_weights):
            raise ValueError(
                f"init_lora_weights = {self.init_lora_weights}: must be gaussian, orthogonal, eva, loftq, olora,"
                " pissa or pissa_niter_N."
            )
        if not self.has_adapter and (given := [name for name in _OF_ADAPTERS if getattr(self, name)]):
            raise ValueError(f"without use_peft every weight is trained: add use_peft, or drop {', '.join(given)}.")
        if self.use_bnb_nested_quant and not self.load_in_4bit:
            raise ValueError("use_bnb_nested_quant has no effect without load_in_4bit.")

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, and not every weight."""
        return self.use_peft


@dataclass
class LmModelArguments(ModelArguments):
    """A causal language model, which may come with an adapter, and which several processes may share."""

    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Adapter of an earlier run, on its base; model_name_or_path may name its folder as well."},
    )
    adapter_start: str = field(
        default="continue",
        metadata={
            "help": "With an adapter of an earlier run: train it on (continue), or merge it into the weights and train"
            " a new adapter or all weights (merge).",
            "choices": ["continue", "merge"],
        },
    )
    tp_size: int | None = field(
        default=None,
        metadata={"help": "Cut the model over this many processes, which must be all. Default: as accelerate says."},
    )

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__post_init__()
        if self.tp_size is not None and self.tp_size < 1:
            raise ValueError(f"tp_size = {self.tp_size}: must be at least 1.")

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained: a new one, or that of an earlier run, named by itself or as the model."""
        names_one = self.adapter_name_or_path or is_adapter_folder(self.model_name_or_path)
        return self.use_peft or (bool(names_one) and self.adapter_start == "continue")


def is_adapter_folder(name: str | None) -> bool:
    """Whether `name` is a folder that peft has saved an adapter to."""
    return bool(name) and (Path(str(name)) / "adapter_config.json").is_file()


@dataclass
class DatasetArguments(ScriptArguments):
    """Where records come from: TRL's `ScriptArguments`, and files; each recipe adds the columns it reads."""

    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on during training. Default: validation, or else test."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training data: .jsonl, .json, .csv, .parquet, also .gz; several, or a pattern: data/*.jsonl."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Data evaluated on during training, in the same form."}
    )
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Without validation data: the share of the training data to hold out."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many records, drawn by the seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many records at most."})

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: an argument is out of its range, or two of them exclude each other.
        """
        if self.dataset_name and self.train_file:
            raise ValueError("dataset_name and train_file exclude each other: name one source of training data.")
        if self.dataset_streaming:
            raise ValueError("dataset_streaming: records are checked before the first step: drop it.")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction = {self.validation_fraction}: must be in [0, 1).")
        for name in ("max_train_samples", "max_eval_samples", "max_length"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1.")


@dataclass
class LmDataArguments(DatasetArguments):
    """Records for a causal language model."""

    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "Where eval_strategy asks for an evaluation and no data for it is named: what to hold out."},
    )
    on_bad_record: str = field(
        default="drop",
        metadata={
            "help": "A record that is broken, or that the chat template cannot carry: drop it and count it, or stop.",
            "choices": ["drop", "raise"],
        },
    )
    num_sample_generations: int = field(
        default=3, metadata={"help": "How many held-out prompts to complete before and after training."}
    )


@dataclass
class SftDataArguments(LmDataArguments):
    """Columns of the records for supervised fine-tuning; that of plain text is TRL's dataset_text_field."""

    messages_column: str | None = field(default=None, metadata={"help": "Column of chats. Default: by its name."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts. Default: by its name."})
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of completions. Default: by its name."}
    )


@dataclass
class PreferenceDataArguments(LmDataArguments):
    """Columns of the records for preference optimisation."""

    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of prompts. Default: prompt; or both completions begin with it."}
    )
    chosen_column: str | None = field(
        default=None, metadata={"help": "Column of the completions that were preferred. Default: chosen."}
    )
    rejected_column: str | None = field(
        default=None, metadata={"help": "Column of those they were preferred to. Default: rejected."}
    )


@dataclass
class ClassifyDataArguments(DatasetArguments):
    """Columns of the records for text classification."""

    test_file: list[str] | None = field(default=None, metadata={"help": "Data for the final accuracy."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, a name or a number."})
    max_length: int = field(default=64, metadata={"help": "Longest text in tokens; what is over is cut and counted."})
