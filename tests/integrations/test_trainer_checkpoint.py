"""Harmed and half-written checkpoints: one error that names the file and says what to do, never a fresh start."""

import hashlib
import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hf_tam.integrations.transformers.checkpoint import last_complete_checkpoint, require_resumable, write_checksums
from tests.integrations.test_trainer import make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, save_strategy="steps", save_steps=2, max_steps=4).train()
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of a finished run with checkpoint-2 and checkpoint-4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(folder, checkpoint=True, **changes):
    trainer = make_trainer(folder, max_steps=5, **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x10
    path.write_bytes(bytes(content))


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_older(path):
    shutil.copy(path.parents[1] / "checkpoint-2" / path.name, path)


HARM = {
    "optimizer missing": ("optimizer.pt", Path.unlink, "is missing, so the optimizer would start afresh"),
    "scheduler missing": ("scheduler.pt", Path.unlink, "is missing, so the optimizer would start afresh"),
    "optimizer cut off": ("optimizer.pt", cut_off, "is cut off"),
    "optimizer empty": ("optimizer.pt", lambda path: path.write_bytes(b""), "is cut off"),
    "bit flipped early": ("optimizer.pt", lambda path: flip_a_bit(path, 0.2), "SHA-256 differs"),
    "bit flipped in a number": ("optimizer.pt", lambda path: flip_a_bit(path, 0.6), "SHA-256 differs"),
    "scheduler's bit flipped": ("scheduler.pt", lambda path: flip_a_bit(path, 0.5), "SHA-256 differs"),
    "of another step": ("optimizer.pt", replace_by_older, "SHA-256 differs"),
    "state missing": ("trainer_state.json", Path.unlink, "is missing or cut off"),
    "state cut off": ("trainer_state.json", cut_off, "is missing or cut off"),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_found_before_anything_is_loaded(run_folder, harm):
    name, inflict, words = HARM[harm]
    path = run_folder / "checkpoint-4" / name
    inflict(path)
    with pytest.raises(ValueError, match=words) as caught:
        resume(run_folder)
    assert str(path) in str(caught.value)


@pytest.mark.long
def test_the_error_names_the_checkpoint_to_go_on_from(run_folder):
    (run_folder / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="Delete the folder and resume from") as caught:
        resume(run_folder)
    assert str(run_folder / "checkpoint-2") in str(caught.value)
    assert resume(run_folder, str(run_folder / "checkpoint-2")).state.global_step == 5


def test_a_save_killed_at_any_moment_is_refused(run_folder):
    """The files in the order in which the Trainer writes them, each one cut off in its turn."""
    source, target = run_folder / "checkpoint-4", run_folder / "checkpoint-6"
    files = sorted((path for path in source.iterdir()), key=lambda path: path.stat().st_mtime_ns)
    assert files[-1].name == "trainer_state.json"
    target.mkdir()
    for path in files:
        (target / path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="is missing or cut off"):
            require(target, "whole")
        assert last_complete_checkpoint(run_folder) == source
        shutil.copy(path, target)
    require(target, "whole")
    assert last_complete_checkpoint(run_folder) == target


@pytest.mark.long
def test_without_checksums_a_checkpoint_is_accepted_unless_it_is_cut_off(run_folder):
    (run_folder / "checkpoint-4" / "optimizer.sha256").unlink()
    assert resume(run_folder).state.global_step == 5
    cut_off(run_folder / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt is cut off"):
        resume(run_folder, str(run_folder / "checkpoint-4"))


@pytest.mark.long
def test_other_optimizers_keep_the_behaviour_of_the_trainer(run_folder):
    (run_folder / "checkpoint-4" / "optimizer.pt").unlink()
    assert resume(run_folder, optim="adamw_torch").state.global_step == 5


def test_torchs_adamw_does_not_misread_our_state(run_folder):
    before = {path: path.read_bytes() for path in run_folder.rglob("*.pt")}
    with pytest.raises(ValueError, match=r"optimizer\.pt was saved by an optimizer of hf_tam.*--optim adamw_torch"):
        resume(run_folder, optim="adamw_torch", optim_args=None)
    assert {path: path.read_bytes() for path in run_folder.rglob("*.pt")} == before


class Explosive:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.long
def test_a_pickle_that_runs_code_is_refused(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    checkpoint = run_folder / "checkpoint-4"
    torch.save({"state": {0: {"step": Explosive()}}, "param_groups": []}, checkpoint / "optimizer.pt")
    write_checksums(checkpoint)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        resume(run_folder)
    assert not (run_folder / "exploded").exists()


def test_checksums_are_those_of_sha256sum(run_folder):
    lines = (run_folder / "checkpoint-4" / "optimizer.sha256").read_text().splitlines()
    expected = {name: _digest(run_folder / "checkpoint-4" / name) for name in ("optimizer.pt", "scheduler.pt")}
    assert lines == [f"{digest}  {name}" for name, digest in expected.items()]
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "optimizer.sha256"]
        subprocess.run(command, check=True, cwd=run_folder / "checkpoint-4", timeout=30)


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require(folder, strategy, *, weights_only_wanted=False):
    require_resumable(folder, strategy=strategy, weights_only_wanted=weights_only_wanted)


@pytest.mark.parametrize(
    ("strategy", "optimizer", "model"),
    [
        ("fsdp_full", "optimizer.bin", "pytorch_model_fsdp.bin"),
        ("fsdp_sharded", "optimizer_0", "pytorch_model_fsdp_0"),
    ],
)
def test_a_sharding_strategy_has_files_of_its_own(tmp_path, strategy, optimizer, model):
    (tmp_path / "trainer_state.json").write_text(json.dumps({}))
    require(tmp_path, "deepspeed", weights_only_wanted=True)  # transformers says what it cannot load
    with pytest.raises(ValueError, match="no optimizer shards of DeepSpeed's"):
        require(tmp_path, "deepspeed")
    with pytest.raises(ValueError, match=rf"{re.escape(optimizer)} is missing, so the optimizer would start afresh"):
        require(tmp_path, strategy)
    with pytest.raises(ValueError, match=rf"{re.escape(model)} is missing, and with it the model"):
        require(tmp_path, strategy, weights_only_wanted=True)
    torch.save({}, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "scheduler.pt")
    require(tmp_path, "whole")
    with pytest.raises(ValueError, match=rf"{re.escape(optimizer)} is missing, .* was saved by one process or DDP"):
        require(tmp_path, strategy)


def test_last_complete_checkpoint_counts_in_numbers_and_ignores_other_folders(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
