"""One rank of DeepSpeed's ZeRO-1: its flat buffer, and the table of the logical tensors in it."""

import copy

from tests.golden.runs import NUM_AFTER, NUM_BEFORE
from tests.sharding import zero_engine
from tests.sharding.trained import Model, batches_of_steps


def save_and_go_on():
    """Save after five steps; returns that, and the parameters then and three steps later."""
    trained = _start()
    _step(trained, range(NUM_BEFORE))
    (buffer,) = trained.stepped()
    saved = {
        "buffer": buffer.detach().clone(),
        "state_dict": copy.deepcopy(trained.optimizer.state_dict()),
        "stats": trained.optimizer.torque_stats()["torque"],
    }
    _step(trained, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER))
    return {**saved, "after": trained.whole_parameters()}


def load_and_go_on(saved):
    """Go on from what was saved; returns the torques that were loaded, and the parameters three steps later."""
    trained = _start()
    _step(trained, range(1))  # the engine cuts the parameters at its first step
    (buffer,) = trained.stepped()
    buffer.data.copy_(saved["buffer"])
    trained.optimizer.load_state_dict(copy.deepcopy(saved["state_dict"]))
    torques = trained.optimizer.torque_stats()["torque"]
    _publish(trained)
    _step(trained, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER))
    return torques, trained.whole_parameters()


def _start():
    return zero_engine.starting(1)(Model(False), "AdaTAMW", {}, 1)


def _step(trained, numbers):
    batches = batches_of_steps()
    for number in numbers:
        trained.step(batches[number], number, use=number)


def _publish(trained):
    """Give the model the parameters of the buffer, as the engine does after a step."""
    named = dict(trained.module.named_parameters())
    for name, value in trained.whole_parameters().items():
        if value is not None:
            named[name].data.copy_(value)
