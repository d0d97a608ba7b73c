"""Files and data sets as people have them: what is read is what stands there, and a bad place is named."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from recipes.support.arguments import DatasetArguments
from recipes.support.errors import RecipeError
from recipes.support.records import load_file, load_named, load_training_splits

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\u2028e"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 0.3}}}]}


def lines_of(rows):
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


FORMS = {
    "jsonl": ("x.jsonl", lines_of(ROWS)),
    "empty lines": ("x.jsonl", "\n" + lines_of(ROWS).replace("\n", "\r\n\n")),
    "ndjson": ("x.ndjson", lines_of(ROWS)),
    "list": ("x.json", json.dumps(ROWS)),
    "indented": ("x.json", json.dumps(ROWS, indent=2)),
    "lines called json": ("x.json", lines_of(ROWS)),
    "under data": ("x.json", json.dumps({"version": 1, "data": ROWS})),
    "under train": ("x.json", json.dumps({"train": ROWS}, indent=1)),
    "csv": ("x.csv", "prompt,completion\na,b\n\nc,d\u2028e\n"),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize(("name", "text"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_records(name, text, mark, compressed, tmp_path):
    raw = (mark + text).encode()
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    assert list(load_file(str(path)).dataset) == ROWS


def test_long_json_is_read_in_pieces(tmp_path):
    rows = [{"text": "owl " * 40_000, "number": number} for number in range(30)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows, indent=1))
    records = load_file(str(path))
    assert list(records.dataset) == rows
    assert records.locate(29).endswith(f"x.json, line {2 + 29 * 4}")


def test_what_is_nested_may_differ_from_record_to_record(tmp_path):
    """Keys that only other records have do not appear, in contents, arguments or schemas of tools."""
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, CALL], "tools": [{"name": "f", "properties": {"x": {}}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": [{"name": "g"}]},
        {"messages": [{"role": "user", "content": "hi"}], "tools": None},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text(lines_of(rows))
    read = list(load_file(str(path)).dataset)
    assert [row["tools"] for row in read] == [row["tools"] for row in rows]
    assert read[1]["messages"] == rows[1]["messages"]
    assert read[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["x"] == pytest.approx(0.3)


def test_csv_is_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,completion\nNA,007\nnull,1.50\nNone,2021-03-14\n,true\n")
    read = load_file(str(path)).dataset
    assert read["prompt"][:] == ["NA", "null", "None", ""]
    assert read["completion"][:] == ["007", "1.50", "2021-03-14", "true"]


def test_what_a_short_row_lacks_is_missing(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b,\n1,2\n3\n")
    assert list(load_file(str(path)).dataset) == [
        {"a": "1", "b": "2", "Unnamed: 2": None},
        {"a": "3", "b": None, "Unnamed: 2": None},
    ]


def test_several_files_and_patterns_name_the_file_and_the_line(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(lines_of([{"text": f"{name}{number}"} for number in range(3)]))
    (tmp_path / "c.jsonl").write_text("\n" + lines_of([{"text": "c0", "more": "x"}]))
    by_pattern = load_file(str(tmp_path / "[ab].jsonl"))
    assert by_pattern.dataset["text"][:] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    records = load_file([str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl")])
    assert records.dataset["more"][:] == [None, None, None, "x"]
    assert records.locate(2) == f"{tmp_path / 'b.jsonl'}, line 3"
    assert records.subset([3, 0]).locate(0) == f"{tmp_path / 'c.jsonl'}, line 2"
    assert records.source.endswith("b.jsonl and others (2 files)")
    both = DatasetArguments(train_file=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert len(load_training_splits(both, seed=0)[0].dataset) == 6


def test_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "x.jsonl"
    for text in ("one", "two"):
        path.write_text(lines_of([{"text": text}]))
        assert load_file(str(path)).dataset["text"][:] == [text]


def test_parquet_files(tmp_path):
    for name in ("a", "b"):
        Dataset.from_list(ROWS).to_parquet(tmp_path / f"{name}.parquet")
    records = load_file(str(tmp_path / "*.parquet"))
    assert list(records.dataset) == ROWS * 2
    assert records.locate(3) == f"{tmp_path / 'b.parquet'}, record 2"


LATIN = '{"text": "caf\xe9"}\n'.encode("latin-1")
BAD = {
    "UTF-16": ("x.jsonl", lines_of(ROWS).encode("utf-16"), r"x.jsonl is UTF-16, not UTF-8: save it as UTF-8"),
    "UTF-16 without a mark": ("x.csv", "a,b\nc,d\n".encode("utf-16-be"), r"x.csv is UTF-16"),
    "Latin-1": ("x.jsonl", b'{"text": "a"}\n' + LATIN, r"x.jsonl, line 2: not UTF-8, but perhaps Latin-1"),
    "Latin-1 in a list": ("x.json", b'[\n{"text": "a"},\n' + LATIN + b"]", r"x.json, line 3: not UTF-8"),
    "Latin-1 in a table": ("x.csv", b"a,b\nc,d\n\xe9,f\n", r"x.csv, line 3: not UTF-8"),
    "broken list": ("x.json", b'[\n{"a": "b"},\n{"a": \n}]', r"x.json, line 4: not JSON"),
    "unended list": ("x.json", b'[{"a": "b"}\n', r"x.json, line 2: not JSON \(the list has no end\)"),
    "list of texts": ("x.json", b'["a", "b"]', r"x.json, line 1: must be an object, not str"),
    "type changes in a list": ("x.json", b'[{"a": "b"},\n{"a": 1}]', r"x.json, line 2: 'a' is of type int, in .* str"),
    "half a pair": ("x.jsonl", rb'{"text": "\ud83d"}', r"x.jsonl, line 1: has half of a surrogate pair"),
    "long row": ("x.csv", b"a,b\n1,2\n1,2,3\n", r"x.csv, line 3: has 3 fields, the header 2"),
    "unended quotes": ("x.csv", b'a,b\n1,"2\n3,4\n', r"x.csv, line 2: not CSV"),
    "column twice": ("x.csv", b"a,a\n1,2\n", r"x.csv: the header has the column 'a' twice"),
    "header alone": ("x.csv", b"a,b\n", r"x.csv holds no records"),
    "not compressed": ("x.jsonl.gz", b'{"a": "b"}\n', r"x.jsonl.gz cannot be read"),
    "ending": ("x.parquet.gz", b"x", r"the format is told by the ending"),
}


@pytest.mark.parametrize(("name", "raw", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_one_line_with_the_place(name, raw, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(RecipeError, match=message):
        load_file(str(path))


def test_files_that_are_not_there_or_do_not_fit(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_text('{"a": "b"}\n')
    for names, message in {
        str(tmp_path / "*.json"): "no file has such a name",
        str(tmp_path / "b.json"): "no such file",
        str(tmp_path): r"is a folder: name its files, for example .*\*\.jsonl",
        (str(tmp_path / "a.csv"), str(tmp_path / "a.jsonl")): "files of one format are needed, not of csv and jsonl",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_file(names)


@pytest.fixture
def saved(tmp_path):
    splits = {name: Dataset.from_dict({"text": [f"{name}{number}" for number in range(10)]}) for name in "ab"}
    DatasetDict(train=splits["a"], held_out=splits["b"]).save_to_disk(tmp_path / "several")
    splits["a"].save_to_disk(tmp_path / "one")
    return Path(tmp_path)


def test_folder_that_was_saved_to_disk(saved):
    train, validation = load_named(str(saved / "one"))
    assert (len(train.dataset), validation) == (10, None)
    train, validation = load_named(str(saved / "several"), train_split="train[:3]+held_out[8:]", test_split="held_out")
    assert train.dataset["text"][:] == ["a0", "a1", "a2", "b8", "b9"]
    assert validation.dataset["text"][:2] == ["b0", "b1"]
    # TRL's default is a split 'test', which need not be there.
    assert load_named(str(saved / "several"), test_split="test")[1] is None


@pytest.mark.parametrize("wanted", ["training", "train[:", "train[:3]+nothing", "train[20:30]"])
def test_unknown_split_is_named(wanted, saved):
    with pytest.raises(RecipeError, match=r"has no split '.*'; it has train, held_out|holds no records"):
        load_named(str(saved / "several"), train_split=wanted)
