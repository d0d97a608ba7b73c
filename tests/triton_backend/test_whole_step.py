"""A whole step in two launches is the general path's."""

from __future__ import annotations

import math

import pytest
import torch

import hf_tam
from hf_tam.backends import Entry
from tests.triton_backend.support import DEVICE, OVERFLOWS_ARE_SAID, PLAIN_STEP, backend, make_entries, moved

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
    for step in range(3):
        for index, parameter in enumerate(parameters):
            parameter.grad = moved(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7 * index)))
            parameter.grad += 0.3 * moved(torch.randn(parameter.shape))
        if step == 1 and group["nonfinite"] == "skip":
            parameters[1].grad[0, 0] = math.inf
        entries = [
            Entry(
                index=index, owner=tensor, param=tensor, raw_grad=parameters[index].grad, state={},
                first=moments[0][index], second=moments[1][index] if len(moments) > 1 else None,
                coupled_decay=group["weight_decay"] if optimizer.coupled else 0.0, maximize=group["maximize"],
            )
            for index, tensor in enumerate(ours)
        ]  # fmt: skip
        bound = backend.bind(entries)
        assert [chunks.size for chunks in bound.table.parts.values()] == [6]
        report = _whole_step(optimizer, bound, scalars, skipped, tensor_lr)
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
    entries = make_entries([torch.randn(size) for size in (50, 50, 500, 1)])
    scalars = torch.zeros(3, 4, device=DEVICE)
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    backend.whole_adam(backend.bind(entries), scalars, PLAIN_STEP, skipped=skipped)
    assert launches == ["sums_kernel", "adam_step_kernel"]


def _whole_step(optimizer, bound, scalars, skipped, tensor_lr):
    group = optimizer.param_groups[0]
    lr = torch.tensor(group["lr"], dtype=torch.float64, device=DEVICE) if tensor_lr else group["lr"]
    shared = {
        "lr": lr, "gamma": group["gamma"], "damping_eps": group["damping_eps"],
        "torque_steps": group["torque_steps"], "literal": group["step_size"] == "paper",
        "skip_nonfinite": group["nonfinite"] == "skip",
    }  # fmt: skip
    if "momentum" in group:
        return backend.whole_sgd(
            bound, scalars, backend.SgdStep(momentum=group["momentum"], **shared), skipped=skipped
        )
    decay = 0.0 if optimizer.coupled else group["weight_decay"]
    step = backend.AdamStep(betas=group["betas"], eps=group["eps"], weight_decay=decay, **shared)
    return backend.whole_adam(bound, scalars, step, skipped=skipped)
