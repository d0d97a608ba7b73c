"""A whole step in two launches is the general path's."""

from __future__ import annotations

import math

import pytest
import torch

import hf_tam
from tests.handed import hand
from tests.triton_backend.support import DEVICE, OVERFLOWS_ARE_SAID, backend, make_tensors, moved

pytestmark = OVERFLOWS_ARE_SAID
STEP_SHAPES = ((9000,), (40, 5), (), (0,), (300,))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdaTAMW", {"torque_steps": 2, "betas": (0.9, 0.99)}),
        ("AdaTAMW", {"step_size": "paper", "lr": 1e-3, "betas": (0.0, 0.9)}),
        ("AdaTAM", {"weight_decay": 0.1, "maximize": True, "nonfinite": "propagate"}),
        ("TAM", {"weight_decay": 0.1, "torque_steps": 2}),
        ("TAM", {"step_size": "paper"}),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_whole_steps_are_the_general_path(name, options, tensor_lr):
    """States, parameters and statistics after each step, with a NaN on the way."""
    parameters = [torch.nn.Parameter(moved(torch.randn(shape))) for shape in STEP_SHAPES]
    single = {"foreach": False} if name == "TAM" else {"foreach": False, "fused": False}
    optimizer = getattr(hf_tam, name)(parameters, **options, **single)
    group = optimizer.param_groups[0]
    group["capturable"] = True
    ours = [parameter.detach().clone() for parameter in parameters]
    moments = [[torch.zeros_like(tensor) for tensor in ours] for _ in optimizer.moments]
    scalars = torch.zeros(len(optimizer.scalar_states), len(ours), device=DEVICE)
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    numbers = optimizer.family.numbers(group)
    if tensor_lr:
        numbers = numbers._replace(lr=torch.tensor(group["lr"], dtype=torch.float64, device=DEVICE))
    for step in range(3):
        for index, parameter in enumerate(parameters):
            parameter.grad = moved(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7 * index)))
            parameter.grad += 0.3 * moved(torch.randn(parameter.shape))
        if step == 1 and group["nonfinite"] == "skip":
            parameters[1].grad[0, 0] = math.inf
        seconds = moments[1] if len(moments) > 1 else []
        grads = [parameter.grad for parameter in parameters]
        tensors = hand(ours, grads, moments[0], seconds, numbers=[numbers], maximize=group["maximize"])
        assert [chunks.size for chunks in backend.bind(tensors).table.parts.values()] == [6]
        report = backend.one_pass(tensors, scalars, skip_nonfinite=group["nonfinite"] == "skip", skipped=skipped)
        optimizer.step()
        stats = optimizer.torque_stats()
        torch.testing.assert_close(report.cosine.float(), stats["cosine"], rtol=0, atol=2e-6)
        torch.testing.assert_close(report.damping.float(), stats["damping"], rtol=0, atol=2e-6)
        torch.testing.assert_close(report.sums[:, 3].sum().sqrt().float(), stats["grad_norm"])
        for index, (parameter, tensor) in enumerate(zip(parameters, ours, strict=True)):
            torch.testing.assert_close(tensor, parameter.detach(), rtol=1e-5, atol=1e-6)
            state = optimizer.state[parameter]
            for key, moment in zip(optimizer.moments, moments, strict=True):
                torch.testing.assert_close(moment[index], state[key], rtol=1e-5, atol=1e-6)
            for key, row in zip(optimizer.scalar_states, scalars, strict=True):
                torch.testing.assert_close(row[index], state[key], rtol=1e-5, atol=2e-6)
        assert int(skipped) == int(stats["skipped"]) == (1 if step and group["nonfinite"] == "skip" else 0)


def test_a_whole_step_takes_two_launches(launches):
    tensors = make_tensors([torch.randn(size) for size in (50, 50, 500, 1)])
    scalars = torch.zeros(3, 4, device=DEVICE)
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    backend.one_pass(tensors, scalars, skip_nonfinite=True, skipped=skipped)
    assert launches == ["sums_kernel", "adam_step_kernel"]


@pytest.mark.long
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_groups_that_differ_in_numbers_take_two_launches_together(launches, only_triton, tensor_lr):
    """As the readable backend steps them, a group at a time."""
    sizes, rates = (50, 7, 300), (1e-2, 3e-3, 1e-3)
    optimizers = []
    for options in ({}, {"foreach": False, "fused": False}):
        groups = [
            {
                "params": [torch.nn.Parameter(moved(torch.ones(size)))],
                "lr": torch.tensor(rate, device=DEVICE) if tensor_lr and index else rate,
                "betas": (0.9 - 0.1 * index, 0.99),
                "gamma": 0.3 * index,
                "weight_decay": 0.1 * index,
                "torque_steps": 2 if index else None,
            }
            for index, (size, rate) in enumerate(zip(sizes, rates, strict=True))
        ]
        optimizers.append(hf_tam.AdaTAMW(groups, **options))
        for group in optimizers[-1].param_groups:
            group["capturable"] = True
    for step in range(3):
        launches.clear()
        for optimizer in optimizers:
            for index, group in enumerate(optimizer.param_groups):
                generator = torch.Generator().manual_seed(10 * step + index)
                group["params"][0].grad = moved(torch.randn(sizes[index], generator=generator))
        optimizers[0].step()
        assert launches == ["sums_kernel", "adam_step_kernel"]
        _step_by(optimizers[1])
    for mine, theirs in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
        torch.testing.assert_close(mine["params"][0].detach(), theirs["params"][0].detach(), rtol=1e-5, atol=1e-6)


def _step_by(optimizer):
    """A step of the readable backend, which `only_triton` has put out of use."""
    from hf_tam.backends import single, triton
    from hf_tam.step import gathering

    gathering.select_backend = lambda device, **_: single
    try:
        optimizer.step()
    finally:
        gathering.select_backend = lambda device, **_: triton
