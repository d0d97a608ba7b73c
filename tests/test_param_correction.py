"""bfloat16 parameters whose corrections make them fp32 weights: the run is that of fp32 weights, to the bit."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_tam
from hf_tam.precision import joined, split
from tests import interpreting
from tests.cases import backends_of, transposed

CORRECTED = {"param_correction": "bits16", "state_bits": 32}
OPTIMIZERS = {
    "AdaTAMW": {"weight_decay": 0.1}, "AdaTAM": {"weight_decay": 0.1}, "TAM": {"weight_decay": 0.1},
}  # fmt: skip
SHAPES = [(257, 129), (70, 1003), (3, 5), (), (1,), (8192,), (2048, 1040)]
BACKENDS = [(name, backend) for name in OPTIMIZERS for backend in (*backends_of(name), "triton")]


@pytest.fixture
def options(request, monkeypatch):
    """The class, and the options of a backend."""
    name, backend = request.param
    if backend != "triton":
        return getattr(hf_tam, name), {**OPTIMIZERS[name], **backends_of(name)[backend]}
    kernels = pytest.importorskip("hf_tam.backends.triton")
    interpreting.prepare()
    monkeypatch.setattr("hf_tam.step.gathering.select_backend", lambda device, **_: kernels)
    return getattr(hf_tam, name), OPTIMIZERS[name]


each_backend = pytest.mark.parametrize("options", BACKENDS, ids="-".join, indirect=True)


def pair(shapes, *, seed=0, layout=torch.Tensor.contiguous):
    """fp32 weights that bfloat16 holds, and the same in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    narrow = [layout((0.02 * torch.randn(shape, generator=generator)).bfloat16()) for shape in shapes]
    return [torch.nn.Parameter(each.float()) for each in narrow], [torch.nn.Parameter(each) for each in narrow]


def give_gradients(wide, narrow, step):
    for at, (weights, param) in enumerate(zip(wide, narrow, strict=True)):
        generator = torch.Generator().manual_seed(1000 * step + at)
        drawn = torch.randn(param.shape, generator=generator) + 0.5
        param.grad = torch.empty_like(param).copy_(drawn)
        weights.grad = param.grad.float()


def assert_same_weights(wide, narrow, optimizer):
    for weights, param in zip(wide, narrow, strict=True):
        assert torch.equal(joined(param.detach(), optimizer.state[param]["param_correction"]), weights.detach())


@each_backend
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed], ids=["contiguous", "transposed"])
def test_the_run_is_that_of_fp32_weights(options, layout, request):
    cls, arguments = options
    # All threads share the last one; in Triton's interpreter every element costs.
    shapes = SHAPES if layout is torch.Tensor.contiguous and "triton" not in request.node.callspec.id else SHAPES[2:-1]
    wide, narrow = pair(shapes, layout=layout)
    expected = cls(wide, lr=2e-5, **arguments)
    optimizer = cls(narrow, lr=2e-5, **arguments, **CORRECTED)
    for step in range(5):
        give_gradients(wide, narrow, step)
        expected.step()
        optimizer.step()
    assert_same_weights(wide, narrow, optimizer)
    for weights, param in zip(wide, narrow, strict=True):
        state = optimizer.state[param]
        assert all(torch.equal(value, state[key]) for key, value in expected.state[weights].items())
        # The nearest there is; the even one of two is torch's.
        assert torch.equal(param.detach(), weights.detach().bfloat16()) or param.numel() > 1000
        assert (param.detach() != weights.detach().bfloat16()).float().mean() < 1e-3


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(each, marks=pytest.mark.slow if each[1] == "triton" else ())
        for each in BACKENDS
        if each[0] != "TAM"
    ],
    ids="-".join,
    indirect=True,
)
def test_a_thousand_steps(options):
    cls, arguments = options
    wide, narrow = pair([(33, 31), (129,)])
    expected, optimizer = cls(wide, lr=2e-5, **arguments), cls(narrow, lr=2e-5, **arguments, **CORRECTED)
    for step in range(1000):
        give_gradients(wide, narrow, step)
        expected.step()
        optimizer.step()
    assert_same_weights(wide, narrow, optimizer)


@each_backend
def test_moments_in_bfloat16_move_the_same_weights(options):
    """Six bytes a parameter: a step is that of the fp32 weights with the moments as they were stored."""
    cls, arguments = options
    _, narrow = pair([(257, 129), (3, 5)])
    optimizer = cls(narrow, lr=2e-5, **arguments, param_correction="bits16")
    for step in range(3):
        wide = [torch.nn.Parameter(param.detach().float()) for param in narrow]
        if step:
            wide = [
                torch.nn.Parameter(joined(param.detach(), optimizer.state[param]["param_correction"]))
                for param in narrow
            ]
        expected = cls(wide, lr=2e-5, **arguments)
        for weights, param in zip(wide, narrow, strict=True):
            expected.state[weights] = {
                key: value.float().clone()
                for key, value in optimizer.state.get(param, {}).items()
                if key != "param_correction"
            }
        give_gradients(wide, narrow, step)
        expected.step()
        optimizer.step()
        for weights, param in zip(wide, narrow, strict=True):
            state = optimizer.state[param]
            # The angle's sums of bfloat16 pairs are taken in another order.
            torch.testing.assert_close(
                joined(param.detach(), state["param_correction"]), weights.detach(), rtol=1e-6, atol=2e-9
            )
            held = sum(value.nbytes for value in state.values())
            assert held <= (6 if cls is not hf_tam.TAM else 4) * param.numel() + 24


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_every_bit_pattern_comes_back(patterns):
    weights = torch.tensor([each - 2**32 if each >= 2**31 else each for each in patterns], dtype=torch.int32)
    weights = weights.view(torch.float32)
    param, correction = (torch.empty(len(weights), dtype=torch.bfloat16) for _ in range(2))
    split(weights, param, correction)
    back = joined(param, correction)
    is_nan = weights.isnan()
    assert torch.equal(back.isnan(), is_nan)
    assert torch.equal(back[~is_nan].view(torch.int32), weights[~is_nan].view(torch.int32))
    assert torch.equal(param.isnan(), is_nan)
    nearest = weights.bfloat16()
    # Beside a tie, which goes away from zero, as torch rounds.
    is_tie = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[~is_nan & ~is_tie], nearest[~is_nan & ~is_tie])
    assert ((param.abs() >= nearest.abs()) | is_nan).all()


def test_only_bfloat16_has_a_correction():
    parameters = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float16)))
    optimizer = hf_tam.AdaTAMW(parameters, **CORRECTED)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert ["param_correction" in optimizer.state[parameter] for parameter in parameters] == [False, True, False]
    assert {optimizer.state[parameter]["exp_avg"].dtype for parameter in parameters} == {torch.float32}


def test_groups_may_differ():
    _, (first, second) = pair([(4, 4), (4, 4)])
    groups = [{"params": [first], "param_correction": "bits16"}, {"params": [second]}]
    optimizer = hf_tam.AdaTAMW(groups, lr=1e-6)
    first.grad = second.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    optimizer.step()
    assert "param_correction" in optimizer.state[first]
    assert "param_correction" not in optimizer.state[second]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"param_correction": "bits8"}, "param_correction must be None or one of 'bits16'"),
        ({"state_bits": 16}, "state_bits must be None or 32"),
        ({"state_bits": True}, "state_bits must be None or 32"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hf_tam.AdaTAMW([torch.nn.Parameter(torch.zeros(1))], **arguments)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def bits(tensor):
    """Of a correction some look like NaN, which equals nothing."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def trained(steps, *, start=0, loaded=None, narrow=None, **arguments):
    _, made = pair([(17, 9), (5,)])
    narrow = made if narrow is None else narrow
    optimizer = hf_tam.AdaTAMW(narrow, lr=2e-5, **arguments)
    if loaded is not None:
        optimizer.load_state_dict(loaded)
    for step in range(start, start + steps):
        give_gradients([torch.nn.Parameter(param.detach().float()) for param in narrow], narrow, step)
        optimizer.step()
    return narrow, optimizer


@pytest.mark.parametrize("arguments", [CORRECTED, {"param_correction": "bits16"}, {"state_bits": 32}], ids=str)
def test_a_resumed_run_goes_on(arguments, tmp_path):
    whole, expected = trained(6, **arguments)
    params, optimizer = trained(3, **arguments)
    torch.save({"optimizer": optimizer.state_dict(), "model": params}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    optimizer_state = torch.load(tmp_path / "checkpoint.pt", weights_only=False)["optimizer"]
    params, optimizer = trained(3, start=3, loaded=optimizer_state, narrow=saved["model"], **arguments)
    for left, right in zip(whole, params, strict=True):
        assert torch.equal(left, right)
        assert expected.state[left].keys() == optimizer.state[right].keys()
        for key, value in expected.state[left].items():
            assert value.dtype == optimizer.state[right][key].dtype
            assert torch.equal(bits(value), bits(optimizer.state[right][key])), key


def test_states_are_converted_to_what_is_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* of bfloat16 parameters did not move")
        _, plain = trained(2)
        params, optimizer = trained(1, loaded=copy.deepcopy(plain.state_dict()), **CORRECTED)
        state = optimizer.state[params[0]]
        assert (state["exp_avg"].dtype, state["param_correction"].dtype) == (torch.float32, torch.bfloat16)
        assert state["step"] == 3
        params, optimizer = trained(1, loaded=copy.deepcopy(optimizer.state_dict()))
    state = optimizer.state[params[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert "param_correction" not in state


def test_adamws_state_is_taken_over_and_given_back():
    _, narrow = pair([(17, 9)])
    adamw = torch.optim.AdamW(narrow, lr=2e-5)
    narrow[0].grad = torch.ones_like(narrow[0])
    adamw.step()
    params, optimizer = trained(1, loaded=adamw.state_dict(), narrow=narrow, **CORRECTED)
    assert optimizer.state[params[0]]["param_correction"].dtype == torch.bfloat16
    exported = hf_tam.export_torch_state_dict(optimizer)
    assert "param_correction" not in exported["state"][0]
    adamw.load_state_dict(exported)
    assert adamw.state[params[0]]["step"] == 2


def test_a_correction_that_was_converted_is_refused():
    _, optimizer = trained(1, **CORRECTED)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["param_correction"] = saved["state"][0]["param_correction"].float()
    with pytest.raises(ValueError, match=r"the saved param_correction of parameter 0 .* is torch.float32"):
        trained(0, loaded=saved, **CORRECTED)


def test_copies_and_pickles_have_it(tmp_path):
    params, optimizer = trained(2, **CORRECTED)
    twin = copy.deepcopy(optimizer)
    (key, *_) = twin.state
    assert torch.equal(bits(twin.state[key]["param_correction"]), bits(optimizer.state[params[0]]["param_correction"]))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["state"][0]["param_correction"].dtype == torch.bfloat16
