"""Runs a case through an optimizer of hf_tam or through the reference, and compares what is left."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hf_tam
from tests.cases import CASES, Case, apply_schedule, backends_of
from tests.reference import ReferenceOptimizer, real_f64

CASES_BY_NAME = {str(case): case for case in CASES}


@dataclass
class Snapshot:
    """One parameter after the run; tensors float64, complex ones as real views; `state` has the raw values."""

    parameter: Tensor
    state: dict[str, Any]
    step: float
    torque: float
    first_moment: Tensor | None
    exp_avg_sq: Tensor | None


@dataclass
class Run:
    snapshots: list[Snapshot]
    torques: Tensor  # (steps, leaves), float64


def first_moment(state: dict[str, Any]) -> Tensor:
    """AdamW's exp_avg (the paper's m if step_size="paper"), or momentum_buffer, as float64."""
    if "momentum_buffer" in state:
        return real_f64(state["momentum_buffer"])
    return real_f64(state["exp_avg"]) * state["exp_avg_scale"].double()


def torque_of(state: dict[str, Any]) -> float:
    return float(state["torque"]) if state else 0.0


def build(case: Case, backend: str) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    parameters = case.parameters()
    groups = [{**group.overrides, "params": leaves} for group, leaves in zip(case.groups, parameters, strict=True)]
    options = {**case.options, **backends_of(case.optimizer)[backend]}
    if case.tensor_lr:
        options["lr"] = torch.tensor(options["lr"])
    optimizer = getattr(hf_tam, case.optimizer)(groups, **options)
    return optimizer, [parameter for leaves in parameters for parameter in leaves]


@functools.cache
def run(name: str, backend: str) -> Run:
    """One of CASES by its name; at most once in a session."""
    return run_case(CASES_BY_NAME[name], backend)


def run_case(case: Case, backend: str) -> Run:
    optimizer, parameters = build(case, backend)
    initial = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for group in initial:
        group["lr"] = float(group["lr"])
    torques = []
    for step, gradients in enumerate(case.gradients()):
        apply_schedule(case, step, optimizer.param_groups, initial)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*nonfinite")  # what it says is test_nonfinite's
            optimizer.step()
        torques.append([torque_of(optimizer.state.get(parameter, {})) for parameter in parameters])
    return Run([_snapshot(optimizer, parameter) for parameter in parameters], torch.tensor(torques).double())


def _snapshot(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Snapshot:
    state = optimizer.state.get(parameter, {})
    return Snapshot(
        parameter=real_f64(parameter),
        state=dict(state),
        step=float(state["step"]) if state else 0.0,
        torque=torque_of(state),
        first_moment=first_moment(state) if state else None,
        exp_avg_sq=real_f64(state["exp_avg_sq"]) if "exp_avg_sq" in state else None,
    )


@functools.cache
def run_reference(name: str) -> Run:
    return run_reference_case(CASES_BY_NAME[name])


def run_reference_case(case: Case) -> Run:
    groups = [
        {**group.overrides, "params": leaves} for group, leaves in zip(case.groups, case.parameters(), strict=True)
    ]
    reference = ReferenceOptimizer(case.optimizer, groups, **case.options)
    initial = [dict(group) for group in reference.groups]
    torques = []
    for step, gradients in enumerate(case.gradients()):
        apply_schedule(case, step, reference.groups, initial)
        reference.step(gradients)
        torques.append([state.torque for state in reference.states])
    snapshots = [
        Snapshot(
            parameter=state.parameter,
            state={},
            step=state.step,
            torque=state.torque,
            first_moment=state.first_moment,
            exp_avg_sq=None if case.optimizer == "TAM" else state.exp_avg_sq,
        )
        for state in reference.states
    ]
    return Run(snapshots, torch.tensor(torques, dtype=torch.float64))


def assert_same(case: Case, actual: Run, expected: Run) -> None:
    """Parameters, steps, moments and the whole history of torques agree, by the case's tolerance for each leaf."""
    for index, (left, right) in enumerate(zip(actual.snapshots, expected.snapshots, strict=True)):
        where, tolerance = f"{case}, leaf {index} {case.leaves[index].shape}", case.tolerance(index)
        assert left.step == right.step, where
        torch.testing.assert_close(
            left.parameter,
            right.parameter,
            rtol=tolerance.parameter_rtol,
            atol=tolerance.parameter_atol,
            msg=lambda text, where=where: f"{where}, parameter: {text}",
        )
        torch.testing.assert_close(
            actual.torques[:, index],
            expected.torques[:, index],
            rtol=0,
            atol=tolerance.torque,
            msg=lambda text, where=where: f"{where}, torque: {text}",
        )
        for key in ("first_moment", "exp_avg_sq"):
            _assert_moment(getattr(left, key), getattr(right, key), tolerance.state, f"{where}, {key}")


def _assert_moment(actual: Tensor | None, expected: Tensor | None, tolerance: float, where: str) -> None:
    if actual is None or expected is None:
        present = actual if expected is None else expected
        assert present is None or not present.any(), f"{where}: kept on one side only"
        return
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest, msg=lambda text: f"{where}: {text}")
