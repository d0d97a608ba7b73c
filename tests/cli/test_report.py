"""`hf-tam report`: the numbers of the page are those of the files, and what is broken is named."""

import base64
import json
import re

import pytest

from hf_tam import cli
from hf_tam.lab.report.grouping import band, group_runs, heatmaps
from hf_tam.lab.report.reading import read_runs

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp"]


def write_run(folder, *, optim="adatamw", seed=0, torque=True, parts=(".lora_A", ".lora_B"), **facts):
    """A run as the recipes leave it: three logging steps, two evaluations."""
    folder.mkdir(parents=True)
    settings = {"TrainingArguments": {"optim": optim, "seed": seed, "output_dir": str(folder), "learning_rate": 0.003}}
    results = {"optimizer": optim, "steps": 30, "tokens_per_second": 1234.5, "peak_process_memory_mib": 601.5, **facts}
    (folder / "results.json").write_text(json.dumps({**results, "settings": settings}))
    rows = [{"step": 0, "eval_loss": 4.0}]
    for step in (10, 20, 30):
        rows.append({"step": step, "loss": 40 / step + seed, "grad_norm": 1.0, "learning_rate": 1e-3})
        if torque:
            rows[-1] |= {"torque/damping_mean": 0.6, "torque/damping_p10": 0.5, "torque/damping_p90": 0.7}
    rows.append({"step": 30, "eval_loss": 0.25 + seed})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if torque:
        lines = [
            {"step": step, "epoch": 1, "group": layer + part, "damping_mean": step / 100 + number / 10}
            for step in (10, 20, 30)
            for number, layer in enumerate(LAYERS)
            for part in parts
        ]
        (folder / "torque.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    return folder


@pytest.fixture
def page(tmp_path, capsys):
    """Runs `hf-tam report`; returns status, the page without its pictures, and what was printed on stderr."""

    def make(*folders, more=()):
        output = tmp_path / "made" / "report.html"
        status = cli.main(["report", *map(str, folders), "--output", str(output), *more])
        text = output.read_text() if output.exists() else ""
        page.pictures = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]+)", text)]
        return status, re.sub(r"base64,[^\"]+", "", text), capsys.readouterr().err

    page = make
    page.folder = tmp_path / "made"
    return make


def cells(text, name):
    """The values of a row of a table."""
    (row,) = re.findall(rf"<tr><th>{re.escape(name)}</th>(.*?)</tr>", text, flags=re.DOTALL)
    return re.findall(r"<td>(.*?)</td>", row)


@pytest.mark.long
def test_the_page_holds_everything(tmp_path, page):
    runs = [write_run(tmp_path / f"adatamw-{seed}", seed=seed, eval_loss=0.25 + seed) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "plain", optim="adamw_torch", torque=False, eval_loss=0.5))
    status, text, errors = page(*runs)
    assert (status, errors) == (0, "")
    assert cells(text, "optim") == ["adatamw", "adatamw", "adamw_torch"]
    assert cells(text, "seed") == ["0", "1", "0"]
    assert cells(text, "learning_rate") == ["0.003"]
    assert "output_dir" not in text
    assert cells(text, "eval loss") == ["0.25", "1.25", "0.5"]
    assert cells(text, "tokens per second") == ["1,234"] * 3
    assert cells(text, "peak memory of the main process (MiB)") == ["601.5"] * 3
    assert "plain has no torque.jsonl: there is no heatmap of it." in text
    assert "from the least to the largest" in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:6] == ["Training loss", "Evaluation", "Gradient norm", "Damping over time",
                          "Damping by layer: adatamw-0", "Damping by layer: adatamw-1"]  # fmt: skip
    files = sorted(path.name for path in page.folder.glob("*.png"))
    assert len(files) == len(page.pictures) == 12
    assert all(picture.startswith(PNG) for picture in page.pictures)
    assert {(page.folder / name).read_bytes() for name in files} == set(page.pictures)
    assert len(set(page.pictures)) == 12  # the heatmaps of these two runs say whose they are
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", text)  # self-contained


def test_curves_are_means_and_ranges_over_seeds(tmp_path):
    folders = [write_run(tmp_path / f"{optim}-{seed}", optim=optim, seed=seed)
               for optim in ("adatamw", "adamw_torch") for seed in (0, 1, 5)]  # fmt: skip
    groups = group_runs(read_runs(folders))
    assert [group.label for group in groups] == ["optim=adatamw (3 runs)", "optim=adamw_torch (3 runs)"]
    curve = band(groups[0], "loss")
    assert curve.steps == [10, 20, 30]
    assert curve.mean == pytest.approx([6, 4, 40 / 30 + 2])
    assert curve.low == pytest.approx([4, 2, 40 / 30])
    assert curve.high == pytest.approx([9, 7, 40 / 30 + 5])
    assert band(groups[0], "eval_loss").mean == pytest.approx([4.0, 2.25])
    assert band(groups[0], "absent") is None


def test_a_setting_groups_on_demand(tmp_path, page):
    folders = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert [len(group.runs) for group in group_runs(read_runs(folders), by="seed")] == [2, 1]
    status, _, errors = page(*folders, more=["--group-by", "colour"])
    assert status == 1
    assert "--group-by colour: no run has such a setting (they have learning_rate, optim, seed)." in errors


def test_the_rows_of_the_heatmap_are_the_layers(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run")])
    maps = heatmaps(run)
    assert [one.part for one in maps] == ["lora_A", "lora_B"]
    for one in maps:
        assert one.layers == LAYERS
        assert one.steps == [10, 20, 30]
        assert one.values == [[step / 100 + number / 10 for step in (10, 20, 30)] for number in range(3)]
    (whole,) = heatmaps(read_runs([write_run(tmp_path / "full", parts=("",))])[0])
    assert (whole.part, whole.layers) == ("", LAYERS)


@pytest.mark.long
def test_a_name_is_only_a_name(tmp_path, page):
    """No markup on the page, no mathematics in the pictures, and an underscore hides nothing."""
    name = "_<script>alert(1)< $x^{$"
    status, text, _ = page(write_run(tmp_path / name, optim="<b>"))
    assert status == 0
    assert "<script>" not in text
    assert "<b>" not in text
    assert "_&lt;script&gt;alert(1)&lt; $x^{$" in text


def test_the_folder_of_a_plain_trainer(tmp_path, page):
    """Only its checkpoints have the log; the newest counts, by number."""
    for step, loss in ((5, 9.0), (10, 0.125)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        log = [{"step": step, "loss": loss, "epoch": 1.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "train_batch_size": 4}))
    status, text, _ = page(tmp_path / "run")
    assert status == 0
    assert cells(text, "train_batch_size") == ["4"]
    assert "run has no results.json: its settings are only what trainer_state.json tells." in text
    assert re.findall(r"<h2>(.*?)</h2>", text)[0] == "Training loss"
    assert read_runs([tmp_path / "run"])[0].series("loss") == {10: 0.125}


def test_the_heatmap_of_an_earlier_run_is_not_drawn(tmp_path, page):
    """adamw_torch trained into the folder of an adatamw run, whose torque.jsonl nobody has removed."""
    folder = write_run(tmp_path / "run", optim="adamw_torch", torque=False)
    earlier = write_run(tmp_path / "earlier")
    (folder / "torque.jsonl").write_bytes((earlier / "torque.jsonl").read_bytes())
    (run,) = read_runs([folder])
    assert run.torque == []
    status, text, _ = page(folder)
    assert status == 0
    assert "run has a torque.jsonl, and logged no torque: the file is of an earlier run into this folder" in text
    assert read_runs([earlier])[0].torque


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.json", b"{", "results.json is not JSON"),
        ("results.json", b"[]", "results.json holds no JSON object"),
        ("results.json", b"\xff\xfe", "results.json is not text in UTF-8"),
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl, line 2, is not JSON"),
        ("metrics.jsonl", b'{"loss": 1}\n', "metrics.jsonl has a row without a step"),
        ("torque.jsonl", b'{"step": 1}\n', "torque.jsonl has a row without a group"),
        ("torque.jsonl", None, "torque.jsonl cannot be read: Is a directory."),
    ],
)
def test_a_damaged_file_is_named(tmp_path, page, name, content, words):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    status, text, errors = page(folder)
    assert (status, text) == (1, "")
    assert len(errors.splitlines()) == 1
    assert f"{folder}/{words}" in errors


def test_a_line_that_a_killed_run_cut_short_is_dropped(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "torque.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(read_runs([folder])[0].torque) == 3 * 3 * 2 - 1


def test_what_is_no_run(tmp_path, page):
    (tmp_path / "empty").mkdir()
    assert "absent is not a folder: give the output_dir of a run." in page(tmp_path / "absent")[2]
    assert "empty holds no run: it has no results.json, metrics.jsonl" in page(tmp_path / "empty")[2]
    folder = write_run(tmp_path / "run")
    assert "a RUN is given twice" in page(folder, folder)[2]


def test_a_page_that_cannot_be_written(tmp_path, page):
    (tmp_path / "made").touch()
    status, _, errors = page(write_run(tmp_path / "run", torque=False))
    assert status == 1
    assert "report.html cannot be written" in errors
