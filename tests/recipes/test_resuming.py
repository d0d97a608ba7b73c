"""A resumed run says what differs from the run that it continues, keeps what it must, and leaves a finished one."""

import json
import shutil

import pytest

from recipes.support import resuming
from recipes.support.arguments import RunArguments
from tests.recipes.test_sft_options import parts, results_of


@pytest.mark.long
def test_other_arguments_are_named_and_the_optimizers_stay(sft, tmp_path):
    """The rate of the checkpoint's optimizer is what is used, so it is what is recorded."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    status, _, error = sft(*parts(whole))
    assert status == 0, error
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "arguments.json", resumed)
    others = ["--learning_rate=5e-2", "--seed=7", "--resume_from_checkpoint=true"]
    status, _, error = sft(*parts(resumed), *others)
    assert status == 0, error
    assert "learning_rate is 0.01 in the checkpoint, which stays; 0.05 is ignored" in error
    assert "other arguments than those of the run that is continued: seed 42 -> 7" in error
    assert results_of(resumed)["settings"]["SFTConfig"]["learning_rate"] == 0.01
    assert json.loads((resumed / "arguments.json").read_text())["learning_rate"] == 0.01


@pytest.mark.long
def test_finished_run_stays_as_it_is(sft, tmp_path):
    folder = tmp_path / "run"
    status, _, error = sft(*parts(folder, steps=2))
    assert status == 0, error
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, output, error = sft(*parts(folder, steps=2), "--resume_from_checkpoint=true")
    assert status == 0, error
    assert f"the run in {folder} is finished, and stays as it is" in output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    status, output, error = sft(*parts(folder, steps=4), "--resume_from_checkpoint=true")
    assert status == 0, error
    assert "max_steps 2 -> 4" in error
    assert results_of(folder)["steps"] == 4


def test_nothing_is_known_of_another_programs_checkpoint(tmp_path):
    assert resuming.compare(tmp_path, (RunArguments(),)) == []
    (tmp_path / "arguments.json").write_text("{")
    assert resuming.compare(tmp_path, (RunArguments(),)) == []


@pytest.mark.long
def test_a_file_that_changed_is_named(sft, tmp_path):
    """https://github.com/huggingface/transformers/issues/31044: the records that are left are others."""
    records, folder = tmp_path / "records.jsonl", tmp_path / "run"
    lines = [json.dumps({"text": f"the owl eats {count} mice"}) + "\n" for count in range(40)]
    flags = [f"--output_dir={folder}", f"--train_file={records}", "--save_steps=2", "--eval_strategy=no"]
    flags += ["--eval_on_start=false", "--resume_from_checkpoint=auto"]
    for steps, kept, is_said in ((2, 40, False), (4, 40, False), (6, 25, True)):
        records.write_text("".join(lines[:kept]))
        status, _, error = sft(f"--max_steps={steps}", *flags)
        assert status == 0, error
        assert ("train_file does not hold what it held when the run began" in error) == is_said
        assert ("other arguments" in error) == (steps > 2)
        assert "_contents" not in error
