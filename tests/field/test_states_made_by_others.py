"""States in `optimizer.state` that somebody else put there: hooks, and those who edit a model while it trains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

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


class Points(nn.Module):
    """Gaussian splatting's: as many rows as there are points, which come and go."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
        self.colours = nn.Parameter(torch.ones(6, 2))

    def replace(self, optimizer, change):
        """Change the rows of every parameter and of its moments, as densification and pruning do."""
        for group in optimizer.param_groups:
            before = group["params"][0]
            state = optimizer.state.pop(before)
            for key in moments_of("SGD" if "momentum" in group else "AdamW"):
                state[key] = change(state[key], torch.zeros)
            after = nn.Parameter(change(before.detach(), torch.ones))
            setattr(self, group["name"], after)
            group["params"][0] = after
            optimizer.state[after] = state
        if hasattr(optimizer, "attach"):
            optimizer.attach(self)


CHANGES = {
    "prune": lambda rows, new: rows[torch.tensor([0, 1, 3])],
    "densify": lambda rows, new: torch.cat([rows, new(2, *rows.shape[1:])]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*OURS, "AdamW"])
def test_rows_come_and_go_and_the_run_is_resumed(name, change):
    """The state of the old parameter is edited and given to the new one; what is saved then is what goes on."""

    def build():
        points = Points()
        groups = [{"params": [value], "name": key} for key, value in points.named_parameters()]
        return points, CLASSES[name](groups, lr=0.01)

    points, optimizer = build()
    for seed in range(3):
        step(optimizer, seed)
    points.replace(optimizer, CHANGES[change])
    step(optimizer, 3)
    again, resumed = build()
    step(resumed, 0)
    again.replace(resumed, CHANGES[change])
    again.load_state_dict(points.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (4, 5):
        step(optimizer, seed)
        step(resumed, seed)
    assert points.positions.shape == (3 if change == "prune" else 8, 3)
    assert torch.equal(points.positions, again.positions)
    assert torch.equal(points.colours, again.colours)
    assert {float(state["step"]) for state in optimizer.state.values() if "step" in state} == {6.0}
