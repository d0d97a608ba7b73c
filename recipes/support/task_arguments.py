"""The arguments of the recipes for sequences to sequences, images, and sequences of tasks."""

import math
from dataclasses import dataclass, field

from recipes.support.arguments import DatasetArguments, ModelArguments, RunArguments

TEXT_METRICS = ("exact_match", "token_f1", "bleu", "chrf")
ARCHITECTURES = ("vit", "mobilenet_v2", "resnet")


@dataclass
class Seq2SeqDataArguments(DatasetArguments):
    """Columns of the records for translation, summarisation and the like, and how the outcome is measured."""

    test_file: list[str] | None = field(default=None, metadata={"help": "Data for the final metrics."})
    max_length: int = field(default=512, metadata={"help": "Longest text in tokens; what is over is cut and counted."})
    source_column: str = field(default="source", metadata={"help": "Column of the texts to read."})
    target_column: str = field(default="target", metadata={"help": "Column of the texts to write."})
    source_prefix: str = field(
        default="", metadata={"help": "Put before every source, for example 'summarize: ' for T5."}
    )
    max_target_length: int = field(
        default=128, metadata={"help": "Longest target in tokens; what is over is cut and counted."}
    )
    num_beams: int = field(default=1, metadata={"help": "Beams of the generation that is measured; 1: greedy."})
    text_metrics: list[str] = field(
        default_factory=lambda: ["exact_match", "token_f1", "chrf"],
        metadata={"help": f"What generated text is measured by: {', '.join(TEXT_METRICS)}."},
    )
    num_sample_generations: int = field(
        default=3, metadata={"help": "How many held-out sources to show with what is written for them."}
    )

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__post_init__()
        for name in ("max_target_length", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1.")
        for metric in self.text_metrics:
            if metric not in TEXT_METRICS:
                raise ValueError(f"text_metrics: unknown metric '{metric}'; there are {', '.join(TEXT_METRICS)}.")


@dataclass
class VisionModelArguments(ModelArguments):
    """Which image classifier is trained: one that exists, or a small new one."""

    architecture: str | None = field(
        default=None,
        metadata={"help": "Without a model: build a small one of this kind.", "choices": [None, *ARCHITECTURES]},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of an image in pixels. Default: the model's; new ones 32."}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: two arguments exclude each other, or one is out of its range.
        """
        super().__post_init__()
        if self.model_name_or_path and self.architecture:
            raise ValueError(
                "model_name_or_path and architecture exclude each other: name a model or build a new one."
            )
        if self.image_size is not None and self.image_size < 16:
            raise ValueError(f"image_size = {self.image_size}: must be at least 16.")


@dataclass
class VisionDataArguments(DatasetArguments):
    """Images and their classes: the embedded digits, folders of one class each, or a dataset."""

    train_file: None = field(default=None, init=False)
    validation_file: None = field(default=None, init=False)
    train_folder: str | None = field(
        default=None, metadata={"help": "Training images: a folder with one folder of images for each class."}
    )
    validation_folder: str | None = field(
        default=None, metadata={"help": "Images evaluated on during training, in the same form."}
    )
    test_folder: str | None = field(default=None, metadata={"help": "Images for the final metrics, in the same form."})
    image_column: str = field(default="image", metadata={"help": "Column of the image, in a dataset by name."})
    label_column: str = field(default="label", metadata={"help": "Column of the class, in a dataset by name."})

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ValueError: an argument is out of its range, or two of them exclude each other.
        """
        super().__post_init__()
        if self.dataset_name and self.train_folder:
            raise ValueError("dataset_name and train_folder exclude each other: name one source of training images.")


@dataclass
class DomainArguments:
    """The sequence of domains; the scenarios are those of van de Ven and Tolias (2019), arXiv 1904.07734."""

    domain_column: str = field(default="domain", metadata={"help": "Column that says which domain a record is of."})
    scenario: str = field(
        default="class_incremental",
        metadata={
            "help": "Tell a record's label from the labels of every domain (class_incremental) or, its domain being "
            "known, from those of its own (task_incremental).",
            "choices": ["class_incremental", "task_incremental"],
        },
    )


@dataclass
class ShiftArguments:
    """The sequence of tasks."""

    num_tasks: int = field(default=20, metadata={"help": "How many tasks, each of num_train_epochs (or max_steps)."})
    flip_fraction: float = field(default=0.4, metadata={"help": "Share of the classes whose labels are permuted."})

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: an argument is out of its range.
        """
        if self.num_tasks < 2:
            raise ValueError(f"num_tasks = {self.num_tasks}: must be at least 2, or nothing shifts.")
        if not 0.0 <= self.flip_fraction <= 1.0:
            raise ValueError(f"flip_fraction = {self.flip_fraction}: must be from 0 to 1.")


@dataclass
class ClassifierRunArguments(RunArguments):
    """What else a run of classify.py or vision.py does."""

    head_learning_rate: str | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the head: a rate, or a multiple of learning_rate such as 10x."},
    )
    merge: bool = field(
        default=False,
        metadata={
            "help": "Also save base and adapter as one model, to output_dir/merged, checked to give the same logits;"
            " where output_dir holds a finished run, do that alone."
        },
    )

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: an argument is out of its range.
        """
        self.head_rate(1.0)

    def head_rate(self, learning_rate: float) -> float | None:
        """Return the learning rate of the head, the body's being `learning_rate`; None where nothing is said of it.

        Raises:
            ValueError: it is neither a number above 0 nor a multiple.
        """
        wanted = self.head_learning_rate
        if wanted is None:
            return None
        try:
            number = float(wanted.removesuffix("x"))
        except ValueError:
            number = math.nan
        if not 0.0 < number < math.inf:
            raise ValueError(f"head_learning_rate = {wanted}: must be a rate above 0, or a multiple such as 10x.")
        return number * learning_rate if wanted.endswith("x") else number
