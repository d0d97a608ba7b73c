"""Writes the golden checkpoints anew; `python -m tests.golden.make`, from the root of the repository.

Only for a new form of checkpoint, under a new name beside the old files: those stay, because users have such
checkpoints. What was saved after five steps stands in each file with the parameters after three more.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

import hf_tam
from tests.golden import runs, zero
from tests.sharding.processes import World


def main():
    """Write every file that is not there."""
    torch.set_num_threads(1)
    made = [*map(make_optimizer, runs.RUNS), make_trainer(), make_zero()]
    if not any(made):
        return "nothing to write: every file is there, and none is overwritten"
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
    libraries |= {"hf_tam": hf_tam.__version__, "python": platform.python_version(), "machine": platform.machine()}
    (runs.FOLDER / "provenance.json").write_text(json.dumps(libraries, indent=1) + "\n")
    return None


def make_optimizer(name):
    path = runs.FOLDER / f"{name}.pt"
    if path.exists():
        return False
    params, optimizer = runs.start(name)
    for number in range(runs.NUM_BEFORE):
        runs.step(params, optimizer, number)
    saved = {"params": [param.detach().clone() for param in params], "state_dict": optimizer.state_dict()}
    torch.save(saved, path)
    for number in range(runs.NUM_BEFORE, runs.NUM_BEFORE + runs.NUM_AFTER):
        runs.step(params, optimizer, number)
    torch.save({"params": [param.detach().clone() for param in params]}, runs.FOLDER / f"{name}.after.pt")
    return True


def make_trainer():
    folder = runs.FOLDER / "trainer"
    if folder.exists():
        return False
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # whose name is in no file then
        trainer = runs.trainer("outputs")
        trainer.train()
        shutil.copytree(Path("outputs", f"checkpoint-{runs.NUM_BEFORE}"), folder / f"checkpoint-{runs.NUM_BEFORE}")
        torch.save(trainer.model.state_dict(), folder / "after.pt")
    os.chdir(runs.FOLDER)
    return True


def make_zero():
    path = runs.FOLDER / "zero1.pt"
    if path.exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        world = World(1, folder)
        torch.save(world.run(zero.save_and_go_on)[0], path)
        world.close()
    return True


if __name__ == "__main__":
    sys.exit(main())
