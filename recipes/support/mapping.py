"""Something made of every record by `datasets.map`: kept for the next time, and with what became of each record."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, Json, LargeList, List
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from recipes.support import formats, rendering, turns
from recipes.support.errors import RecipeError
from recipes.support.formats import Format, Row
from recipes.support.records import Records
from recipes.support.reporting import warn

OnBadRecord = Literal["drop", "raise"]
# What becomes of a record. ALIKE: a pair of the same completion twice. IMPOSSIBLE: BAD by no fault of the record.
USED, WITHOUT_TARGET, ALIKE, BAD, IMPOSSIBLE = range(5)

_BATCH = 100  # records of 32,000 tokens each then take 50 MB


def column_of(table: Dataset, name: str) -> np.ndarray:
    """Return a column of numbers that `map_records` made, 0 where a record is bad."""
    return np.asarray(table.data.column(name).fill_null(0).to_numpy())


def map_records(
    records: Records,
    found: Format,
    encode_row: Callable[[Row], dict[str, Any]],
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    *,
    options: tuple[Any, ...],
    num_proc: int | None,
) -> Dataset:
    """Apply `encode_row` to every record; datasets keeps the result, for other processes and for the next time.

    Args:
        records: to be read.
        found: their format; no other columns are read.
        encode_row: returns the other columns of `features`, among them `status`.
        features: the columns that are made. A record for which `encode_row` raises BadRecordError has the `status`
            BAD, the `reason`, and nothing in the other columns.
        tokenizer: the one that `encode_row` uses.
        options: what else the result depends on.
        num_proc: how many processes share the work.

    Communication: barriers, with several processes.
    """
    read = [name for name in records.dataset.column_names if name in (*found.columns, *formats.ALWAYS)]
    dataset = records.dataset.select_columns(read)
    as_json = {name: dataset.features[name] for name in read if formats.holds_json(dataset.features[name])}
    key = (dataset._fingerprint, Hasher.hash(found), options, _state_of(tokenizer), _state_of_code())
    with PartialState().main_process_first(), PartialState().local_main_process_first():
        return (
            dataset.with_format("arrow")
            .map(
                _encode_batch,
                fn_kwargs={"encode_row": encode_row, "as_json": as_json, "names": list(features)},
                batched=True,
                batch_size=_BATCH,
                remove_columns=read,
                features=features,
                num_proc=num_proc,
                new_fingerprint=Hasher.hash(key),
                desc=f"Tokenising {Path(records.source).name}",
            )
            .with_format(None)
        )


def raise_first(records: Records, table: Dataset, status: np.ndarray, on_bad_record: OnBadRecord) -> None:
    """Raise the first record that cannot be used, if that is asked for; what no record could do always."""
    least = BAD if on_bad_record == "raise" else IMPOSSIBLE
    if (status >= least).any():
        raise RecipeError(name_bad(records, table, int(np.argmax(status >= least))))


def name_bad(records: Records, table: Dataset, index: int) -> str:
    """Say where the record at `index` stands, and why it cannot be used."""
    return f"{records.locate(index)}: {table[index]['reason']}"


def warn_of_bad(records: Records, table: Dataset, status: np.ndarray) -> None:
    """Warn of the records that were dropped because they are bad."""
    if num_bad := int((status == BAD).sum()):
        first = name_bad(records, table, int(np.argmax(status == BAD)))
        warn(f"{num_bad} of {len(status)} records of {records.source} cannot be used: dropped; the first is {first}")


def warn_of_lost_reasoning(records: Records, table: Dataset) -> None:
    """Warn of the records whose column `without_reasoning`, which `Renderer.render` tells, is true."""
    if number := count_true(table, "without_reasoning"):
        warn(
            f"in {number} of {len(table)} records of {records.source} the chat template leaves out the reasoning of"
            " turns that are not learnt"
        )


def count_true(table: Dataset, name: str) -> int:
    """Return in how many records a column is true."""
    return int(pc.sum(table.data.column(name)).as_py() or 0)


def _encode_batch(
    batch: pa.Table, encode_row: Callable[[Row], dict[str, Any]], as_json: dict[str, Any], names: list[str]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row in batch.to_pylist():
        for name, feature in as_json.items():
            row[name] = _decoded(row[name], feature)
        try:
            encoded = encode_row(row)
        except turns.BadRecordError as error:
            status = IMPOSSIBLE if isinstance(error, rendering.LostToolsError) else BAD
            encoded = {"status": status, "reason": str(error)}
        for name, values in columns.items():
            values.append(encoded.get(name))
    return columns


def _decoded(value: Any, feature: Any) -> Any:
    """Read what datasets keeps as JSON; its own reader makes 0.30000000000000004 of 0.3."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, dict):
        return {key: _decoded(inner, feature[key]) for key, inner in value.items()}
    if isinstance(feature, List | LargeList):
        return [_decoded(inner, feature.feature) for inner in value]
    return value


def _state_of_code() -> list[bytes | str]:
    """Return the code that encodes, so that what an older one made is not taken for its."""
    ours = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return [*ours, *map(version, ("tokenizers", "transformers", "trl"))]


def _state_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """Return what decides about token ids; the object also holds how the last call cut and padded."""
    if tokenizer.is_fast:
        whole = tokenizer.backend_tokenizer.to_str()
        pieces = whole[whole.index('"added_tokens"') :]
    else:
        pieces = Hasher.hash(tokenizer)
    return pieces, tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
