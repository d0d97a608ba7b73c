"""The README's commands are where .ci/run looks for them, and its numbers are those of recipes/results/."""

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


def test_the_table_of_results_is_generated():
    pytest.importorskip("pandas")
    from recipes.results.summary import table

    assert table() in README


def test_the_table_follows_its_rows(tmp_path):
    pytest.importorskip("pandas")
    from recipes.results.summary import ROWS, table

    changed = tmp_path / "rows.jsonl"
    changed.write_text(re.sub(r'"test_accuracy": 0\.\d', '"test_accuracy": 0.0', ROWS.read_text()))
    assert table(changed) not in README
