"""The output directory: refused before work is lost (row 26)."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_tam.integrations.transformers.checkpoint import last_complete_checkpoint
from recipes.support import checkpoints, output
from recipes.support.errors import RecipeError


def test_directory_that_is_not_empty_is_refused_and_left_alone(sft):
    sft.output_dir.mkdir()
    (sft.output_dir / "notes.txt").write_text("mine")
    status, _, error = sft("--dataset_name", "demo")
    assert status == 1
    assert "is not empty" in error
    assert "--overwrite" in error
    assert [path.name for path in sft.output_dir.iterdir()] == ["notes.txt"]


@pytest.mark.long
def test_overwrite_replaces_the_run_and_keeps_what_is_not_the_recipe_s(sft):
    stale = sft.output_dir / "checkpoint-999"
    stale.mkdir(parents=True)
    (sft.output_dir / "notes.txt").write_text("mine")
    (sft.output_dir / "metrics.jsonl").write_text('{"step": 999, "epoch": 9, "loss": 0}\n')
    status, _, error = sft("--dataset_name", "demo", "--overwrite")
    assert status == 0, error
    assert not stale.exists()
    assert (sft.output_dir / "notes.txt").read_text() == "mine"
    rows = [json.loads(line) for line in (sft.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3


def test_file_in_place_of_the_directory(sft):
    sft.output_dir.write_text("a file")
    status, _, error = sft("--dataset_name", "demo")
    assert (status, "is a file" in error) == (1, True)


def test_parent_that_cannot_hold_a_directory(sft, tmp_path):
    (tmp_path / "file").write_text("a file")
    status, _, error = sft("--dataset_name", "demo", "--output_dir", tmp_path / "file" / "out")
    assert status == 1
    assert "cannot be written: Not a directory" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(sft, tmp_path):
    sft.output_dir.mkdir(mode=0o500)
    status, _, error = sft("--dataset_name", "demo")
    assert status == 1
    assert "cannot be written: Permission denied" in error


def test_disk_that_is_too_small_is_refused_before_training(sft, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    status, _, error = sft("--dataset_name", "demo")
    assert status == 1
    assert "two checkpoints of this model need" in error
    assert not sft.output_dir.exists()


def test_space_needed_counts_what_is_saved(tiny_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    needed = 2 * parameters * (4 + 8)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    output.check_disk_space(tmp_path, model, full=True)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(RecipeError, match="free some space"):
        output.check_disk_space(tmp_path, model, full=True)


@pytest.mark.long
def test_disk_that_fills_up_in_training_is_named(sft, monkeypatch):
    """The second probe fails, as it does once a save has failed for want of space."""
    from transformers import Trainer

    def fail(self, *arguments, **options):
        # From here on nothing can be written, which is what the recipe finds when it looks for the cause.
        monkeypatch.setattr(output, "check_writable", refuse)
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")

    def refuse(directory):
        raise RecipeError(f"output_dir {directory} cannot be written: No space left on device.")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    status, _, error = sft("--dataset_name", "demo", "--save_strategy", "steps")
    assert status == 1
    assert "No space left on device. The run stopped: no checkpoint had been written" in error


@pytest.mark.long
@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root can mount a small disk")
def test_disk_that_is_really_full(sft, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6M", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this sandbox does not allow mounting")
    try:
        options = ["--save_strategy", "steps", "--save_steps", 1, "--max_steps", 20, "--output_dir", disk / "run"]
        options += ["--save_total_limit", 99]
        status, _, error = sft("--dataset_name", "demo", "--eval_strategy", "no", *options)
        assert status == 1
        assert "No space left on device. The run stopped: make room and resume from" in error
        named = error.rsplit("resume from ", 1)[1].strip().rstrip(".")
        assert last_complete_checkpoint(disk / "run") == Path(named)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.long
def test_other_failures_in_training_are_not_blamed_on_the_disk(sft, monkeypatch):
    from transformers import Trainer

    def fail(self, *arguments, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        sft("--dataset_name", "demo")


@pytest.mark.long
def test_incomplete_checkpoints_are_passed_over(sft):
    assert sft("--dataset_name", "demo", "--save_strategy", "steps", "--save_steps", "1")[0] == 0
    newest, half = sft.output_dir / "checkpoint-3", sft.output_dir / "checkpoint-4"
    shutil.copytree(newest, half)
    (half / "trainer_state.json").write_text((newest / "trainer_state.json").read_text()[:100])
    arguments = SimpleNamespace(
        resume_from_checkpoint="true", output_dir=str(sft.output_dir), world_size=1, save_only_model=False
    )
    assert checkpoints.checkpoint_to_resume(arguments) == newest
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:500])
    with pytest.raises(RecipeError, match=r"optimizer\.pt is cut off"):
        checkpoints.checkpoint_to_resume(arguments)


@pytest.mark.parametrize(
    ("choice", "message"),
    [("true", "has no complete checkpoint"), ("elsewhere", "trainer_state.json is missing")],
)
def test_resuming_from_nothing_is_an_error(choice, message, sft):
    status, _, error = sft("--dataset_name", "demo", "--resume_from_checkpoint", choice)
    assert status == 1
    assert message in error


@pytest.mark.long
def test_auto_starts_afresh_where_there_is_nothing_to_resume(sft):
    status, _, error = sft("--dataset_name", "demo", "--resume_from_checkpoint", "auto")
    assert status == 0, error
