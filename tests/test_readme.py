"""The README's commands are where .ci/run looks for them, and its numbers are those of recipes/results/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks():
    return re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_first_block_runs_the_main_job_and_the_second_the_tests():
    run, test = code_blocks()[:2]
    assert run.splitlines()[-1] == ".venv/bin/python recipes/sft.py"
    assert ".venv/bin/python -m pytest" in test.splitlines()[-1]


@pytest.mark.parametrize("block", code_blocks()[:2])
def test_one_command_a_line(block):
    assert not [line for line in block.splitlines() if line.startswith(("$", ">", "#")) or line.endswith("\\")]


def test_the_page_of_comparisons_is_generated():
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results.evidence import FOLDER, overview, page, step_sizes

    assert overview() in README
    assert step_sizes() in README
    assert page() == (FOLDER / "comparisons.md").read_text()
    assert "(at an end of the grid)" not in page()


def test_the_older_table_follows_its_rows(tmp_path):
    pytest.importorskip("pandas")
    from recipes.results.summary import ROWS, table

    changed = tmp_path / "rows.jsonl"
    changed.write_text(re.sub(r'"test_accuracy": 0\.\d', '"test_accuracy": 0.0', ROWS.read_text()))
    assert table(changed) != table()


def test_the_table_of_speed_is_generated():
    from recipes.results.speed import growth, inside_the_trainer, table

    assert table() in README
    assert growth() in README
    assert inside_the_trainer() in README


def test_the_table_of_speed_follows_the_raw_times(tmp_path):
    from recipes.results import speed

    times = {"seconds": [3.0, 6.0, 2.0], "baseline_seconds": [2.0, 3.0, 2.0], "ratio": {"median": 99.0}}
    row = {"optimizer": "adatamw", "baseline": "adamw", **times}
    facts = {"workload": "lora-7b", "dtype": "bfloat16", "device": "cpu", "processes": 1, "clip": False}
    run = {**facts, "load_average_after": [7.0, 1.0, 1.0], "rows": [row]}
    (tmp_path / "bench-made-up.json").write_text(json.dumps({"runs": [run]}))
    first, *others = speed.table(tmp_path).splitlines()[2:]
    assert "| <= 1.6 | not measured yet | 1.50 (1.00 to 2.00, 3 pairs) | 7.0 |" in first
    assert all("not measured yet" in line for line in others)
    assert sum("no GPU at hand" in line for line in others) == 8
    assert speed.table(tmp_path) not in README


@pytest.mark.long
def test_the_tables_of_comparisons_follow_their_rows(tmp_path):
    """Other test results give other tables, and the same choice of learning rates."""
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import evidence

    assert evidence.sections(tmp_path).count("not measured yet") == len(list(evidence.PLANS.glob("*.yaml")))
    for path in evidence.FOLDER.glob("compare-*.jsonl"):
        changed = re.sub(r'("test_(?:\w*accuracy|loss)": \d*\.)\d', r"\g<1>1", path.read_text())
        (tmp_path / path.name).write_text(changed)
        plan = evidence.PLANS / f"{path.stem.removeprefix('compare-')}.yaml"
        before, after = evidence.section(plan), evidence.section(plan, tmp_path)
        if "under way" in before:
            assert before == after
            continue
        assert before != after
        best = [re.findall(r"^\| [^|]+ \| ([\d.e-]+)", text, flags=re.MULTILINE)[:2] for text in (before, after)]
        assert best[0] == best[1]
    assert evidence.overview(tmp_path) not in README


def test_a_comparison_that_is_under_way_has_no_result(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import evidence

    name = "banking77-minilm-full"
    lines = (evidence.FOLDER / f"compare-{name}.jsonl").read_text().splitlines(keepends=True)
    for some in (lines[:1], lines[:-1]):
        (tmp_path / f"compare-{name}.jsonl").write_text("".join(some))
        assert evidence.section(evidence.PLANS / f"{name}.yaml", tmp_path).endswith(
            f"under way, [rows so far](compare-{name}.jsonl)."
        )
        assert name in evidence.overview(tmp_path).rpartition("Not measured yet:")[2]
    (tmp_path / f"compare-{name}.jsonl").write_text("".join(lines))
    assert "| AdaTAMW |" in evidence.section(evidence.PLANS / f"{name}.yaml", tmp_path)


def test_the_trainers_figure_follows_the_rates(tmp_path):
    from recipes.results import speed

    assert speed.inside_the_trainer(tmp_path).count("not measured yet") == 2
    rates = {"adatamw": [1.0, 3.0, 2.0], "adamw_torch_fused": [1.0, 2.0, 4.0]}
    facts = {"model": "m", "tensors": 3, "elements": 7, "tokens_per_second": rates, "ratio": {"median": 99.0}}
    (tmp_path / "bench-trainer.json").write_text(json.dumps(facts))
    assert "1.000 (0.500 to 1.500, 3 pairs of steps)" in speed.inside_the_trainer(tmp_path)


def test_the_growth_follows_the_raw_times(tmp_path):
    from recipes.results import speed

    row = {"seconds": [3.0, 6.0, 2.0], "baseline_seconds": [2.0, 3.0, 2.0], "ratio": {"median": 99.0}}
    runs = [{"workload": f"many-{size}", "tensors": size, "processes": 2, "rows": [row]} for size in (3000, 100)]
    assert speed.growth(tmp_path) == ""
    (tmp_path / "bench-made-up.json").write_text(json.dumps({"runs": runs}))
    assert speed.growth(tmp_path).splitlines()[2:] == [
        "| 100 | 2000.0 | 3000.0 | 1.50 (1.00 to 2.00, 3 pairs) |",
        "| 3,000 | 2000.0 | 3000.0 | 1.50 (1.00 to 2.00, 3 pairs) |",
    ]
