"""Files of records as text: JSON Lines, JSON and CSV, compressed by gzip or not, one record after another.

Nothing is guessed from values: what a CSV holds is text, and so is text in JSON that looks like a date.
"""

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from datasets import Features, Json, Value

from recipes.support.errors import RecipeError

LINES, DOCUMENT, TABLE, COLUMNS = "jsonl", "json", "csv", "parquet"
_ENDINGS = {".jsonl": LINES, ".ndjson": LINES, ".json": DOCUMENT, ".csv": TABLE, ".parquet": COLUMNS}
# A JSON file that is one object may hold its records under one of these names.
_KEYS_OF_RECORDS = ("data", "train")
_CHUNK = 1 << 20
_INT64 = range(-(2**63), 2**63)
_NO_SPACE = re.compile(r"\S")
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

Placed = tuple[int | None, dict[str, Any]]


def format_of(path: Path) -> str:
    """Return the format that the ending of `path` tells, whether or not .gz follows.

    Raises:
        RecipeError: it is none that is known.
    """
    endings = [ending.lower() for ending in path.suffixes]
    compressed = endings[-1:] == [".gz"]
    kind = _ENDINGS.get(endings[-2] if compressed and len(endings) > 1 else "".join(endings[-1:]))
    if kind is None or (compressed and kind == COLUMNS):
        known = f"{', '.join(_ENDINGS)}, or one of the first four with .gz"
        raise RecipeError(f"{path}: the format is told by the ending, which must be one of {known}.")
    return kind


def read(path: Path) -> Iterator[Placed]:
    """Yield every record with the line it begins at, which is None inside a lone JSON object.

    Raises:
        RecipeError: what is there cannot be read; the line is named.
    """
    readers = {LINES: _json_lines, DOCUMENT: _json_document, TABLE: _table}
    try:
        yield from readers[format_of(path)](path)
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"{path} cannot be read: {error}.") from error


def records_of(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of all files as datasets stores them: what is nested as JSON, exactly as it was written."""
    for name in paths:
        for _, record in read(Path(name)):
            yield {
                key: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
                for key, value in record.items()
            }


def survey(paths: list[Path]) -> tuple[Features, list[int]]:
    """Read all files once; return the type of each column, and how many records each file holds.

    Raises:
        RecipeError: a record is bad, or a column has values of several types; the line is named.
    """
    kinds: dict[str, type | None] = {}
    widest: dict[str, Value] = {}
    counts = []
    for path in paths:
        counts.append(0)
        for line, record in read(path):
            counts[-1] += 1
            for key, value in record.items():
                kinds.setdefault(key, None)
                if value is not None:
                    _widen(kinds, widest, key, value, _place(path, line, counts[-1]))
    nested = {key: Json() for key, kind in kinds.items() if kind in (list, dict)}
    return Features({key: nested.get(key) or widest.get(key) or Value("null") for key in kinds}), counts


def line_of(path: Path, position: int) -> int | None:
    """Return the line at which the record number `position` of a file begins, if it has lines."""
    if format_of(path) == COLUMNS:
        return None
    return next((line for index, (line, _) in enumerate(read(path)) if index == position), None)


def _widen(kinds: dict[str, type | None], widest: dict[str, Value], key: str, value: Any, place: str) -> None:
    kind = float if type(value) is int else type(value)
    if kinds[key] is None:
        kinds[key] = kind
        widest[key] = Value({str: "string", bool: "bool", float: "int64"}.get(kind, "string"))
    elif kinds[key] is not kind:
        raise RecipeError(
            f"{place}: '{key}' is of type {type(value).__name__}, in earlier records {kinds[key].__name__}."
        )
    if kind is float and (type(value) is float or value not in _INT64):
        widest[key] = Value("float64")


def _place(path: Path, line: int | None, number: int) -> str:
    return f"{path}, " + (f"record {number}" if line is None else f"line {line}")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _chunks(path: Path, *, lines: bool) -> Iterator[str]:
    """Yield the text piece by piece, or line by line, without the mark that editors put before it.

    Raises:
        RecipeError: it is not UTF-8; the line is named.
    """
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with _open(path) as file:
        for index, raw in enumerate(file if lines else iter(lambda: file.read(_CHUNK), b"")):
            if index == 0:
                if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in raw[:4]:
                    raise RecipeError(f"{path} is UTF-16, not UTF-8: save it as UTF-8 (iconv -f UTF-16 -t UTF-8).")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise RecipeError(
                    f"{path}, line {line + raw[: error.start].count(10)}: not UTF-8, but perhaps Latin-1: save it as"
                    " UTF-8 (iconv -f LATIN1 -t UTF-8)."
                ) from error
            line += raw.count(10)


def _json_lines(path: Path) -> Iterator[Placed]:
    for number, line in enumerate(_chunks(path, lines=True), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{path}, line {number}: not JSON ({error}).") from error
        yield number, _checked(record, line, f"{path}, line {number}")


def _json_document(path: Path) -> Iterator[Placed]:
    """Read a list of objects, objects one after another, or one object that holds a list of them."""
    text = _Json(path)
    in_list = text.peek() == "["
    if in_list:
        text.skip()
    first = None
    for number in range(sys.maxsize):
        following = text.peek()
        if in_list and number and following == ",":
            text.skip()
            following = text.peek()
        if not following or (in_list and following == "]"):
            break
        line, record = text.take()
        if number == 0 and not in_list:
            first = line, record  # alone, it may hold the others
            continue
        if first is not None:
            yield first
            first = None
        yield line, record
    if in_list and text.peek() != "]":
        raise RecipeError(f"{path}, line {text.line}: not JSON (the list has no end).")
    if first is not None:
        yield from _inside(first, str(path))


def _inside(alone: tuple[int, dict[str, Any]], place: str) -> Iterator[Placed]:
    for key in _KEYS_OF_RECORDS:
        held = alone[1].get(key)
        if isinstance(held, list) and held and all(isinstance(record, dict) for record in held):
            yield from ((None, _checked(record, "", place)) for record in held)
            return
    yield alone


class _Json:
    """The JSON values of a file, of which no more is held than the one that is read."""

    def __init__(self, path: Path) -> None:
        self._path, self._chunks = path, _chunks(path, lines=False)
        self._text, self._position, self.line = "", 0, 1

    def peek(self) -> str:
        """Return the next character that is no space, or '' at the end."""
        while (found := _NO_SPACE.search(self._text, self._position)) is None:
            self._advance(len(self._text))
            if not self._read_more():
                return ""
        self._advance(found.start())
        return found.group()

    def skip(self) -> None:
        """Go past the character that `peek` returned."""
        self._advance(self._position + 1)

    def take(self) -> tuple[int, dict[str, Any]]:
        """Return the object that begins here, and its line."""
        line = self.line
        while True:
            try:
                record, end = json.JSONDecoder().raw_decode(self._text, self._position)
                break
            except ValueError as error:
                if not self._read_more():
                    where = line + self._text.count("\n", self._position, getattr(error, "pos", self._position))
                    raise RecipeError(f"{self._path}, line {where}: not JSON ({error.args[0]}).") from error
        record = _checked(record, self._text[self._position : end], f"{self._path}, line {line}")
        self._advance(end)
        return line, record

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        """Read as much again as is held, so that a long value is not begun too often."""
        pieces = [self._text[self._position :]]
        while sum(map(len, pieces[1:])) <= len(pieces[0]) and (piece := next(self._chunks, None)) is not None:
            pieces.append(piece)
        self._text, self._position = "".join(pieces), 0
        return len(pieces) > 1


def _checked(record: Any, raw: str, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise RecipeError(f"{place}: must be an object, not {type(record).__name__}.")
    if _HALF_A_PAIR.search(raw):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"{place}: has half of a surrogate pair (\\ud800 to \\udfff), no character.") from error
    return record


def _table(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_chunks(path, lines=True), strict=True)
    start = 1
    try:
        header = [name or f"Unnamed: {index}" for index, name in enumerate(next(reader, []))]
        if twice := {name for name in header if header.count(name) > 1}:
            raise RecipeError(f"{path}: the header has the column '{min(twice)}' twice.")
        start = reader.line_num + 1
        for row in reader:
            if len(row) > len(header):
                raise RecipeError(f"{path}, line {start}: has {len(row)} fields, the header {len(header)}.")
            if row:  # what a short row lacks is missing, what is empty is text
                yield start, dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise RecipeError(f"{path}, line {start}: not CSV ({error}).") from error
