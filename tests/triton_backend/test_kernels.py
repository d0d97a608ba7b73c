"""The sums and the update, beside the reference and the readable backend."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_tam
from tests import running
from tests.cases import CASES
from tests.handed import handed_again
from tests.triton_backend.support import DEVICE, OVERFLOWS_ARE_SAID, backend, coefficients, make_tensors, moved

pytestmark = OVERFLOWS_ARE_SAID
NUM_STEPS = 7  # up to where the gradients turn; none comes in one of them, and one is broken
SHRUNK = {(300_007,): (20_011,), (513, 129): (65, 129)}  # to three spans and to two


def _small(case):
    """The case as the interpreter, which takes 0.1 s a step, can run them all: fewer steps, and no large tensors."""
    groups = tuple(
        dataclasses.replace(
            group,
            leaves=tuple(dataclasses.replace(leaf, shape=SHRUNK.get(leaf.shape, leaf.shape)) for leaf in group.leaves),
        )
        for group in case.groups
    )
    options = {**case.options, **({"torque_steps": 4} if "torque_steps" in case.options else {})}
    return dataclasses.replace(case, groups=groups, options=options, steps=min(case.steps, NUM_STEPS))


def _cases():
    """All of them; the quick tests run every ninth by its name once, with the three optimizers in turn."""
    by_name = {}
    for case in CASES:
        by_name.setdefault(case.name, []).append(str(case))
    for turn, names in enumerate(by_name.values()):
        for place, name in enumerate(names):
            is_quick = turn % 9 == 0 and place == turn // 9 % len(names)
            yield pytest.param(name, marks=() if is_quick else pytest.mark.long)


@pytest.fixture
def on_device(monkeypatch, only_triton):
    """`run_case` on `DEVICE`, without reading a number on the host."""
    build, snapshot = running.build, running._snapshot

    def built(case, name):
        optimizer, parameters = build(case, name)
        for group in optimizer.param_groups:
            group["capturable"] = True
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].to(DEVICE)
        for parameter in parameters:
            parameter.data = moved(parameter.data)
        return optimizer, parameters

    def on_host(optimizer, parameter):
        taken = vars(snapshot(optimizer, parameter))
        return running.Snapshot(
            **{key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in taken.items()}
        )

    monkeypatch.setattr(running, "build", built)
    monkeypatch.setattr(running, "_snapshot", on_host)


class _Moving:
    """A case whose gradients come on `DEVICE`."""

    def __init__(self, case):
        self._case = case

    def __getattr__(self, name):
        return getattr(self._case, name)

    def gradients(self):
        return ([moved(gradient) for gradient in gradients] for gradients in self._case.gradients())


def _agrees(case):
    running.assert_same(case, running.run_case(_Moving(case), "default"), running.run_reference_case(case))


@pytest.mark.parametrize("name", list(_cases()))
def test_agrees_with_the_reference(on_device, name):
    _agrees(_small(running.CASES_BY_NAME[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(case) for case in CASES])
def test_every_case_agrees_with_the_reference(on_device, name):
    _agrees(running.CASES_BY_NAME[name])


shapes = st.sampled_from([(), (0,), (1,), (7,), (33, 65), (3, 0, 2), (2049,), (1, 8195)])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(
    leaves=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings().max_examples // 2)
def test_sums_and_update_of_random_shapes(leaves, decay, maximize, seed):
    """As the readable backend's, to the rounding of each dtype."""
    from hf_tam.backends import single

    params = [torch.randn(shape).to(dtype) for shape, dtype in leaves]
    options = {"seed": seed, "weight_decay": decay, "coupled": True, "maximize": maximize}
    tensors = make_tensors(params, **options)
    twins = make_tensors([param.clone() for param in params], **options)
    for at, param in enumerate(twins.params):  # coupled decay is added in the gradient's dtype there, and in fp32 here
        if param.dtype in (torch.bfloat16, torch.float16):
            twins.grads[at] = twins.grads[at].float()
    twins = handed_again(twins)
    sums = backend.partial_sums(tensors, with_dot=[True] * len(tensors))
    expected = single.partial_sums(twins, with_dot=[True] * len(twins))
    scale = torch.stack([expected[:, 1:3].prod(1).sqrt(), *expected[:, 1:].unbind(1)], 1)
    assert bool(((sums - expected).abs() <= 1e-6 * scale + 1e-30).all())
    numbers = coefficients(len(tensors))
    backend.update(tensors, numbers)
    single.update(twins, numbers, keep=None, clip=None, on_host=False)
    for key in ("params", "firsts", "seconds"):
        for mine, theirs in zip(getattr(tensors, key), getattr(twins, key), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_sums_are_right_beyond_the_range_of_fp32_squares():
    """A span that overflows, one that vanishes, one with a NaN: each goes by itself."""
    tensors = make_tensors([torch.zeros(9000) for _ in range(4)])
    for at, scale in enumerate((1e30, 1e-30, 1.0, 0.0)):
        tensors.grads[at].mul_(scale)
        tensors.firsts[at].mul_(scale)
    tensors.grads[2][8999] = math.nan
    sums = backend.partial_sums(tensors, with_dot=[True] * 4).cpu()
    for at in (0, 1):
        grad, first = tensors.grads[at].double().cpu(), tensors.firsts[at].double().cpu()
        expected = torch.stack([first @ grad, first @ first, grad @ grad, grad @ grad])
        torch.testing.assert_close(sums[at], expected, rtol=1e-6, atol=0)
    assert sums[2].isnan().tolist() == [True, False, True, True]
    assert not sums[3].any()


def test_what_is_skipped_is_not_touched():
    tensors = make_tensors([torch.randn(5000), torch.randn(70)])
    tensors.grads[0].fill_(math.nan)
    before = [tensors.params[0].clone(), tensors.firsts[0].clone(), tensors.seconds[0].clone()]
    other = tensors.params[1].clone()
    backend.update(tensors, coefficients(2), keep=torch.tensor([False, True], device=DEVICE))
    after = [tensors.params[0], tensors.firsts[0], tensors.seconds[0]]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert not torch.equal(tensors.params[1], other)


def test_runs_are_bitwise_identical():
    runs = []
    for _ in range(2):
        tensors = make_tensors([torch.ones(20_001), torch.ones(3)])
        sums = backend.partial_sums(tensors, with_dot=[True, True])
        backend.update(tensors, coefficients(2))
        runs.append([sums, *tensors.params])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_gradients_of_another_dtype():
    for param_dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        tensors = make_tensors([torch.randn(300).to(param_dtype)])
        tensors.grads[0] = tensors.grads[0].to(grad_dtype)
        tensors = handed_again(tensors)
        sums = backend.partial_sums(tensors, with_dot=[True])[0]
        grad, first = tensors.grads[0].double(), tensors.firsts[0].double()
        expected = torch.stack([first @ grad, first @ first, grad @ grad, grad @ grad])
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)
        backend.update(tensors, coefficients(1))
        torch.testing.assert_close(tensors.firsts[0], torch.lerp(first, grad, 0.3).to(param_dtype))


@pytest.mark.slow
def test_a_thousand_tensors_take_three_launches(launches):
    sizes = [1 + (37 * number) % 301 for number in range(1000)]
    tensors = make_tensors([torch.randn(size) for size in sizes])
    sums = backend.partial_sums(tensors, with_dot=[True] * 1000)
    expected = torch.stack([grad.double().square().sum() for grad in tensors.grads])
    torch.testing.assert_close(sums[:, 3], expected, rtol=1e-6, atol=0)
    before = [param.clone() for param in tensors.params]
    backend.update(tensors, coefficients(1000))
    assert all(not torch.equal(param, old) for param, old in zip(tensors.params, before, strict=True))
    assert launches == ["sums_kernel", "combine_kernel", "update_kernel"]


@pytest.mark.parametrize("name", ["AdaTAMW", "TAM"])
def test_clips_as_clip_grad_norm(only_triton, name):
    inside, before = ([torch.nn.Parameter(moved(torch.ones(size))) for size in (9000, 40)] for _ in range(2))
    optimizers = []
    for parameters, limit in ((inside, 0.5), (before, None)):
        optimizers.append(getattr(hf_tam, name)(parameters, lr=0.1, max_grad_norm=limit))
        optimizers[-1].param_groups[0]["capturable"] = True
    for step in range(3):
        for index, (mine, other) in enumerate(zip(inside, before, strict=True)):
            noise = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2 * step + index))
            mine.grad, other.grad = moved(noise), moved(noise.clone())
        norm = torch.nn.utils.clip_grad_norm_(before, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].torque_stats()["grad_norm"], norm)
    for mine, other in zip(inside, before, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("options", "kernels"), [
    ({}, ["sums_kernel", "adam_step_kernel"]),
    ({"max_grad_norm": 1.0}, ["sums_kernel", "combine_kernel", "update_kernel"]),
    ({"scope": "model"}, ["sums_kernel", "combine_kernel", "update_kernel"]),
    ({"nonfinite": "raise"}, ["sums_kernel", "combine_kernel", "update_kernel"]),
])  # fmt: skip
def test_launches_of_a_step(only_triton, launches, options, kernels):
    """Two where nothing global is needed, and only there."""
    parameters = [torch.nn.Parameter(moved(torch.ones(50))) for _ in range(3)]
    optimizer = hf_tam.AdaTAMW(parameters, **options)
    optimizer.param_groups[0]["capturable"] = True
    for parameter in parameters:
        parameter.grad = moved(torch.randn(50))
    optimizer.step()
    assert launches == kernels
