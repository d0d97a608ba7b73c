"""Records from a local file, the hub or the embedded data, and where in the file a bad one stands."""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from recipes.support.arguments import DatasetArguments
from recipes.support.errors import RecipeError

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Records:
    """One split: a dataset, and how to name its source and a place in it."""

    def __init__(
        self, dataset: Dataset, source: str, *, path: Path | None = None, positions: Sequence[int] | None = None
    ) -> None:
        """Wrap `dataset`, whose record i stood at `positions[i]` of the file `path`, by default at i."""
        if len(dataset) == 0:
            raise RecipeError(f"{source} holds no records.")
        self.dataset = dataset
        self.source = source
        self._path = path
        self._positions = positions if positions is not None else range(len(dataset))

    def subset(self, indices: Sequence[int]) -> "Records":
        """Return the records at `indices`; each still knows its place in the source."""
        positions = [self._positions[index] for index in indices]
        return Records(self.dataset.select(indices), self.source, path=self._path, positions=positions)

    def locate(self, index: int) -> str:
        """Name the record at `index` for an error message, by its line where the file has lines."""
        position = self._positions[index]
        line = None
        if self._path is not None and self._path.suffix in _LINE_READERS:
            line = next(islice(_LINE_READERS[self._path.suffix](self._path), position, None), None)
        return f"{self.source}, " + (f"record {position + 1}" if line is None else f"line {line}")

    def require_columns(self, *flags_and_columns: tuple[str, str]) -> None:
        """Check that the columns exist; each comes with the flag that names it.

        Raises:
            RecipeError: naming the flag, the column and the columns there are.
        """
        for flag, column in flags_and_columns:
            if column not in self.dataset.column_names:
                raise RecipeError(
                    f"{self.source} has no column '{column}' (--{flag}); its columns are"
                    f" {', '.join(self.dataset.column_names)}."
                )


def load_training_splits(data: DatasetArguments, *, seed: int) -> tuple[Records, Records | None]:
    """Load what a recipe trains on, and what it evaluates on during training, if anything.

    Args:
        data: names a file or a hub dataset; embedded data comes from the recipe, which calls `select` itself.
        seed: draws `max_train_samples` and the part held out.

    Raises:
        RecipeError: nothing was named, or it cannot be read.
    """
    if data.train_file:
        train, validation = load_file(data.train_file), None
    elif data.dataset_name:
        train, validation = _load_from_hub(data)
    else:
        raise RecipeError(
            "no training data: give --train_file FILE or --dataset_name NAME ('demo': the embedded data)."
        )
    if data.validation_file:
        validation = load_file(data.validation_file)
    return select(train, validation, data, seed=seed)


def select(
    train: Records, validation: Records | None, data: DatasetArguments, *, seed: int
) -> tuple[Records, Records | None]:
    """Hold out a part where there is no validation data, then cut both to their largest number of records."""
    if validation is None and data.validation_fraction:
        if len(train.dataset) < 2:
            raise RecipeError(f"{train.source} holds one record: nothing is left to evaluate on (--validation_file).")
        order = random.Random(seed).sample(range(len(train.dataset)), len(train.dataset))
        num_held_out = min(max(1, round(len(order) * data.validation_fraction)), len(order) - 1)
        train, validation = train.subset(order[num_held_out:]), train.subset(order[:num_held_out])
    if validation is not None:
        validation = at_most(validation, data.max_eval_samples, seed=seed)
    return at_most(train, data.max_train_samples, seed=seed), validation


def at_most(records: Records, count: int | None, *, seed: int) -> Records:
    """Return `count` records drawn by `seed`, or all of them where there are no more."""
    if count is None or count >= len(records.dataset):
        return records
    return records.subset(random.Random(seed).sample(range(len(records.dataset)), count))


def load_file(name: str) -> Records:
    """Load a local file with datasets.

    Raises:
        RecipeError: it is missing, empty, of an unknown format, or has a bad record, whose line is named.
    """
    path = Path(name)
    if not path.is_file():
        raise RecipeError(f"{name}: no such file.")
    if path.suffix not in _FORMATS:
        raise RecipeError(f"{name}: the format is told by the ending, which must be one of {', '.join(_FORMATS)}.")
    if path.stat().st_size == 0:
        raise RecipeError(f"{name} is empty.")
    if path.suffix == ".jsonl":
        _check_json_lines(path)
    try:
        dataset = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets raises whatever its readers raise, wrapped or not
        cause = error.__cause__ or error
        raise RecipeError(f"{name} cannot be read as {path.suffix[1:]}: {_first_line(cause)}") from error
    return Records(_with_dates_as_text(dataset, path), name, path=path)


def _with_dates_as_text(dataset: Dataset, path: Path) -> Dataset:
    """Read a JSON file again where datasets took text such as "2021-03-14" for a time, which JSON does not have."""
    kinds = [str(getattr(feature, "dtype", "")) for feature in dataset.features.values()]
    if not any(kind.startswith(("timestamp", "date", "time")) for kind in kinds) or "json" not in path.suffix:
        return dataset
    text = path.read_text(encoding="utf-8")
    lines = [text] if path.suffix == ".json" else text.splitlines()
    read = [json.loads(line) for line in lines if line.strip()]
    return Dataset.from_list(read[0] if path.suffix == ".json" else read)


def _load_from_hub(data: DatasetArguments) -> tuple[Records, Records | None]:
    name = data.dataset_name
    try:
        splits = load_dataset(name, data.dataset_config_name)
    except Exception as error:  # from a missing network to a missing configuration: one line for each
        raise RecipeError(
            f"dataset '{name}' cannot be loaded: {_first_line(error)} Without a network, give a local --train_file."
        ) from error
    if not isinstance(splits, DatasetDict) or "train" not in splits:
        raise RecipeError(f"dataset '{name}' has no split 'train'; it has {', '.join(splits)}.")
    validation = next((splits[split] for split in ("validation", "test") if split in splits), None)
    train = Records(splits["train"], f"{name}[train]")
    return train, None if validation is None else Records(validation, f"{name}[validation]")


def _check_json_lines(path: Path) -> None:
    """Find what datasets would report without a line: broken JSON, and a value whose type changes."""
    first_types: dict[str, type] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(record, dict):
                raise RecipeError(f"{path}, line {number}: must be an object, not {type(record).__name__}.")
            _check_types(record, first_types, f"{path}, line {number}")


def _check_types(record: dict[str, Any], first_types: dict[str, type], place: str) -> None:
    for key, value in record.items():
        if value is None:
            continue
        kind = float if type(value) is int else type(value)
        if kind is not first_types.setdefault(key, kind):
            raise RecipeError(
                f"{place}: '{key}' is of type {type(value).__name__}, in earlier records {first_types[key].__name__}."
            )


def _json_line_numbers(path: Path) -> Iterator[int]:
    with path.open(encoding="utf-8") as file:
        yield from (number for number, line in enumerate(file, start=1) if line.strip())


def _csv_line_numbers(path: Path) -> Iterator[int]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        next(reader, None)
        start = reader.line_num + 1
        for row in reader:
            if row:
                yield start
            start = reader.line_num + 1


_LINE_READERS = {".jsonl": _json_line_numbers, ".csv": _csv_line_numbers}


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300] if text.endswith(".") else f"{text[:300]}."
