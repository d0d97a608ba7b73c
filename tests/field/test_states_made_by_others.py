"""States in `optimizer.state` that somebody else put there: hooks, and those who edit a model while it trains."""

from __future__ import annotations

import pytest
import torch

from tests.cases import backends_of
from tests.field.loading import CLASSES, COUNTERPARTS, OURS, parameters_in, parameters_of, step

EVERY_BACKEND = pytest.mark.parametrize(
    ("name", "backend"), [(name, each) for name in OURS for each in backends_of(name)]
)


def moments_of(name):
    return ("momentum_buffer",) if name in ("TAM", "SGD") else ("exp_avg", "exp_avg_sq")


def make_states(optimizer, args, kwargs):
    """What a hook that chooses how moments are kept makes of every parameter (PyTorch's tests have one)."""
    for parameter in parameters_in(optimizer):
        if not optimizer.state[parameter]:
            moments = ("momentum_buffer",) if "momentum" in optimizer.defaults else ("exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: torch.full_like(parameter, 0.5) for key in moments}
            if "momentum" not in optimizer.defaults:
                optimizer.state[parameter]["step"] = torch.tensor(3.0)


@EVERY_BACKEND
def test_a_step_pre_hook_makes_the_states_that_torchs_optimizer_has(name, backend):
    """Held neutral, the steps are torch's: what was not made stands for torch's own moments."""
    parameters, twins = parameters_of(), parameters_of()
    ours = CLASSES[name](parameters, lr=0.01, gamma=1.0, damping_eps=0.0, **backends_of(name)[backend])
    theirs = CLASSES[COUNTERPARTS[name]](twins, lr=0.01)
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(make_states)
        for seed in range(3):
            step(optimizer, seed)
    for mine, their in zip(parameters, twins, strict=True):
        torch.testing.assert_close(mine, their, rtol=2e-6, atol=1e-6)
    assert {float(ours.state[parameter]["step"]) for parameter in parameters} == {3.0 if name == "TAM" else 6.0}
    assert all({"torque", *moments_of(name)} <= ours.state[parameter].keys() for parameter in parameters)
