"""The arguments of the recipes that transformers' TrainingArguments does not have."""

import math
from dataclasses import dataclass, field

DEMO = "demo"


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
    test_file: str | None = field(
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
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": f"Folder or hub name of the model; '{DEMO}' builds the small demo model."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )


@dataclass
class SftModelArguments(ModelArguments):
    """A causal language model, which several processes may share."""

    tp_size: int | None = field(
        default=None,
        metadata={"help": "Cut the model over this many processes, which must be all. Default: as accelerate says."},
    )

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: an argument is out of its range.
        """
        if self.tp_size is not None and self.tp_size < 1:
            raise ValueError(f"tp_size = {self.tp_size}: must be at least 1.")


@dataclass
class LoraArguments:
    """What is trained: an adapter, or with `full` the whole model."""

    full: bool = field(default=False, metadata={"help": "Train every parameter instead of a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "Layers to adapt. all-linear: every linear layer but the output layer; names, or ends of names; or"
            " one regular expression for whole names, told by a character that no name has: .*(q|v)_proj"
        },
    )
    modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "Layers to train whole and to save with the adapter, such as lm_head."}
    )
    use_dora: bool = field(default=False, metadata={"help": "Train the norms of the adapted weights too (DoRA)."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by lora_alpha / sqrt(lora_r) instead (rsLoRA)."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the B matrices, as a multiple of learning_rate (LoRA+)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen weights in 4 bits, by bitsandbytes (QLoRA)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "The 16 values of a 4-bit weight.", "choices": ["nf4", "fp4"]}
    )
    bnb_4bit_use_double_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of the 4-bit weights as well."}
    )

    def __post_init__(self) -> None:
        """Check the ranges, and what excludes what.

        Raises:
            ValueError: an argument is out of its range, or would be without effect.
        """
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout = {self.lora_dropout}: must be in [0, 1).")
        if self.loraplus_lr_ratio is not None and not 0.0 < self.loraplus_lr_ratio < math.inf:
            raise ValueError(f"loraplus_lr_ratio = {self.loraplus_lr_ratio}: must be above 0.")
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules is empty: name a layer, or all-linear.")
        of_adapters = ("modules_to_save", "use_dora", "use_rslora", "loraplus_lr_ratio", "load_in_4bit")
        if self.full and (given := [name for name in of_adapters if getattr(self, name)]):
            raise ValueError(f"full trains every parameter, without an adapter: drop it, or {', '.join(given)}.")
        if self.bnb_4bit_use_double_quant and not self.load_in_4bit:
            raise ValueError("bnb_4bit_use_double_quant has no effect without load_in_4bit.")


@dataclass
class DatasetArguments:
    """Where records come from; each recipe adds the columns it reads."""

    dataset_name: str | None = field(
        default=None, metadata={"help": f"Hub name or folder of a dataset; '{DEMO}' is the embedded one."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: .jsonl, .json, .csv, .parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Data evaluated on during training."})
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Without a validation_file: the share of the training data to hold out."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many records, drawn by the seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many records at most."})
    max_length: int = field(default=512, metadata={"help": "Longest text in tokens; what is over is cut and counted."})

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: an argument is out of its range, or two of them exclude each other.
        """
        if self.dataset_name and self.train_file:
            raise ValueError("dataset_name and train_file exclude each other: name one source of training data.")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction = {self.validation_fraction}: must be in [0, 1).")
        for name in ("max_train_samples", "max_eval_samples", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1.")


@dataclass
class SftDataArguments(DatasetArguments):
    """Columns of the records for supervised fine-tuning."""

    validation_fraction: float = field(
        default=0.1, metadata={"help": "Without a validation_file: the share of the training data to hold out."}
    )
    messages_column: str | None = field(default=None, metadata={"help": "Column of chats. Default: messages."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts. Default: prompt."})
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of completions. Default: completion."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of plain text. Default: text."})
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Of a chat, learn the assistant's turns alone (the default); false: every token."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Template for chats in place of the tokenizer's: chatml, plain, or a file of Jinja."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put short records together into rows of max_length tokens; none attends to another."},
    )
    num_sample_generations: int = field(
        default=3, metadata={"help": "How many held-out prompts to complete before and after training."}
    )


@dataclass
class ClassifyDataArguments(DatasetArguments):
    """Columns of the records for text classification."""

    test_file: str | None = field(default=None, metadata={"help": "Data for the final accuracy."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label, a name or a number."})
    max_length: int = field(default=64, metadata={"help": "Longest text in tokens; what is over is cut and counted."})
