"""Every case, every backend: equal to the float64 reference and to one another, state by state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_tam
from hf_tam.backends import native
from tests.cases import CASES, backends_of, takes_tensor_lr
from tests.running import CASES_BY_NAME, _assert_moment, assert_same, real_f64, run, run_reference
from tests.tables import check_rows

PAIRS = [
    (str(case), backend)
    for case in CASES
    for backend in backends_of(case.optimizer)
    if takes_tensor_lr(case.optimizer, backend) or not case.tensor_lr
]
# What holds of every case alike is one test a backend, which goes through the cases and names those that fail.
BACKENDS = [(optimizer, backend) for optimizer in ("AdaTAMW", "AdaTAM", "TAM") for backend in backends_of(optimizer)]


def _together(first, backend):
    """Parameters of a test that shares its runs with all that are of the same optimizer and backend."""
    group = f"cases of {first.partition('-')[0]} {backend}"
    return pytest.param(first, backend, marks=pytest.mark.xdist_group(group))


EACH = pytest.mark.parametrize(("name", "backend"), [_together(*pair) for pair in PAIRS])
EACH_BACKEND = pytest.mark.parametrize(("optimizer", "backend"), [_together(*pair) for pair in BACKENDS])
EACH_BACKEND_BUT_SINGLE = pytest.mark.parametrize(
    ("optimizer", "backend"), [_together(*pair) for pair in BACKENDS if pair[1] != "single"]
)


def cases_of(optimizer, backend):
    names = [name for name, other in PAIRS if other == backend]
    return {name: (name, backend) for name in names if CASES_BY_NAME[name].optimizer == optimizer}


@EACH
def test_agrees_with_the_reference(name, backend):
    assert_same(CASES_BY_NAME[name], run(name, backend), run_reference(name))


@EACH_BACKEND_BUT_SINGLE
def test_backends_keep_the_same_state(optimizer, backend):
    """As the readable one does, in every case."""
    check_rows(_keeps_the_state_of_single, cases_of(optimizer, backend))


def _keeps_the_state_of_single(name, backend):
    case, actual, expected = CASES_BY_NAME[name], run(name, backend), run(name, "single")
    assert_same(case, actual, expected)
    for index, (left, right) in enumerate(zip(actual.snapshots, expected.snapshots, strict=True)):
        assert left.state.keys() == right.state.keys()
        for key in left.state:
            mine, theirs = left.state[key], right.state[key]
            assert mine.dtype == theirs.dtype, key
            assert mine.shape == theirs.shape, key
            where = f"{case}, leaf {index}, state[{key!r}]"
            if key == "torque":
                assert abs(float(mine) - float(theirs)) <= case.tolerance(index).torque, where
            else:
                _assert_moment(real_f64(mine), real_f64(theirs), case.tolerance(index).state, where)


@EACH_BACKEND
def test_state_is_what_torch_would_allocate(optimizer, backend):
    check_rows(_allocates_as_torch, cases_of(optimizer, backend))


def _allocates_as_torch(name, backend):
    case = CASES_BY_NAME[name]
    moments = {"momentum_buffer"} if case.optimizer == "TAM" else {"exp_avg", "exp_avg_sq"}
    scalars = {"step", "torque"} if case.optimizer == "TAM" else {"step", "torque", "exp_avg_scale"}
    for leaf, snapshot in zip(case.leaves, run(name, backend).snapshots, strict=True):
        if not snapshot.state:
            continue
        assert set(snapshot.state) == moments | scalars
        for key in moments:
            assert snapshot.state[key].shape == leaf.shape
        for key in scalars - {"step"}:
            assert snapshot.state[key].shape == ()
            assert snapshot.state[key].dtype == torch.float32
        assert isinstance(snapshot.state["step"], Tensor)


# --- which kernel ran ---------------------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, fragment):
        return sum(fragment in name for name in self.names)


def _one_step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def _parameters():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 4), (7,), (3, 3), ())]


@pytest.fixture
def fused_calls(monkeypatch):
    """The element counts torch._fused_adamw_ was called with."""
    calls, original = [], torch._fused_adamw_

    def counted(params, *args, **kwargs):
        calls.append(sum(parameter.numel() for parameter in params))
        return original(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    return calls


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize(("backend", "runs"), [({}, True), ({"fused": True}, True), ({"foreach": True}, False),
                                               ({"foreach": False, "fused": False}, False),
                                               ({"capturable": True}, False)])  # fmt: skip
def test_fused_kernel_ran(fused_calls, name, scope, backend, runs, monkeypatch):
    """Both on the first step and on later ones; it covers every element, so nothing fell back."""
    monkeypatch.setattr("hf_tam.backends.native.is_available", lambda: False)
    parameters = _parameters()
    optimizer = getattr(hf_tam, name)(parameters, scope=scope, **backend)
    for _ in range(2):
        fused_calls.clear()
        _one_step(optimizer, parameters)
        assert sum(fused_calls) == (37 if runs else 0)


@pytest.mark.skipif(not native.is_available(), reason="needs a C compiler")
@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "functions"),
    [
        ({}, ["step"]),
        ({"nonfinite": "propagate", "step_size": "paper"}, ["step"]),
        ({"scope": "model"}, ["sums", "update"]),
        ({"nonfinite": "raise"}, ["sums", "update"]),
        ({"max_grad_norm": 1.0}, ["sums", "update"]),
        ({"torque_steps": 5}, ["sums", "update"]),
        ({"torque_steps": 0, "nonfinite": "propagate"}, ["update"]),
        ({"foreach": True}, []),
    ],
    ids=str,
)
def test_native_kernel_ran(name, dtype, options, functions, monkeypatch):
    """Of every element: the whole step in one call, or the sums in one and the update in another."""
    calls, original = [], native._call

    def counted(function, rows, *arguments):
        calls.append((function, sum(rows[0 :: native._FIELDS])))
        return original(function, rows, *arguments)

    monkeypatch.setattr(native, "_call", counted)
    parameters = [torch.nn.Parameter(parameter.to(dtype)) for parameter in _parameters()]
    decay = 0.0 if "max_grad_norm" in options else 0.1  # else it takes the norms first, where it is coupled
    optimizer = getattr(hf_tam, name)(parameters, weight_decay=decay, **options)
    names = {"step": "hf_tam_step", "sums": "hf_tam_sums", "update": "hf_tam_sgd" if name == "TAM" else "hf_tam_adam"}
    for _ in range(2):
        calls.clear()
        _one_step(optimizer, parameters)
        assert calls == [(names[function], 37) for function in functions]


def test_foreach_kernels_ran():
    parameters = _parameters()
    optimizer = hf_tam.AdaTAMW(parameters, foreach=True)
    _one_step(optimizer, parameters)
    with Dispatched() as dispatched:
        _one_step(optimizer, parameters)
    assert dispatched.count("aten._foreach") > 0
    assert dispatched.count("aten._fused") == 0


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
def test_single_uses_neither(name):
    parameters = _parameters()
    options = {"foreach": False} if name == "TAM" else {"foreach": False, "fused": False}
    optimizer = getattr(hf_tam, name)(parameters, **options)
    _one_step(optimizer, parameters)
    with Dispatched() as dispatched:
        _one_step(optimizer, parameters)
    # 0-d states may be copied together; arithmetic is one tensor at a time
    assert dispatched.count("aten._foreach") == dispatched.count("aten._foreach_copy_")
    assert dispatched.count("aten._fused") == 0


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("step_size", ["adamw", "paper"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("backend", ["capturable", "capturable-single"])
def test_capturable_never_reads_a_number(name, scope, step_size, broken, backend):
    """No host synchronisation, with or without a NaN to skip, with a tensor lr, before and after torque_steps."""
    parameters = _parameters()
    lr = torch.tensor(1e-3)
    optimizer = getattr(hf_tam, name)(
        parameters,
        lr=lr,
        scope=scope,
        step_size=step_size,
        torque_steps=2,
        nonfinite="skip",
        **backends_of(name)[backend],
    )
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if broken and step == 1:
            parameters[0].grad[0, 0] = torch.nan
        with Dispatched() as dispatched:
            optimizer.step()
        assert dispatched.count("aten._local_scalar_dense") == 0
        assert dispatched.count("aten.nonzero") == 0


def test_the_counter_sees_a_read():
    with Dispatched() as dispatched:
        float(torch.ones(()) + 1)
    assert dispatched.count("aten._local_scalar_dense") == 1


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
@pytest.mark.parametrize("backend", ["default", "single", "foreach"])
def test_runs_are_bitwise_identical(name, backend):
    case = next(case for case in CASES if case.optimizer == name and case.name == "tensor-large")
    first, again = run(str(case), backend), run.__wrapped__(str(case), backend)
    for left, right in zip(first.snapshots, again.snapshots, strict=True):
        assert torch.equal(left.parameter, right.parameter)
        assert all(torch.equal(left.state[key], right.state[key]) for key in left.state)
