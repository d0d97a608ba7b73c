"""A kill inside the write of a checkpoint, and files that are missing or cut off: named, and never resumed from."""

import functools
import random
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch.distributed as dist

from hf_tam.integrations.accelerate.checkpoint import last_complete_state
from hf_tam.integrations.transformers.checkpoint import last_complete_checkpoint, require_resumable
from tests.sharding import checkpoints, trainer_runs
from tests.sharding import test_accelerator_checkpoints as accelerated
from tests.sharding.checkpoints import SAVED_AT
from tests.sharding.cpu_fsdp import fsdp_on_cpu
from tests.sharding.killing import Fuse
from tests.sharding.processes import World
from tests.sharding.trainer_runs import FULL, RANKS, SHARDED, checkpoint

# One worker runs them all, so that the worlds are started once.
pytestmark = pytest.mark.distributed

TIMEOUT_S = 60
"""Of the collectives of ranks that outlive a killed one: they notice at once, unless the machine is very busy."""
STRATEGIES = {(1, SHARDED): "fsdp_sharded", (2, SHARDED): "fsdp_sharded", (2, FULL): "fsdp_full", None: "whole"}
# The runs of the Trainer: the first checkpoint is complete, the second one is broken off.
FIRST, SECOND = 10, 12
SAVES = {"max_steps": SECOND, "save_steps": FIRST}  # and at the end


@pytest.fixture
def doomed(tmp_path):
    """A world of its own, some of whose processes will be killed."""
    (tmp_path / "store").mkdir()
    world = World(RANKS, str(tmp_path / "store"), timeout_s=TIMEOUT_S)
    yield world
    world.kill()


def budgets(victims, written, seed):
    """At which byte each victim dies: anywhere in what it writes."""
    generator = random.Random(seed)
    return {rank: generator.randrange(written[rank]) for rank in victims}


def assert_killed(world, answers, victims):
    """SIGKILL took a victim, and whoever outlived it ended with an error, not by a timeout of the test."""
    died = set(range(RANKS)) - set(answers)
    assert died
    assert died <= set(victims)
    assert all(result is None and "Error" in error for result, error in answers.values())
    for rank in died:
        world.processes[rank].join(TIMEOUT_S)
        assert world.processes[rank].exitcode == -signal.SIGKILL


def train_with_fuse(folder, plugin, budgets, resume=None):
    """The Trainer's run; what was written for the second checkpoint, unless it ends in the middle of that."""
    budget = budgets.get(dist.get_rank())
    with Fuse(checkpoint(folder, SECOND), budget).lit() as fuse:
        result = trainer_runs.train(folder, plugin, resume, SAVES)
    return fuse.written, result


@pytest.fixture(scope="module")
def whole_run(worlds, tmp_path_factory):
    """Of a run of the Trainer that is not killed: its folder, the bytes each rank wrote, and what it ended with."""

    @functools.cache
    def run(plugin):
        folder = str(tmp_path_factory.mktemp("whole"))
        results = worlds(RANKS).run(train_with_fuse, folder, plugin, {})
        return folder, [written for written, _ in results], results[0][1]

    return run


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("plugin", "victims", "seed", "again"),
    [
        ((2, SHARDED), (0,), 1, True),
        slow((2, SHARDED), (1,), 2, False),
        slow((2, FULL), (0,), 4, False),
        ((2, FULL), (1,), 5, False),
        slow((1, SHARDED), (0, 1), 6, False),
        (None, (0,), 7, True),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_the_trainer_killed_inside_a_write(worlds, doomed, whole_run, tmp_path, plugin, victims, seed, again):
    """With `again` the checkpoint was there before, complete, and is written a second time."""
    whole_folder, written, expected = whole_run(plugin)
    folder, previous = tmp_path / "run", None
    if again:
        shutil.copytree(whole_folder, folder)
        previous = checkpoint(folder, FIRST)
    answers = doomed.answers(train_with_fuse, str(folder), plugin, budgets(victims, written, seed), previous)
    assert_killed(doomed, answers, victims)
    half = Path(checkpoint(folder, SECOND))
    assert last_complete_checkpoint(folder) == Path(checkpoint(folder, FIRST))
    with pytest.raises(ValueError, match="not written to its end") as caught:
        require_resumable(half, strategy=STRATEGIES[plugin], weights_only_wanted=False)
    assert str(half) in str(caught.value)
    assert f"resume from {checkpoint(folder, FIRST)}" in str(caught.value)
    previous = str(last_complete_checkpoint(folder))
    resumed = worlds(RANKS, "resumed").run(trainer_runs.train, str(folder), plugin, previous, SAVES)
    assert resumed[0] == expected
    assert last_complete_checkpoint(folder) == half  # written again over what was left


def save_twice_with_fuse(folder, plugin, budgets):
    """Accelerator.save_state after 12 steps and after 14; what was written the second time, unless killed in it."""
    with fsdp_on_cpu():
        accelerator, model, optimizer, scheduler = accelerated.prepare(plugin, "AdaTAMW")
        accelerated.train(model, optimizer, scheduler, 0, SAVED_AT)
        accelerator.save_state(f"{folder}/first")
        saved = checkpoints.snapshot(model, optimizer.optimizer)
        checkpoints.write_expected(f"{folder}/first", {"saved": saved})
        accelerated.train(model, optimizer, scheduler, SAVED_AT, SAVED_AT + 2)
        with Fuse(f"{folder}/second", budgets.get(dist.get_rank())).lit() as fuse:
            accelerator.save_state(f"{folder}/second")
        return fuse.written


def load_half_and_whole(folder, plugin):
    """The error on loading the second folder, and what differs from what was saved in the first."""
    with fsdp_on_cpu():
        accelerator, model, optimizer, _ = accelerated.prepare(plugin, "AdaTAMW")
        error = error_of(accelerator.load_state, f"{folder}/second")
        accelerator.load_state(f"{folder}/first")
        expected = checkpoints.read_expected(f"{folder}/first")["saved"]
        return error, checkpoints.differences(checkpoints.snapshot(model, optimizer.optimizer), expected)


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def whole_states(worlds, tmp_path_factory):
    """Of save_state that is not killed: the folder, and the bytes that each rank wrote the second time."""

    @functools.cache
    def save(plugin):
        folder = tmp_path_factory.mktemp("states")
        written = worlds(RANKS).run(save_twice_with_fuse, str(folder), plugin, {})
        assert last_complete_state(folder) == folder / "second"
        return folder, written

    return save


@pytest.mark.parametrize(
    ("plugin", "victims", "seed", "again"),
    [
        ((2, SHARDED), (0,), 11, True),
        slow((2, SHARDED), (1,), 12, False),
        ((2, FULL), (1,), 15, True),
        slow((1, FULL), (0,), 16, False),
        slow(None, (0, 1), 17, False),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_save_state_killed_inside_a_write(worlds, doomed, whole_states, tmp_path, plugin, victims, seed, again):
    whole_folder, written = whole_states(plugin)
    folder = tmp_path / "states"
    if again:
        shutil.copytree(whole_folder, folder)
    folder.mkdir(exist_ok=True)
    where = budgets(victims, written, seed)
    assert_killed(doomed, doomed.answers(save_twice_with_fuse, str(folder), plugin, where), victims)
    assert last_complete_state(folder) == folder / "first"
    for error, different in worlds(RANKS, "resumed").run(load_half_and_whole, str(folder), plugin):
        assert error.startswith(str(folder / "second"))  # the file
        assert f"not written to its end, or was damaged since. Load {folder / 'first'} instead" in error
        assert different == []


def test_new_and_old_files_are_no_checkpoint(worlds, doomed, whole_states, tmp_path):
    """Killed between two files that are written a second time: every file has the size it had, some are older."""
    plugin = (2, FULL)
    folder = Path(shutil.copytree(whole_states(plugin)[0], tmp_path / "states"))
    first_file = folder / "second" / "pytorch_model_fsdp.bin"
    answers = doomed.answers(save_twice_with_fuse, str(folder), plugin, {0: first_file.stat().st_size})
    assert_killed(doomed, answers, (0,))
    assert zipfile.is_zipfile(first_file)
    assert last_complete_state(folder) == folder / "first"
    for error, different in worlds(RANKS, "resumed").run(load_half_and_whole, str(folder), plugin):
        assert "complete.json is empty" in error
        assert different == []


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def shards(folder):
    return [f"{folder}/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")]


MODEL_SHARDS, OPTIMIZER_SHARDS = shards("pytorch_model_fsdp_0"), shards("optimizer_0")
# What is done to which files of a checkpoint; each must be named.
TRAINER_HARM = {
    (2, SHARDED): [
        (cut_off, [*MODEL_SHARDS, *OPTIMIZER_SHARDS, "scheduler.pt", "rng_state_1.pth", "trainer_state.json"]),
        (Path.unlink, [*MODEL_SHARDS, *OPTIMIZER_SHARDS, "scheduler.pt", "trainer_state.json"]),
        (shutil.rmtree, ["pytorch_model_fsdp_0", "optimizer_0"]),
    ],
    (1, FULL): [
        (cut_off, ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "model.safetensors"]),
        (Path.unlink, ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt"]),
        (flip_a_bit, ["optimizer.bin", "scheduler.pt"]),
    ],
}
STATE_HARM = {
    (2, SHARDED): [
        (cut_off, [*MODEL_SHARDS, *OPTIMIZER_SHARDS, "scheduler.bin", "random_states_1.pkl", "complete.json"]),
        (Path.unlink, [*MODEL_SHARDS, *OPTIMIZER_SHARDS, "scheduler.bin", "random_states_1.pkl"]),
    ],
    (2, FULL): [
        (cut_off, ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]),
        (Path.unlink, ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]),
    ],
    None: [
        (cut_off, ["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]),
        (Path.unlink, ["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]),
    ],
}


def harmed_copies(folder, source, harms):
    """A copy of `source` for every harm, with what was done to which file."""
    copies = []
    for inflict, names in harms:
        for name in names:
            copy = Path(shutil.copytree(source, folder / f"checkpoint-{100 + len(copies)}"))
            inflict(copy / name)
            copies.append((inflict.__name__, str(copy), name))
    return copies


def errors_of_trainer(folder, plugin, copies):
    with fsdp_on_cpu():
        trainer = trainer_runs.make(folder, plugin)
        return [error_of(trainer.train, resume_from_checkpoint=copy) for copy in copies]


def errors_of_load_state(plugin, copies):
    with fsdp_on_cpu():
        accelerator = accelerated.prepare(plugin, "AdaTAMW")[0]
        return [error_of(accelerator.load_state, copy) for copy in copies]


def assert_named(copies, ranks):
    for errors in ranks:
        for (harm, copy, name), error in zip(copies, errors, strict=True):
            assert str(Path(copy, name)) in error, (harm, name, error)


@pytest.mark.parametrize("plugin", TRAINER_HARM, ids=str)
def test_the_trainer_names_the_file(worlds, whole_run, tmp_path, plugin):
    copies = harmed_copies(tmp_path, checkpoint(whole_run(plugin)[0], FIRST), TRAINER_HARM[plugin])
    folders = [copy for _, copy, _ in copies]
    assert_named(copies, worlds(RANKS, "resumed").run(errors_of_trainer, str(tmp_path), plugin, folders))


@pytest.mark.parametrize("plugin", STATE_HARM, ids=str)
def test_load_state_names_the_file(worlds, whole_states, tmp_path, plugin):
    copies = harmed_copies(tmp_path, whole_states(plugin)[0] / "second", STATE_HARM[plugin])
    folders = [copy for _, copy, _ in copies]
    assert_named(copies, worlds(RANKS, "resumed").run(errors_of_load_state, plugin, folders))
