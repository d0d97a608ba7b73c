"""`max_grad_norm` inside the step is torch.nn.utils.clip_grad_norm_ before it, in every backend."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_tam
from tests.cases import backends_of

SHAPES = [(5, 4), (7,), (), (0,), (70000,), (3, 2, 2)]
PAIRS = [(name, backend) for name in ("AdaTAMW", "AdaTAM", "TAM") for backend in backends_of(name)]


def parameters_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(parameters, step, size, *, broken=None):
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(parameters):
        parameter.grad = (size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        if index == broken:
            parameter.grad.flatten()[0] = torch.nan


def differences(left, right):
    return [
        (a.detach() - b.detach()).abs().max().item() if a.numel() else 0.0 for a, b in zip(left, right, strict=True)
    ]


@pytest.mark.long
@pytest.mark.parametrize(("name", "backend"), PAIRS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@given(scope=st.sampled_from(["tensor", "model"]), max_norm=st.floats(1e-3, 1e3), size=st.floats(1e-3, 1e2))
def test_as_clip_grad_norm(name, backend, weight_decay, scope, max_norm, size):
    """To rounding, torques included; lr is large, so that what is clipped decides where the parameters go."""
    options = {"lr": 0.1, "weight_decay": weight_decay, "scope": scope, **backends_of(name)[backend]}
    if name == "AdaTAM":  # clipped gradient and decay may cancel, and Adam makes the sign of what is left a whole step
        options["eps"] = 1.0
    inside, before = parameters_of(), parameters_of()
    ours = getattr(hf_tam, name)(inside, max_grad_norm=max_norm, **options)
    theirs = getattr(hf_tam, name)(before, **options)
    for step in range(4):
        set_gradients(inside, step, size)
        set_gradients(before, step, size)
        norm = torch.nn.utils.clip_grad_norm_(before, max_norm)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.torque_stats()["grad_norm"], norm, rtol=1e-5, atol=0.0)
    # eps = 1e-8 is far below every clipped gradient; TAM moves by lr times the gradients
    scale = 1.0 if name != "TAM" else max(1.0, size, min(max_norm, size * 300))
    assert max(differences(inside, before)) <= 2e-5 * scale
    torch.testing.assert_close(ours.torque_stats()["torque"], theirs.torque_stats()["torque"], rtol=0.0, atol=2e-6)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_small_norm_is_left_alone(name, backend):
    """Bit for bit what a step without clipping does."""
    inside, without = parameters_of(), parameters_of()
    options = backends_of(name)[backend]
    ours = getattr(hf_tam, name)(inside, max_grad_norm=1e6, **options)
    theirs = getattr(hf_tam, name)(without, **options)
    for step in range(3):
        set_gradients(inside, step, 1.0)
        set_gradients(without, step, 1.0)
        ours.step()
        theirs.step()
    assert all(torch.equal(left, right) for left, right in zip(inside, without, strict=True))


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_nonfinite_gradient_does_not_count(name, backend):
    """With "skip" its tensor is left alone and the others are clipped by the norm of what is left."""
    parameters, without = parameters_of(), parameters_of()
    options = {"lr": 0.1, "weight_decay": 0.0, **backends_of(name)[backend]}
    ours = getattr(hf_tam, name)(parameters, max_grad_norm=0.5, **options)
    theirs = getattr(hf_tam, name)([p for index, p in enumerate(without) if index != 1], max_grad_norm=0.5, **options)
    set_gradients(parameters, 0, 1.0, broken=1)
    set_gradients(without, 0, 1.0)
    with (
        pytest.warns(RuntimeWarning, match="skipped")
        if backend not in ("capturable", "capturable-single")
        else nullcontext()
    ):
        ours.step()
    theirs.step()
    assert all(torch.equal(left, right) for left, right in zip(parameters, without, strict=True))
    assert int(ours.torque_stats()["skipped"]) == 1


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_propagated_as_torch_does(name, backend):
    """A norm that is NaN makes every parameter NaN, as clip_grad_norm_ before torch's AdamW."""
    parameters = parameters_of()
    options = {"nonfinite": "propagate", "max_grad_norm": 0.5, **backends_of(name)[backend]}
    optimizer = getattr(hf_tam, name)(parameters, **options)
    set_gradients(parameters, 0, 1.0, broken=1)
    optimizer.step()
    assert all(bool(parameter.isnan().all()) for parameter in parameters if parameter.numel())
    assert bool(optimizer.torque_stats()["torque"].isfinite().all())


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
def test_raised_before_anything_changes(name):
    """Gradients included, also where a coupled decay has them clipped in place."""
    parameters = parameters_of()
    optimizer = getattr(hf_tam, name)(parameters, nonfinite="raise", max_grad_norm=0.5, weight_decay=0.1)
    set_gradients(parameters, 0, 1.0, broken=1)
    before = copy.deepcopy([*parameters, *(parameter.grad for parameter in parameters)])
    with pytest.raises(FloatingPointError, match="parameter number 1"):
        optimizer.step()
    after = [*parameters, *(parameter.grad for parameter in parameters)]
    assert all(torch.equal(left.nan_to_num(), right.nan_to_num()) for left, right in zip(after, before, strict=True))


def test_one_norm_over_all_groups():
    inside, before = parameters_of(), parameters_of()
    ours = hf_tam.AdaTAMW([{"params": inside[:2]}, {"params": inside[2:], "lr": 0.5}], lr=0.1, max_grad_norm=0.3)
    theirs = hf_tam.AdaTAMW([{"params": before[:2]}, {"params": before[2:], "lr": 0.5}], lr=0.1)
    for step in range(3):
        set_gradients(inside, step, 3.0)
        set_gradients(before, step, 3.0)
        torch.nn.utils.clip_grad_norm_(before, 0.3)
        ours.step()
        theirs.step()
    assert max(differences(inside, before)) <= 1e-5


def test_groups_that_disagree():
    first, second, *_ = parameters_of()
    optimizer = hf_tam.AdaTAMW([{"params": [first], "max_grad_norm": 1.0}, {"params": [second]}])
    set_gradients([first, second], 0, 1.0)
    with pytest.raises(ValueError, match="different values of max_grad_norm"):
        optimizer.step()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_range(value):
    with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
        hf_tam.AdaTAMW(parameters_of(), max_grad_norm=value)


def test_after_torque_steps_the_norm_is_still_taken():
    parameters = parameters_of()
    optimizer = hf_tam.AdaTAMW(parameters, torque_steps=1, nonfinite="propagate", max_grad_norm=0.5)
    for step in range(3):
        set_gradients(parameters, step, 1.0)
        optimizer.step()
    assert optimizer.torque_stats()["grad_norm"] > 100.0


def with_scaler(parameters, optimizer, *, clip, infinite_at):
    """Six steps of scaled gradients; the norm that was promised for each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    norms = []
    for step in range(6):
        set_gradients(parameters, step, 3.0)
        for parameter in parameters:
            parameter.grad = parameter.grad * scaler.scale(torch.ones(()))
        if step == infinite_at:
            parameters[0].grad[0] = torch.inf
        if clip is None:
            norms.append(optimizer.promise_grad_norm())
        else:
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip))
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(norms)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_a_gradient_scaler_unscales_first(name, backend):
    """As unscale_, clip_grad_norm_, step; a step that overflowed is not taken, and its norm stays unknown."""
    inside, before = parameters_of(), parameters_of()
    options = {"lr": 0.1, "weight_decay": 0.0, **backends_of(name)[backend]}
    ours = with_scaler(inside, getattr(hf_tam, name)(inside, max_grad_norm=0.5, **options), clip=None, infinite_at=3)
    theirs = with_scaler(before, getattr(hf_tam, name)(before, **options), clip=0.5, infinite_at=3)
    assert ours.isnan().tolist() == [step == 3 for step in range(6)]
    assert not bool(theirs[3].isfinite())
    kept = ours.isfinite()
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-5, atol=0.0)
    assert max(differences(inside, before)) <= 2e-5


def test_a_norm_is_promised_for_one_step():
    parameters = parameters_of()
    optimizer = hf_tam.AdaTAM(parameters, weight_decay=0.1, max_grad_norm=0.5)  # reports the raw gradient's
    set_gradients(parameters, 0, 1.0)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    first = optimizer.promise_grad_norm()
    assert bool(first.isnan())
    optimizer.step()
    torch.testing.assert_close(first, norm, rtol=1e-5, atol=0.0)
    second = optimizer.promise_grad_norm()
    assert bool(second.isnan())
    set_gradients(parameters, 0, 2.0)
    optimizer.step()
    torch.testing.assert_close(second, 2 * norm, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(first, norm, rtol=1e-5, atol=0.0)
