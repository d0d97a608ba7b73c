"""Records from a local file, the hub or the embedded data, and where in the file a bad one stands."""

import glob
import random
from collections.abc import Sequence
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from pyarrow import parquet

from recipes.support import reading
from recipes.support.arguments import DatasetArguments
from recipes.support.errors import RecipeError

# What save_to_disk leaves in a folder, of one split or of several.
_MARKS_OF_SAVED = ("state.json", "dataset_dict.json")


class Records:
    """One split: a dataset, and how to name its source and a place in it."""

    def __init__(
        self,
        dataset: Dataset,
        source: str,
        *,
        files: Sequence[tuple[Path, int]] = (),
        positions: Sequence[int] | None = None,
    ) -> None:
        """Wrap `dataset`, whose record i was number `positions[i]`, by default i, of what it was loaded from.

        Args:
            dataset: the records.
            source: what they are called in messages.
            files: those they were loaded from, with how many records each holds.
            positions: where they stood there.
        """
        if len(dataset) == 0:
            raise RecipeError(f"{source} holds no records.")
        self.dataset = dataset
        self.source = source
        self._files = files
        self._positions = positions if positions is not None else range(len(dataset))

    def subset(self, indices: Sequence[int]) -> "Records":
        """Return the records at `indices`; each still knows its place in the source."""
        positions = [self._positions[index] for index in indices]
        return Records(self.dataset.select(indices), self.source, files=self._files, positions=positions)

    def locate(self, index: int) -> str:
        """Name the record at `index` for an error message, by its line where the file has lines."""
        position = self._positions[index]
        for path, count in self._files:
            if position < count:
                line = reading.line_of(path, position)
                name = self.source if len(self._files) == 1 else path
                return f"{name}, " + (f"record {position + 1}" if line is None else f"line {line}")
            position -= count
        return f"{self.source}, record {position + 1}"

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
        train, validation = load_named(
            data.dataset_name,
            data.dataset_config,
            train_split=data.dataset_train_split,
            test_split=data.dataset_test_split,
        )
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


def load_file(names: str | Sequence[str]) -> Records:
    """Load local files with datasets, each a path or a pattern such as data/*.jsonl, one after the other.

    Raises:
        RecipeError: one is missing, empty, of an unknown format, or has a bad record, whose line is named.
    """
    given = [names] if isinstance(names, str) else list(names)
    paths = [path for name in given for path in _matching(name)]
    kinds = {reading.format_of(path) for path in paths}
    if len(kinds) > 1:
        raise RecipeError(f"{', '.join(given)}: files of one format are needed, not of {' and '.join(sorted(kinds))}.")
    source = given[0] if len(paths) == 1 else f"{given[0]} and others ({len(paths)} files)"
    if kinds == {reading.COLUMNS}:
        dataset, counts = _load_columns(paths)
    else:
        features, counts = reading.survey(paths)
        if not sum(counts):
            raise RecipeError(f"{source} holds no records.")
        names_of_files = [str(path) for path in paths]
        dataset = Dataset.from_generator(
            reading.records_of,
            features=features,
            gen_kwargs={"paths": names_of_files},
            fingerprint=_fingerprint(paths, features),
        )
    return Records(dataset, source, files=list(zip(paths, counts, strict=True)))


def _matching(name: str) -> list[Path]:
    """Return the file, or those that the pattern stands for, in the order of their names."""
    path = Path(name)
    if path.is_dir():
        raise RecipeError(f"{name} is a folder: name its files, for example {path / '*.jsonl'}.")
    is_pattern = not path.is_file() and glob.has_magic(name)
    paths = sorted(Path(found) for found in glob.glob(name, recursive=True)) if is_pattern else [path]
    if not paths or not all(path.is_file() for path in paths):
        raise RecipeError(f"{name}: no such file." if not is_pattern else f"{name}: no file has such a name.")
    for path in paths:
        reading.format_of(path)
        if path.stat().st_size == 0:
            raise RecipeError(f"{path} is empty.")
    return paths


def _load_columns(paths: list[Path]) -> tuple[Dataset, list[int]]:
    try:
        counts = [parquet.read_metadata(path).num_rows for path in paths]
        return load_dataset("parquet", data_files=[str(path) for path in paths], split="train"), counts
    except Exception as error:  # datasets raises whatever its readers raise, wrapped or not
        cause = error.__cause__ or error
        raise RecipeError(f"{paths[0]} cannot be read as parquet: {_first_line(cause)}") from error


def _fingerprint(paths: list[Path], features: Features) -> str:
    """Name what datasets keeps of these files; it is made anew when a file, or the way of reading it, changes."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return Hasher.hash((states, str(features), Path(reading.__file__).read_bytes()))


def load_named(
    name: str, config: str | None = None, *, train_split: str = "train", test_split: str | None = None
) -> tuple[Records, Records | None]:
    """Load a dataset of the hub, a folder that holds one, or a folder that `save_to_disk` wrote.

    Args:
        name: of the dataset, or the folder.
        config: one of its configurations.
        train_split: what to train on; a part such as train[:1000] too.
        test_split: what to evaluate on. By default `validation`, or else `test`, if there is one.

    Raises:
        RecipeError: it cannot be loaded, or has no such split.
    """
    try:
        saved = any((Path(name) / mark).is_file() for mark in _MARKS_OF_SAVED)
        splits = load_from_disk(name) if saved else load_dataset(name, config)
    except Exception as error:  # from a missing network to a missing configuration: one line for each
        raise RecipeError(
            f"dataset '{name}' cannot be loaded: {_first_line(error)} Without a network, give a local --train_file."
        ) from error
    if isinstance(splits, Dataset):
        splits = DatasetDict(train=splits)
    train = Records(_split(splits, train_split, name), f"{name}[{train_split}]")
    # TRL's default is 'test', whether or not there is one.
    if test_split is None or (test_split == "test" and "test" not in splits):
        test_split = next((split for split in ("validation", "test") if split in splits), None)
    if test_split is None:
        return train, None
    return train, Records(_split(splits, test_split, name), f"{name}[{test_split}]")


def _split(splits: DatasetDict, wanted: str, name: str) -> Dataset:
    """Return a split, or the part of one that is written as datasets writes it, such as train[:10%]."""
    if wanted in splits:
        return splits[wanted]
    sizes = {split: len(dataset) for split, dataset in splits.items()}
    try:
        parts = ReadInstruction.from_spec(wanted).to_absolute(sizes)
        return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])
    except (ValueError, AssertionError, IndexError) as error:
        raise RecipeError(f"dataset '{name}' has no split '{wanted}'; it has {', '.join(splits)}.") from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300] if text.endswith(".") else f"{text[:300]}."
