"""A rank that dies, or stops answering, in the middle of a step: the others end with an error in time."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from tests.sharding import checkpoints
from tests.sharding.processes import World

# One worker runs all distributed tests.
pytestmark = pytest.mark.distributed

TIMEOUT_S = 6
"""Of the process group: long enough for two small models to be built at the same time on a busy machine."""
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
    assert at_least <= waited < TIMEOUT_S + 3  # gloo looks at its clock now and then
    assert "gloo" in error or "Timed out" in error
