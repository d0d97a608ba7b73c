"""Runs leave one row each, are not done twice, and a failed one costs nobody else's."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import yaml

pytest.importorskip("scipy")

from hf_tam.cli import main
from hf_tam.lab.compare import running
from hf_tam.lab.compare.journal import ROWS_NAME, Journal
from hf_tam.lab.compare.plan import PlanError, load_plan

# Stands for a recipe: its accuracy is best at 4e-3 for AdamW, at 2e-3 for ours, and a little higher there.
RECIPE = """
import json, math, pathlib, sys
words = {}
names = iter(sys.argv[1:])
for word in names:
    name, _, value = word.partition("=")
    words[name.removeprefix("--")] = value or next(names)
rate, seed = float(words["learning_rate"]), int(words["seed"])
ours = words["optim"] == "adatamw"
folder = pathlib.Path(words["output_dir"])
(folder.parent / "calls").open("a").write(f"{words['optim']} {rate:g} {seed} {words['place']}\\n")
if words.get("fails") in ("every", f"{words['optim']} {rate:g} {seed}"):
    sys.exit("classify.py: error: the disk is full")
accuracy = 0.6 + 0.01 * ours - 0.1 * math.log(rate / (2e-3 if ours else 4e-3)) ** 2 + 0.001 * seed
folder.mkdir()
(folder / "weights").write_text("much")
results = {"optimizer": "AdaTAMW" if ours else "AdamW", "eval_accuracy": accuracy, "test_accuracy": accuracy - 0.05}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def bench(tmp_path):
    """A plan, a recipe that takes no time, and the ways to run them."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "out").mkdir()

    class Bench:
        def __init__(self):
            self.folder = tmp_path / "out"
            self.said = []

        def plan(self, **changes):
            content = {
                "recipe": "classify",
                "arguments": {"place": "{data}/x"},
                "optimizers": {"AdamW": {"optim": "adamw_torch"}, "ours": {"optim": "adatamw"}},
                "learning_rates": [1e-3, 2e-3],
                "seeds": [0, 1, 2],
                "search_seeds": 1,
                **changes,
            }
            (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
            return load_plan(tmp_path / "plan.yaml")

        def run(self, plan, engine=running.locally, metrics=("eval_accuracy", "test_accuracy")):
            workshop = running.Workshop(tmp_path / "recipe.py", self.folder, 1, {"data": "/somewhere"}, 2, metrics)
            journal = Journal(self.folder / ROWS_NAME)
            return running.compare(plan, journal, partial(engine, workshop), self.said.append)

        def calls(self):
            return (self.folder / "calls").read_text().splitlines()

    return Bench()


@pytest.mark.launch
def test_searches_extends_and_finishes(bench):
    """Best at 4e-3 and 2e-3: the grid grows to 4e-3, then to 8e-3, for both; the other seeds at the best rate only."""
    rows = bench.run(bench.plan())
    done = {(row["label"], row["learning_rate"], row["seed"]) for row in rows}
    search = {(label, rate, 0) for label in ("AdamW", "ours") for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    final = {("AdamW", 4e-3, seed) for seed in (1, 2)} | {("ours", 2e-3, seed) for seed in (1, 2)}
    assert done == search | final
    assert len(bench.calls()) == len(done)
    assert all(call.endswith("/somewhere/x") for call in bench.calls())
    assert [line for line in bench.said if "end of the grid" in line] == [
        "a best learning rate lies at an end of the grid: all optimizers are run at 0.004 too",
        "a best learning rate lies at an end of the grid: all optimizers are run at 0.008 too",
    ]
    row = json.loads((bench.folder / ROWS_NAME).read_text().splitlines()[0])
    assert row["optimizer"] == {"AdamW": "AdamW", "ours": "AdaTAMW"}[row["label"]]
    assert "{data}/x" in row["command"]  # the row goes from machine to machine
    assert "/somewhere" not in json.dumps(row)
    assert not list(bench.folder.glob("*/weights"))


@pytest.mark.launch
def test_nothing_is_done_twice(bench):
    first = bench.run(bench.plan())
    number = len(bench.calls())
    assert bench.run(bench.plan()) == first
    assert len(bench.calls()) == number
    more = bench.run(bench.plan(seeds=[0, 1, 2, 3]))
    assert len(more) == len(first) + 2
    assert len(bench.calls()) == number + 2


@pytest.mark.launch
def test_rows_of_other_settings_are_left_aside(bench):
    first = bench.run(bench.plan())
    other = bench.run(bench.plan(arguments={"place": "{data}/x", "warmup_steps": 0.1}))
    assert len(other) == len(first)
    assert not {row["key"] for row in first} & {row["key"] for row in other}


@pytest.mark.launch
def test_extensions_end(bench):
    rows = bench.run(bench.plan(max_extensions=0))
    assert {row["learning_rate"] for row in rows} == {1e-3, 2e-3}


@pytest.mark.launch
def test_a_failed_run_keeps_the_others(bench):
    plan = bench.plan(arguments={"place": "{data}/x", "fails": "adatamw 0.001 0"})
    with pytest.raises(running.RunError, match=r"1 of 4 runs failed; the first: ours, learning rate 0\.001, seed 0"):
        bench.run(plan)
    rows = Journal(bench.folder / ROWS_NAME).of(plan)
    assert len(rows) == 3
    number = len(bench.calls())
    with pytest.raises(running.RunError, match=r"1 of 1 .*: classify.py: error: the disk is full \(all of it: "):
        bench.run(plan)
    assert len(bench.calls()) == number + 1


@pytest.mark.launch
def test_a_metric_that_is_not_there(bench):
    with pytest.raises(
        running.RunError, match=r"no metric 'eval_f1' in its results\.json; it has eval_accuracy, test"
    ):
        bench.run(bench.plan(), metrics=("eval_f1", "test_accuracy"))


@pytest.mark.launch
def test_a_kill_between_two_runs(bench):
    """The next call goes on with what is missing."""

    def stops_after_two(workshop, specs, keep):
        running.locally(workshop, specs[:2], keep)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.plan(), stops_after_two)
    assert len(bench.calls()) == 2
    rows = bench.run(bench.plan())
    assert len(bench.calls()) == len(rows)


@pytest.mark.launch
def test_a_line_that_was_cut_off_is_done_again(bench):
    rows = bench.run(bench.plan())
    path = bench.folder / ROWS_NAME
    path.write_text(path.read_text()[:-20])
    number = len(bench.calls())
    assert len(bench.run(bench.plan())) == len(rows)
    assert len(bench.calls()) == number + 1
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(PlanError, match=r"rows\.jsonl, line 1, is not a row"):
        Journal(path)


@pytest.mark.launch
def test_a_line_break_that_was_cut_off_costs_nothing(bench):
    bench.run(bench.plan())
    path = bench.folder / ROWS_NAME
    whole = path.read_text()
    path.write_text(whole[:-1])
    number = len(bench.calls())
    bench.run(bench.plan(seeds=[0, 1, 2, 3]))
    assert len(bench.calls()) == number + 2
    assert path.read_text().startswith(whole)
    assert len(Journal(path).of(bench.plan())) == number + 2


@pytest.mark.launch
def test_reading_leaves_the_file_as_it_is(bench):
    """Somebody else may be writing just then."""
    bench.run(bench.plan())
    path = bench.folder / ROWS_NAME
    path.write_text(path.read_text()[:-20])
    before = path.read_bytes()
    assert Journal(path).of(bench.plan())
    assert path.read_bytes() == before


@pytest.mark.launch
def test_an_optimizer_may_get_another_name(bench):
    first = bench.run(bench.plan())
    number = len(bench.calls())
    renamed = {"AdamW": {"optim": "adamw_torch"}, "theirs": {"optim": "adatamw"}}
    rows = bench.run(bench.plan(optimizers=renamed))
    assert len(bench.calls()) == number
    names = {"AdamW": "AdamW", "ours": "theirs"}
    assert rows == [{**row, "label": names[row["label"]]} for row in first]


@pytest.mark.launch
def test_rows_of_another_recipe_are_left_aside(bench):
    first = bench.run(bench.plan())
    assert len(bench.run(bench.plan(recipe="vision"))) == len(first)
    assert len(bench.calls()) == 2 * len(first)


@pytest.mark.launch
def test_a_row_of_an_older_version_has_its_recipe_in_its_command(bench):
    first = bench.run(bench.plan())
    path = bench.folder / ROWS_NAME
    rows = [{name: value for name, value in row.items() if name != "recipe"} for row in first]
    path.write_text("".join(json.dumps(row).replace("/recipe.py", "/classify.py") + "\n" for row in rows))
    assert len(Journal(path).of(bench.plan())) == len(first)
    assert not Journal(path).of(bench.plan(recipe="vision"))


@pytest.mark.launch
def test_where_all_fail_the_rest_is_not_tried(bench, capsys):
    plan = bench.plan(arguments={"place": "{data}/x", "fails": "every"})
    with pytest.raises(running.RunError, match=r"the first 3 runs all failed; the first: .*disk is full"):
        bench.run(plan)
    assert len(bench.calls()) < 6  # two at a time: one or two more had begun
    assert capsys.readouterr().out.count("failed: ") == 3


@pytest.mark.launch
def test_what_a_run_that_was_cut_off_has_left_is_removed(bench):
    plan = bench.plan()
    left = bench.folder / f"{plan.spec('AdamW', 1e-3, 0).key}-123"
    left.mkdir()
    (left / "weights").write_text("much")
    bench.run(plan)
    assert not left.exists()


def test_ray_does_the_same(bench):
    pytest.importorskip("ray")
    from hf_tam.lab.compare.on_ray import with_ray

    rows = bench.run(bench.plan(), with_ray)
    done = sorted((row["label"], row["learning_rate"], row["seed"]) for row in rows)
    assert len(done) == 12
    assert len(bench.calls()) == 12


@pytest.mark.launch
def test_command(tmp_path, capsys):
    """A real recipe, its demo, in a process of its own."""
    content = {
        "recipe": "classify",
        "arguments": {"num_train_epochs": "{epochs}", "save_strategy": "no", "max_train_samples": 64},
        "optimizers": {"AdamW": {"optim": "adamw_torch"}, "AdaTAMW": {"optim": "adatamw"}},
        "learning_rates": [1e-3],
        "seeds": [0],
        "max_extensions": 0,
    }
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["compare", str(tmp_path / "demo.yaml"), f"--output={tmp_path / 'out'}"]
    assert main([*words]) == 1
    assert "the plan has {epochs}: say what it stands for by --place epochs=PATH" in capsys.readouterr().err
    assert main([*words, "--place", "epochs=1", "--place", "other=1"]) == 1
    assert "--place other: the plan has no {other}" in capsys.readouterr().err
    assert main([*words, "--place", "epochs=1", "--jobs=2", "--threads=1"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^\| AdaTAMW \| 0\.001 \(at an end of the grid\) \| [\d.]+ \| [\d.]+ \| 1 \|", output, re.M)
    assert "| learning rate | AdamW | AdaTAMW |" in output
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert {row["optimizer"] for row in rows} == {"AdamW", "AdaTAMW"}
    assert all(row["metrics"]["eval_accuracy"] is not None for row in rows)
    assert main([*words, "--table"]) == 0
    assert capsys.readouterr().out == output[output.index("| optimizer") :]


@pytest.mark.launch
def test_a_folder_is_of_one_process_and_of_one_data_set(tmp_path, capsys):
    from filelock import FileLock

    content = {
        "recipe": "classify",
        "arguments": {"train_file": "{data}/train.csv"},
        "optimizers": {"AdamW": {"optim": "adamw_torch"}},
        "learning_rates": [1e-3],
        "seeds": [0],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["compare", str(tmp_path / "p.yaml"), f"--output={tmp_path / 'out'}"]
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "lock"):
        assert main([*words, "--place=data=one"]) == 1
    assert "out is in use by another `hf-tam compare`: wait, or" in capsys.readouterr().err
    assert main([*words, "--place=data=one"]) == 1  # there is no such file
    assert "failed" in capsys.readouterr().err
    assert main([*words, "--place=data=two"]) == 1
    assert "out was begun with --place data=one, not two: give another --output, or," in capsys.readouterr().err


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_runs_too(number, tmp_path):
    """And says that what was finished is kept."""
    content = {
        "recipe": "classify",
        "arguments": {"num_train_epochs": 500, "save_strategy": "no"},
        "optimizers": {"AdamW": {"optim": "adamw_torch"}},
        "learning_rates": [1e-3],
        "seeds": [0],
    }
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["compare", str(tmp_path / "long.yaml"), f"--output={tmp_path / 'out'}"]
    program = "import sys; from hf_tam.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, or nohup, which may be running the tests, ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 200
        children = []
        while not children and time.monotonic() < deadline:
            time.sleep(0.1)
            # The log is opened a moment before the run is started.
            children = children_of(process.pid) if list(tmp_path.glob("out/*.log")) else []
        (child,) = children
        process.send_signal(number)
        _, error = process.communicate(timeout=200)
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_running(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it had started
    assert process.returncode == 130
    assert "stopped; the rows that were finished are kept" in error


def children_of(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_bad_use_is_one_sentence(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none.yaml")]) == 1
    assert re.fullmatch(r"hf-tam compare: .*none\.yaml cannot be read: .*\n", capsys.readouterr().err)
    (tmp_path / "good.yaml").write_text(
        "{recipe: classify, optimizers: {a: {optim: x}}, learning_rates: [1], seeds: [0]}"
    )
    (tmp_path / "file").write_text("")
    assert main(["compare", str(tmp_path / "good.yaml"), f"--output={tmp_path / 'file' / 'x'}"]) == 1
    assert re.fullmatch(r"hf-tam compare: .*Not a directory.*\n", capsys.readouterr().err)
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\n")
    assert main(["compare", str(tmp_path / "good.yaml"), f"--output={tmp_path}"]) == 1
    assert "rows.jsonl, line 1, is not a row of a comparison: b'" in capsys.readouterr().err
