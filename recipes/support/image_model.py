"""Image classifiers: those that exist, and small new ones, with what prepares their images."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileNetV2Config,
    PreTrainedConfig,
    ResNetConfig,
    ViTConfig,
)

from recipes.support import models
from recipes.support.errors import RecipeError
from recipes.support.task_arguments import VisionModelArguments

_NEW_IMAGE_SIZE = 32
_PATCHES_ACROSS = 4


def load(arguments: VisionModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Return the image processor and the model, without an adapter, with a head for the classes `names`.

    Raises:
        RecipeError: nothing was named, or the model cannot be loaded.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if arguments.architecture:
        size = arguments.image_size or _NEW_IMAGE_SIZE
        config = _small_config(arguments.architecture, size, labels)
        return _new_processor(size), AutoModelForImageClassification.from_config(config)
    if not arguments.model_name_or_path:
        raise RecipeError("no model: give --model_name_or_path FOLDER_OR_NAME, or --architecture for a small new one.")
    processor = _load_processor(arguments)
    config = models.load_config(arguments)
    for name, value in labels.items():
        setattr(config, name, value)
    return processor, models.load_model(AutoModelForImageClassification, arguments, config=config, new_head=True)


def _load_processor(arguments: VisionModelArguments) -> Any:
    """Load what prepares a model's images; transformers does it with PIL where torchvision is not installed."""
    size = {} if arguments.image_size is None else {"size": _square(arguments.image_size)}
    try:
        return AutoImageProcessor.from_pretrained(
            arguments.model_name_or_path, revision=arguments.model_revision, **size
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"model '{arguments.model_name_or_path}' cannot be loaded: {reason} Without a network, give the folder of"
            " a downloaded model."
        ) from error


def _new_processor(size: int) -> Any:
    """Return a processor that resizes and normalises to [-1, 1]."""
    content = {
        # Its class has another name in each range of transformers' versions: this one is understood by all.
        "image_processor_type": "ViTImageProcessor",
        "size": _square(size),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _small_config(architecture: str, size: int, labels: dict[str, Any]) -> PreTrainedConfig:
    """Return a configuration of 0.1M to 0.5M parameters."""
    if architecture == "vit":
        return ViTConfig(
            image_size=size,
            patch_size=size // _PATCHES_ACROSS,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            **labels,
        )
    if architecture == "mobilenet_v2":
        return MobileNetV2Config(
            image_size=size, depth_multiplier=0.35, output_stride=8, classifier_dropout_prob=0.1, **labels
        )
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", **labels)
