"""What must hold for any input: the identity with torch's optimizers, the meaning of the angle, its invariances."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_tam
from tests.cases import backends_of
from tests.running import first_moment

SHAPES = ((4, 3), (17,), ())
ADAM_BACKENDS = pytest.mark.parametrize("backend", backends_of("AdaTAMW"))
TAM_BACKENDS = pytest.mark.parametrize("backend", backends_of("TAM"))
SCOPES = pytest.mark.parametrize("scope", ["tensor", "model"])
EVERY_BACKEND = pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name in ("AdaTAMW", "AdaTAM", "TAM") for backend in backends_of(name)]
)


def make(name, parameters, backend="default", **options):
    return getattr(hf_tam, name)(parameters, **options, **backends_of(name)[backend])


def fresh_parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


# --- (a) held neutral, it is torch's optimizer ---------------------------------------------------------------------

STEPS = 200
learning_rates = st.floats(1e-5, 1e-1)
decays = st.one_of(st.just(0.0), st.floats(1e-4, 0.5))
schedules = st.sampled_from(["constant", "warm-up", "one-cycle", "jumps"])


def _multiplier(schedule, step):
    """(of lr, fraction of the way between two values of betas or momentum)."""
    if schedule == "warm-up":
        return (step / 20 if step < 20 else 1 - (step - 20) / STEPS), 0.0
    if schedule == "one-cycle":
        phase = 0.5 - 0.5 * math.cos(2 * math.pi * step / STEPS)
        return phase, phase
    if schedule == "jumps":
        return (1.0, 0.3, 0.0, 2.0)[step // 10 % 4], (0.0, 1.0)[step // 25 % 2]
    return 1.0, 0.0


def _assert_same_walk(ours, theirs, moves, seed):
    """Steps both on the same gradients; at the end they differ by rounding in proportion to the way walked.

    Tolerance: each update may be off by 3e-6 of itself (fp32, torque scale and bias corrections; a moment averages
    over at most 100 terms), and so may the value of the parameter by 2e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    walked = [torch.zeros_like(parameter) for parameter in theirs.param_groups[0]["params"]]
    for step in range(STEPS):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(moves(step))
        pairs = list(zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], walked, strict=True))
        before = [parameter.detach().clone() for _, parameter, _ in pairs]
        for mine, their, _ in pairs:
            their.grad = torch.randn(their.shape, generator=generator) + 0.3 * math.sin(step / 9)
            mine.grad = their.grad.clone()
        ours.step()
        theirs.step()
        for (_, their, way), old in zip(pairs, before, strict=True):
            way += (their.detach() - old).abs()
    for mine, their, way in pairs:
        # Each step rounds a parameter once here and up to twice there; where steps are small, always in one direction.
        allowed = 3e-6 * way.max() + 2 * STEPS * 2**-24 * their.detach().abs()
        assert bool(((mine - their).abs() <= allowed).all()), float(((mine - their).abs() - allowed).max())


@pytest.mark.long
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("foreach", "capturable-single", "fused")))
        for name in backends_of("AdaTAMW")
    ],
)
@given(
    name=st.sampled_from(["AdaTAMW", "AdaTAM"]),
    scope=st.sampled_from(["tensor", "model"]),
    lr=learning_rates,
    beta1=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)),
    beta2=st.tuples(st.floats(0.5, 0.999), st.floats(0.5, 0.999)),
    eps=st.floats(1e-10, 1e-3),
    weight_decay=decays,
    maximize=st.booleans(),
    schedule=schedules,
    seed=st.integers(0, 1000),
)
def test_neutral_is_adamw(backend, name, scope, lr, beta1, beta2, eps, weight_decay, maximize, schedule, seed):
    """AdaTAMW is torch's AdamW and AdaTAM its Adam, through schedules of lr and both betas."""
    shared = {
        "lr": lr, "betas": (beta1[0], beta2[0]), "eps": eps, "weight_decay": weight_decay, "maximize": maximize
    }  # fmt: skip
    ours = make(name, fresh_parameters(), backend, gamma=1.0, damping_eps=0.0, scope=scope, **shared)
    twin = torch.optim.AdamW if name == "AdaTAMW" else torch.optim.Adam
    theirs = twin(fresh_parameters(), foreach=False, fused=False, **shared)

    def moves(step):
        factor, fraction = _multiplier(schedule, step)
        betas = tuple(first + fraction * (last - first) for first, last in (beta1, beta2))
        return {"lr": lr * factor, "betas": betas}

    _assert_same_walk(ours, theirs, moves, seed)


@TAM_BACKENDS
@given(
    scope=st.sampled_from(["tensor", "model"]),
    lr=learning_rates,
    momentum=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)),
    weight_decay=decays,
    maximize=st.booleans(),
    schedule=schedules,
    seed=st.integers(0, 1000),
)
def test_neutral_is_sgd(backend, scope, lr, momentum, weight_decay, maximize, schedule, seed):
    shared = {"lr": lr, "momentum": momentum[0], "weight_decay": weight_decay, "maximize": maximize}
    ours = make("TAM", fresh_parameters(), backend, gamma=1.0, damping_eps=0.0, scope=scope, **shared)
    # torch keeps no buffer while momentum is 0; ours does, so that a schedule may raise it
    theirs = torch.optim.SGD(fresh_parameters(), foreach=False, **{**shared, "momentum": max(momentum[0], 1e-30)})

    def moves(step):
        factor, fraction = _multiplier(schedule, step)
        return {"lr": lr * factor, "momentum": max(momentum[0] + fraction * (momentum[1] - momentum[0]), 1e-30)}

    _assert_same_walk(ours, theirs, moves, seed)


@ADAM_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_neutral_is_adamw_in_other_dtypes(backend, dtype):
    """float64: fp32 torque scale. 16 bits: rounding, a few ulps of a parameter of order 1 in ten steps."""
    tolerance = {torch.float64: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    shared = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    ours = make("AdaTAMW", fresh_parameters(dtype=dtype), backend, gamma=1.0, damping_eps=0.0, **shared)
    theirs = torch.optim.AdamW(fresh_parameters(dtype=dtype), fused=True, **shared)
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        for mine, their in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            their.grad = torch.randn(their.shape, generator=generator).to(dtype)
            mine.grad = their.grad.clone()
        ours.step()
        theirs.step()
    for mine, their in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(mine, their, rtol=tolerance, atol=tolerance / 4)


@EVERY_BACKEND
def test_after_torque_steps_it_is_neutral(name, backend):
    """The torque is frozen, and from a state without momentum the walk is torch's."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend, torque_steps=5, damping_eps=0.2)
    frozen = None
    for step in range(12):
        for parameter in parameters:
            parameter.grad = parameter.detach() + 0.1 * torch.randn_like(parameter)
        optimizer.step()
        torques = [float(optimizer.state[parameter]["torque"]) for parameter in parameters]
        if step == 4:
            frozen = torques
            assert all(torque > 0.1 for torque in frozen)
    assert torques == frozen


# --- (b) the step size does not change the angle -------------------------------------------------------------------


@EVERY_BACKEND
@SCOPES
def test_torque_does_not_depend_on_step_size(name, backend, scope):
    """Tolerance 1e-6: fp32 torque, fp32 moments whose scale differs."""
    calibrated, paper = ("sgd", "paper") if name == "TAM" else ("adamw", "paper")
    trails = []
    for step_size in (calibrated, paper):
        first, second = fresh_parameters(), fresh_parameters(seed=1)
        slow = {"momentum": 0.5} if name == "TAM" else {"betas": (0.5, 0.99)}
        groups = [{"params": first}, {"params": second, **slow}]
        optimizer = make(name, groups, backend, step_size=step_size, scope=scope, weight_decay=0.0)
        generator, trail = torch.Generator().manual_seed(5), []
        for step in range(40):
            for parameter in (*first, *second):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = noise + (1.0 if step % 14 < 7 else -1.0)
            optimizer.step()
            trail.append(optimizer.torque_stats()["torque"].clone())
        trails.append(torch.stack(trail))
    assert trails[0].abs().max() > 0.1
    torch.testing.assert_close(trails[0], trails[1], rtol=0, atol=1e-6)


# --- (c) aligned, opposed, orthogonal ------------------------------------------------------------------------------


def _gradient(kind, momentum):
    """Along the momentum (of length 1, or both would grow without bound), against it, or at a right angle to it."""
    if kind == "aligned":
        return momentum / momentum.norm()
    if kind == "opposed":
        return -momentum
    noise = torch.randn(momentum.shape, dtype=torch.float64)
    return noise - momentum * (noise * momentum).sum() / (momentum * momentum).sum()


@EVERY_BACKEND
@SCOPES
@pytest.mark.parametrize(("kind", "limit"), [("aligned", 1.0), ("opposed", 0.0), ("orthogonal", 0.5)])
def test_damping_follows_the_angle(name, backend, scope, kind, limit):
    """After 100 steps 0.9^100 = 3e-5 of the start is left."""
    parameters = fresh_parameters(((32, 4), (9,)))
    optimizer = make(name, parameters, backend, scope=scope)
    for step in range(101):
        for parameter in parameters:
            moment = first_moment(optimizer.state[parameter]) if step else torch.randn(parameter.shape).double()
            parameter.grad = (moment if step == 0 else _gradient(kind, moment)).float()
        optimizer.step()
    torch.testing.assert_close(optimizer.torque_stats()["damping"], torch.full((2,), limit), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["aligned", "opposed", "orthogonal"])
def test_the_public_adatam_stays_at_one_half(kind):
    """Why there is a test (c): an elementwise product where a dot product belongs."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    parameter = torch.nn.Parameter(torch.randn(1024, 4))
    optimizer = pytorch_optimizer.AdaTAM([parameter])
    for step in range(101):
        moment = optimizer.state[parameter]["exp_avg"].double() if step else torch.randn(1024, 4).double()
        parameter.grad = (moment if step == 0 else _gradient(kind, moment)).float()
        optimizer.step()
    assert float((1 + optimizer.state[parameter]["s"].mean()) / 2) == pytest.approx(0.5, abs=0.005)


# --- (d) invariances -----------------------------------------------------------------------------------------------


def _torques(name, backend, scope, factor):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend, scope=scope, weight_decay=0.1 if name == "AdaTAMW" else 0.0)
    generator, trail = torch.Generator().manual_seed(8), []
    for step in range(14):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = factor * (noise + (1.0 if step % 10 < 5 else -1.0))
        optimizer.step()
        trail.append(optimizer.torque_stats()["torque"].clone())
    return torch.stack(trail)


@EVERY_BACKEND
@SCOPES
def test_a_constant_factor_leaves_the_torque(name, backend, scope):
    """A power of two changes no bit; any other factor only the rounding of fp32 (tolerance 1e-6)."""
    plain = _torques(name, backend, scope, 1.0)
    assert plain.abs().max() > 0.1
    for factor in (2.0**-20, 2.0**15):
        assert torch.equal(_torques(name, backend, scope, factor), plain)
    for factor in (1e-7, 0.3, 1e7):
        torch.testing.assert_close(_torques(name, backend, scope, factor), plain, rtol=0, atol=1e-6)


@EVERY_BACKEND
def test_clipping_leaves_the_current_cosine(name, backend):
    cosines = []
    for factor in (1.0, 0.01):
        parameters = fresh_parameters()
        optimizer = make(name, parameters, backend)
        generator = torch.Generator().manual_seed(8)
        for step in range(6):
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient * factor if step == 5 else gradient
            optimizer.step()
        cosines.append(optimizer.torque_stats()["cosine"].clone())
    assert cosines[0].abs().min() > 1e-3
    torch.testing.assert_close(cosines[0], cosines[1], rtol=0, atol=1e-6)


# --- where an angle does not exist ---------------------------------------------------------------------------------


@EVERY_BACKEND
@SCOPES
def test_zero_gradients_are_torchs_and_the_torque_only_decays(name, backend, scope):
    twin = {"AdaTAMW": torch.optim.AdamW, "AdaTAM": torch.optim.Adam, "TAM": torch.optim.SGD}[name]
    shared = {"lr": 1e-2, "weight_decay": 0.1 if name == "AdaTAMW" else 0.0}
    shared |= {"momentum": 0.9} if name == "TAM" else {}
    ours, theirs = fresh_parameters(), fresh_parameters()
    optimizer, torchs = make(name, ours, backend, scope=scope, **shared), twin(theirs, **shared)
    for _ in range(3):  # m = 0 and g = 0
        for parameter in (*ours, *theirs):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torchs.step()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-6, atol=0)
    stats = optimizer.torque_stats()
    assert torch.equal(stats["cosine"], torch.zeros(3))
    assert torch.equal(stats["torque"], torch.zeros(3))
    for gradient in (1.0, 1.0, 0.0):
        for parameter in ours:
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    torch.testing.assert_close(optimizer.torque_stats()["torque"], torch.full((3,), 0.09), rtol=1e-5, atol=0)
    assert all(bool(parameter.isfinite().all()) for parameter in ours)


@EVERY_BACKEND
def test_learning_rate_zero_moves_nothing(name, backend):
    parameters = fresh_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make(name, parameters, backend, lr=0.0, weight_decay=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert all(float(optimizer.state[parameter]["step"]) == 3 for parameter in parameters)


EXPONENTS = (-300, -45, -30, -20, -8, 4, 18, 30, 37, 300)


@EVERY_BACKEND
@SCOPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:.*nonfinite")
def test_any_scale_of_gradient(name, backend, scope, dtype):
    """Never a NaN (torch has none here either); the cosine stays in [-1, 1] and the torque finite.

    Where |g|^2 overflows float64 a step may be skipped.
    """
    largest = torch.finfo(dtype).max
    for exponent in (exponent for exponent in EXPONENTS if 10.0**exponent * 5 < largest):
        parameters = fresh_parameters(((6, 5), (7,)), dtype)
        optimizer = make(name, parameters, backend, scope=scope)
        for step in range(6):
            for parameter in parameters:
                direction = (torch.randn(parameter.shape) + (1 if step < 4 else -1)).double()
                parameter.grad = (direction * 10.0**exponent).clamp(-largest / 4, largest / 4).to(dtype)
            optimizer.step()
            stats = optimizer.torque_stats()
            assert bool((stats["cosine"].abs() <= 1).all()), exponent
            assert bool((stats["torque"].abs() <= 1).all()), exponent
        assert not any(bool(parameter.isnan().any()) for parameter in parameters), exponent


@ADAM_BACKENDS
@SCOPES
@pytest.mark.parametrize("step_size", ["adamw", "paper"])
def test_nothing_left_of_any_gradient(backend, scope, step_size):
    """beta1 = gamma = damping_eps = 0 and an opposed gradient: c = 0, m = 0, and a normalised m would be 0/0."""
    parameters = fresh_parameters(((6,), ()))
    optimizer = make(
        "AdaTAMW", parameters, backend, betas=(0.0, 0.9), gamma=0.0, damping_eps=0.0, scope=scope, step_size=step_size
    )
    for step in range(10):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, (-1.0) ** step)
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)
    assert all(bool(first_moment(optimizer.state[parameter]).isfinite().all()) for parameter in parameters)


# --- ten thousand steps --------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "backend", "steps"),
    [
        ("AdaTAMW", "default", 10_000), ("AdaTAMW", "capturable", 400), ("TAM", "default", 400),
        pytest.param("AdaTAMW", "foreach", 400, marks=pytest.mark.slow),
        pytest.param("AdaTAMW", "single", 400, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_nothing_grows(name, backend, steps):
    parameters = fresh_parameters(((3,),))
    optimizer = make(name, parameters, backend)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def alive():
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(type(entry) is torch.Tensor for entry in objects)

    counts = []
    for step in range(steps):
        optimizer.step()
        if step % 100 == 0:
            optimizer.torque_stats()
        if step in (100, steps - 1):
            counts.append(alive())
    (objects, tensors), (objects_after, tensors_after) = counts
    assert tensors_after <= tensors
    assert objects_after <= objects + 50  # the test's own locals and the collector's noise
    for parameter in parameters:
        assert bool(parameter.isfinite().all())
        assert float(optimizer.state[parameter]["step"]) == steps
