"""A rank that dies, or stops answering: the others end with an error in time, and the next case has a whole world."""

import faulthandler
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.sharding import checkpoints
from tests.sharding.processes import World

# One worker runs all distributed tests.
pytestmark = pytest.mark.distributed

TIMEOUT_S = 8
"""Of the process group: long enough for two small models to be built at the same time on a busy machine."""
AT_LATEST_S = 40
"""The others know: gloo looks at its clock now and then, and other programs may have the cores."""
VICTIM, STEP = 1, 3


def train_until(number, name):
    """Rank 1 sends itself a signal inside the optimizer's own all-reduce; how long the others waited for it."""
    from hf_tam.sharding import groups

    model, optimizer = checkpoints.build(name, "AdaTAMW")
    checkpoints.train(model, optimizer, 0, STEP)
    original, called_at = groups._all_reduce, []

    def fatal(tensor, group, **options):
        called_at.append(time.monotonic())
        if dist.get_rank() == VICTIM:
            os.kill(os.getpid(), number)
        return original(tensor, group, **options)

    groups._all_reduce = fatal
    try:
        checkpoints.train(model, optimizer, STEP, STEP + 1)
    except RuntimeError as error:
        return time.monotonic() - called_at[0], str(error)
    return "the step was finished"


@pytest.mark.parametrize(
    ("name", "number", "at_least"),
    [
        ("fsdp1", signal.SIGKILL, 0.0),
        ("fsdp2", signal.SIGKILL, 0.0),
        ("fsdp2", signal.SIGSTOP, TIMEOUT_S - 1),  # a closed connection is noticed at once, this is not
    ],
)
def test_the_others_end_with_an_error(tmp_path, name, number, at_least):
    world = World(2, str(tmp_path), timeout_s=TIMEOUT_S)
    try:
        answers = world.answers(train_until, number, name, at_most=1)
    finally:
        world.kill()
    assert set(answers) == {0}
    waited, error = answers[0][0]
    assert at_least <= waited < AT_LATEST_S
    assert "gloo" in error or "Timed out" in error


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    """A world that is lost by every test, and used by the next one."""
    world = World(2, str(tmp_path_factory.mktemp("dying")), timeout_s=TIMEOUT_S)
    yield world
    world.close()


def sum_of_ranks():
    tensor = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(tensor)
    return os.getpid(), tensor.item()


def die(victim, how, *arguments):
    """The victim ends in the way that is asked for, the others wait for it."""
    if dist.get_rank() == victim:
        how(*arguments)
    dist.barrier()


def end_by_signal(number):
    os.kill(os.getpid(), number)


def print_and_abort():
    os.write(2, b"free(): invalid pointer\n")  # as glibc does
    os.abort()


def wait():
    while True:
        time.sleep(1)


def raise_an_error():
    raise ValueError("only here")


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


DEATHS = {
    "a segmentation fault": (0, faulthandler._sigsegv, [], ["rank 0 died of SIGSEGV", "in die", "Segmentation fault"]),
    "an abort": (1, print_and_abort, [], ["rank 1 died of SIGABRT", "in print_and_abort", "free(): invalid pointer"]),
    "the OOM killer": (1, end_by_signal, [signal.SIGKILL], ["rank 1 died of SIGKILL"]),
    "a real-time signal": (0, end_by_signal, [signal.SIGRTMIN + 3], [f"rank 0 died of signal {signal.SIGRTMIN + 3}"]),
    "an exit": (1, os._exit, [3], ["rank 1 ended with exit status 3"]),
    "a rank that hangs": (1, wait, [], ["rank 0 gave no answer", "in barrier", "rank 1 gave no answer", "in wait"]),
    "an answer that comes late": (1, time.sleep, [5], ["rank 0 gave no answer", "in barrier", "rank 1 gave no"]),
    "a rank that is stopped": (0, end_by_signal, [signal.SIGSTOP], ["rank 0 gave no answer in time"]),
    "an error on one rank": (1, raise_an_error, [], ["rank 1:\n", "ValueError: only here", "in barrier"]),
    "a result that cannot be sent": (None, None, [], ["rank 0:\n", "rank 1:\n", "pickle local object"]),
}
ENDLESS = ("a rank that hangs", "an answer that comes late", "a rank that is stopped", "an error on one rank")
ENDLESS_S = 3
"""Long enough for an idle process to begin with what it is given."""


def unsendable():
    return lambda: None


@pytest.mark.parametrize("death", DEATHS)
def test_one_death_costs_one_call(dying, monkeypatch, death):
    victim, how, arguments, expected = DEATHS[death]
    before, starts = dying.run(sum_of_ranks), dying.starts
    if death in ENDLESS:
        monkeypatch.setattr(dying, "task_timeout_s", ENDLESS_S)
    task = (die, victim, how, *arguments) if how else (unsendable,)
    with pytest.raises(AssertionError) as caught:
        dying.run(*task)
    monkeypatch.undo()
    for words in expected:
        assert words in str(caught.value)
    assert str(caught.value).startswith(expected[0])  # what came of it in the other ranks stands below
    after = dying.run(sum_of_ranks)
    assert [total for _, total in before] == [total for _, total in after] == [3.0, 3.0]
    assert dying.starts == starts + 1
    assert [pid for pid, _ in after] == [process.pid for process in dying.processes]
    assert not any(is_running(pid) for pid, _ in before)
    assert all(is_running(pid) for pid, _ in after)


def test_the_shared_worlds_outlive_a_dead_rank(worlds):
    """The fixture that all tests use: it is asked for a world again, and gives one that answers."""
    with pytest.raises(AssertionError, match="rank 0 died of SIGSEGV"):
        worlds(2, "norms").run(die, 0, faulthandler._sigsegv)
    assert [total for _, total in worlds(2, "norms").run(sum_of_ranks)] == [3.0, 3.0]
