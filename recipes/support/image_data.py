"""Images and their classes: the embedded digits, folders, or a dataset, as tensors."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from PIL import Image as Picture
from PIL import UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from recipes.support import records, reporting
from recipes.support.arguments import DEMO
from recipes.support.errors import RecipeError
from recipes.support.records import Records
from recipes.support.splits import present
from recipes.support.task_arguments import VisionDataArguments

_SPLIT_SEED = 0
_NUM_VALIDATION, _NUM_TEST = 200, 400
_DIGIT_LEVELS = 16


def load_splits(data: VisionDataArguments, *, seed: int, evaluates: bool) -> tuple[dict[str, Records], list[str]]:
    """Load and check the splits there are, with columns `image` (encoded, not yet read) and `label` (an index).

    Returns:
        The splits train, and of validation and test those that were named; and the names of the classes.

    Raises:
        RecipeError: a folder, a column or an image is bad, or there is nothing to evaluate on.
    """
    if data.dataset_name == DEMO:
        announce_demo()
        train, validation, test = demo_records()
        train, validation = records.select(train, validation, data, seed=seed)
    elif data.train_folder:
        train, validation, test = (
            load_folder(folder) if folder else None
            for folder in (data.train_folder, data.validation_folder, data.test_folder)
        )
        train, validation = records.select(train, validation, data, seed=seed)
    else:
        train, validation = _load_named(data, seed=seed)
        test = load_folder(data.test_folder) if data.test_folder else None
    names = list(train.dataset.features["label"].names)
    if len(names) < 2:
        raise RecipeError(f"{train.source} has the single class {names[0]!r}: nothing to tell apart.")
    check = functools.partial(_check, names=names)
    return present(train, validation, test, check, evaluates=evaluates, named="folder"), names


def demo_records() -> tuple[Records, Records, Records]:
    """Return scikit-learn's handwritten digits, 8 x 8 pixels each, as training, validation and test records."""
    digits = load_digits()
    order = np.arange(len(digits.target))
    rest, test = train_test_split(order, test_size=_NUM_TEST, stratify=digits.target, random_state=_SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=_NUM_VALIDATION, stratify=digits.target[rest], random_state=_SPLIT_SEED
    )
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=[str(name) for name in range(10)])})
    splits = []
    for name, indices in (("train", train), ("validation", validation), ("test", test)):
        rows = {"image": [_png(digits.images[index]) for index in indices], "label": digits.target[indices].tolist()}
        splits.append(Records(Dataset.from_dict(rows, features=features), f"demo[{name}]"))
    return splits[0], splits[1], splits[2]


def load_folder(name: str) -> Records:
    """Load a folder that has a folder of images for each class.

    Raises:
        RecipeError: it is missing, or holds no images in folders.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise RecipeError(f"{name}: no such folder.")
    if not any(path.is_file() for path in folder.glob("*/*")):
        raise RecipeError(f"{name} holds no images: it must have a folder of images for each class.")
    try:
        # Given as a pattern, because a folder 'test' would be taken for a split rather than a class.
        files = {"train": [f"{folder.resolve()}/*/*"]}
        dataset = load_dataset("imagefolder", data_files=files, drop_labels=False, split="train")
    except Exception as error:  # datasets raises whatever its readers raise
        raise RecipeError(
            f"{name} cannot be read as folders of images: {' '.join(str(error).split())[:300]}"
        ) from error
    return Records(dataset.cast_column("image", Image(decode=False)), name)


def encode(split: Records, processor: Any) -> Dataset:
    """Return the split with a transform that reads an image when it is asked for, as `pixel_values` and `labels`."""
    return split.dataset.with_transform(_make_transform(processor))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows of `pixel_values` and `labels` into a batch."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def most_frequent_share(split: Records) -> float:
    """Return the accuracy of always answering the most frequent class."""
    return float(np.bincount(split.dataset["label"]).max() / len(split.dataset))


def _load_named(data: VisionDataArguments, *, seed: int) -> tuple[Records, Records | None]:
    """Load a dataset by name, and give its columns the names that folders have."""
    splits = records.load_training_splits(data, seed=seed)
    for split in splits:
        if split is None:
            continue
        split.require_columns(("image_column", data.image_column), ("label_column", data.label_column))
        dataset = split.dataset.select_columns([data.image_column, data.label_column])
        dataset = dataset.rename_columns({data.image_column: "image", data.label_column: "label"})
        if not isinstance(dataset.features["label"], ClassLabel):
            dataset = dataset.class_encode_column("label")
        split.dataset = dataset.cast_column("image", Image(decode=False))
    return splits


def _check(split: Records, names: list[str]) -> None:
    """Check that every image can be read, and that its class is one of `names`, by which it is numbered.

    Raises:
        RecipeError: naming the file.
    """
    own_names = split.dataset.features["label"].names
    for name in own_names:
        if name not in names:
            raise RecipeError(f"{split.source}: the class {name!r} does not occur in the training images.")
    for index, image in enumerate(split.dataset["image"]):
        try:
            _read(image)
        except (UnidentifiedImageError, OSError, TypeError) as error:
            place = (image or {}).get("path") or split.locate(index)
            raise RecipeError(f"{place} cannot be read as an image: remove it, or mend it.") from error
    if own_names != names:
        labels = [names.index(own_names[label]) for label in split.dataset["label"]]
        feature = {"label": Value("int64")}
        split.dataset = split.dataset.cast(Features({**split.dataset.features, **feature}))
        split.dataset = split.dataset.map(lambda row, index: {"label": labels[index]}, with_indices=True)


def _make_transform(processor: Any) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [_read(image) for image in rows["image"]]
        return {
            "pixel_values": processor(images=pictures, return_tensors="pt")["pixel_values"],
            "labels": rows["label"],
        }

    return transform


def _read(image: dict[str, Any]) -> Picture.Image:
    """Decode an image, wherever its bytes are, to three channels."""
    source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    with Picture.open(source) as picture:
        return picture.convert("RGB")


def _png(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Picture.fromarray((pixels * 255 / _DIGIT_LEVELS).astype(np.uint8)).save(buffer, format="png")
    return {"bytes": buffer.getvalue(), "path": None}


def announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a small classifier learns to read scikit-learn's handwritten digits. For real work pass,\n"
        "for example, --model_name_or_path google/vit-base-patch16-224-in21k --train_folder A --test_folder B"
    )
