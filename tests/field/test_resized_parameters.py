"""Parameters that become others under the same name while the optimizer lives: resized, pruned, converted, moved.

torch.optim.AdamW, without `fused`, is the control: what it refuses is refused here, before anything is changed, and
what it accepts gives the step that the readable backend gives.
"""

from __future__ import annotations

import copy
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_tam
from hf_tam.backends import native, select_backend, single

ROWS, WIDTH = 500, 64
BACKENDS = {
    "default": {},
    "torch's kernels": {},
    "foreach": {"foreach": True},
    "single": {"foreach": False, "fused": False},
    "capturable": {"capturable": True},
    "triton": {},
}


@pytest.fixture(params=BACKENDS)
def options(request, monkeypatch):
    """What the constructor is given for each backend; the choice is bent for two of them."""
    if request.param == "torch's kernels":
        monkeypatch.setattr("hf_tam.backends.native.is_available", lambda: False)
    if request.param == "triton":
        _use_triton(monkeypatch)
    return BACKENDS[request.param]


def _use_triton(monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled here: a GPU's tests show it")
    from hf_tam.backends import triton as backend
    from tests import interpreting

    interpreting.prepare()
    monkeypatch.setattr("hf_tam.step.gathering.select_backend", lambda device, **_: backend)


def _stepped(cls=hf_tam.AdaTAMW, shape=(ROWS, WIDTH), **options):
    """A parameter, an idle neighbour, and their optimizer after a step."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)), torch.nn.Parameter(torch.randn(7))]
    optimizer = cls(parameters, lr=1e-2, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return parameters, optimizer


def _everything(parameters, optimizer):
    held = [parameter.detach().clone() for parameter in parameters]
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return held + [torch.as_tensor(value).clone() for value in states]


def _grown(tensor):
    return torch.cat([tensor, torch.zeros(8, WIDTH)])


RESIZED = {
    "resize_token_embeddings adds rows": _grown,
    "the last rows are pruned": lambda tensor: tensor[:-8],
    "the first row is pruned": lambda tensor: tensor[1:],
    "one row is left": lambda tensor: tensor[:1],
    "no row is left": lambda tensor: tensor[:0],
    "turned": lambda tensor: tensor.t(),
    "turned and copied": lambda tensor: tensor.t().contiguous(),
    "flattened": lambda tensor: tensor.reshape(-1),
    "other rows of another buffer": lambda tensor: torch.randn(2 * ROWS, WIDTH)[: ROWS + 1],
}  # fmt: skip


@pytest.mark.parametrize("change", RESIZED)
@pytest.mark.parametrize("gradient", ["new", "old"])
def test_a_resized_parameter_is_refused(options, change, gradient):
    """As AdamW does; the message has the name and both shapes, and nothing has changed."""
    for cls, error in ((torch.optim.AdamW, RuntimeError), (hf_tam.AdaTAMW, ValueError)):
        parameters, optimizer = _stepped(cls, **(options if cls is hf_tam.AdaTAMW else {}))
        parameters[0].data = RESIZED[change](parameters[0].data)
        if gradient == "new":
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
        before = _everything(parameters, optimizer)
        with pytest.raises(error) as caught:
            optimizer.step()
        if cls is hf_tam.AdaTAMW:
            for words in ("number 0", str(tuple(parameters[0].shape)), str((ROWS, WIDTH)), "optimizer.state"):
                assert words in str(caught.value)
            after = _everything(parameters, optimizer)
            assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_resized_parameter_is_named():
    model = torch.nn.Sequential(torch.nn.Embedding(20, 4), torch.nn.Linear(4, 20))
    optimizer = hf_tam.AdaTAMW(model.named_parameters())
    model(torch.arange(20)).sum().backward()
    optimizer.step()
    model[0].weight.data = torch.cat([model[0].weight.data, torch.zeros(2, 4)])
    model[0].weight.grad = torch.ones(22, 4)
    with pytest.raises(ValueError, match=r"parameter 0\.weight has shape \(22, 4\), and its .* \(20, 4\)"):
        optimizer.step()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", RESIZED)
def test_a_resized_moment_is_refused(options, key, change):
    parameters, optimizer = _stepped(**options)
    optimizer.state[parameters[0]][key] = RESIZED[change](optimizer.state[parameters[0]][key])
    with pytest.raises(ValueError, match=r"number 0 has shape \(500, 64\), and its moment"):
        optimizer.step()


@pytest.mark.long
def test_a_parameter_whose_states_were_resized_with_it_goes_on(options):
    """The surgery of gaussian splatting and of vocabulary growth: both cut, or both grown with zeros."""
    for change in (_grown, lambda tensor: tensor[:-8], lambda tensor: tensor[1:]):
        twins = []
        for chosen in (options, BACKENDS["single"]):
            parameters, optimizer = _stepped(**chosen)
            state = optimizer.state[parameters[0]]
            for key in optimizer.moments:
                state[key] = change(state[key])
            parameters[0].data = change(parameters[0].data)
            parameters[0].grad = torch.ones_like(parameters[0])
            if chosen is not options:
                optimizer.param_groups[0]["capturable"] = options.get("capturable", False)
            optimizer.step()
            twins.append([parameters[0].detach(), *(state[key] for key in optimizer.moments), state["torque"]])
        for mine, theirs in zip(*twins, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_states_that_were_deleted_begin_anew(options):
    parameters, optimizer = _stepped(**options)
    parameters[0].data = _grown(parameters[0].data)
    parameters[0].grad = torch.ones_like(parameters[0])
    del optimizer.state[parameters[0]]
    optimizer.step()
    state = optimizer.state[parameters[0]]
    assert state["exp_avg"].shape == (ROWS + 8, WIDTH)
    assert float(state["step"]) == 1.0
    assert float(optimizer.state[parameters[1]]["step"]) == 2.0


CONVERTED = {
    "model.bfloat16()": (torch.bfloat16, torch.bfloat16, torch.float32),
    "model.double()": (torch.float64, torch.float64, torch.float32),
    "moments in bf16": (torch.float32, torch.float32, torch.bfloat16),
    "moments in fp64": (torch.float32, torch.float32, torch.float64),
}


@pytest.mark.parametrize("change", CONVERTED)
def test_a_dtype_that_the_states_do_not_have_is_refused(options, change):
    parameter_dtype, gradient_dtype, moment_dtype = CONVERTED[change]
    for cls, error in ((torch.optim.AdamW, RuntimeError), (hf_tam.AdaTAMW, ValueError)):
        parameters, optimizer = _stepped(cls, **(options if cls is hf_tam.AdaTAMW else {}))
        parameters[0].data = parameters[0].data.to(parameter_dtype)
        parameters[0].grad = torch.ones(ROWS, WIDTH, dtype=gradient_dtype)
        state = optimizer.state[parameters[0]]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].to(moment_dtype)
        before = _everything(parameters, optimizer)
        with pytest.raises(error) as caught:
            optimizer.step()
        if cls is hf_tam.AdaTAMW:
            assert str(moment_dtype) in str(caught.value)
            after = _everything(parameters, optimizer)
            assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_bf16_parameter_with_fp32_gradient_and_moments_is_stepped(options):
    """AdamW accepts it too: `p.data = p.data.bfloat16()` beside a gradient that was there."""
    control, optimizer = _stepped(torch.optim.AdamW)
    control[0].data = control[0].data.bfloat16()
    optimizer.step()
    twins = []
    for chosen in (options, BACKENDS["single"]):
        parameters, optimizer = _stepped(**chosen)
        parameters[0].data = parameters[0].data.bfloat16()
        optimizer.step()
        twins.append([parameters[0].detach(), optimizer.state[parameters[0]]["exp_avg"]])
    assert twins[0][0].dtype == torch.bfloat16
    assert twins[0][1].dtype == torch.float32
    torch.testing.assert_close(twins[0][1], twins[1][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twins[0][0], twins[1][0], rtol=2**-7, atol=1e-6)


def test_states_on_another_device_are_refused(options):
    parameters, optimizer = _stepped(**options)
    optimizer.state[parameters[0]]["exp_avg_sq"] = torch.empty(ROWS, WIDTH, device="meta")
    with pytest.raises(ValueError, match=r"number 0 \(shape \(500, 64\)\) is on cpu, and its moment .* on meta"):
        optimizer.step()


def test_a_gradient_that_was_cut_under_the_same_object_is_refused(options):
    parameters, optimizer = _stepped(**options)
    parameters[0].grad.data = parameters[0].grad.data[1:]
    with pytest.raises(ValueError, match=r"number 0 has shape \(500, 64\), and its gradient \(499, 64\)"):
        optimizer.step()


# --- any of them, in any order --------------------------------------------------------------------------------------


def _laid_out(tensor, layout):
    """The same values, lying otherwise."""
    if layout == "in a buffer":
        return torch.cat([torch.zeros(5, dtype=tensor.dtype), tensor.flatten()])[5:].view(tensor.shape)
    if layout == "turned":
        return tensor.t().contiguous().t()
    if layout == "strided":
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    return tensor.clone()


_PLACES = ("param", "grad", "exp_avg", "exp_avg_sq", "step", "torque", "exp_avg_scale")
_LAYOUTS = ("moved", "in a buffer", "turned", "strided")
_CHANGES = st.one_of(
    st.tuples(st.just("lie"), st.sampled_from(_PLACES[:4]), st.sampled_from(_LAYOUTS), st.booleans()),
    st.tuples(st.just("cut"), st.sampled_from(_PLACES[:4]), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("dtype"), st.sampled_from(_PLACES), st.sampled_from([torch.bfloat16, torch.float64])),
    st.tuples(st.just("meta"), st.sampled_from(_PLACES[2:4])),
    st.tuples(st.just("frozen")),
    st.tuples(st.just("cut all"), st.integers(1, 5)),
    st.tuples(st.just("dtype of all"), st.sampled_from([torch.bfloat16, torch.float64, torch.float32])),
    st.tuples(st.just("forgotten")),
)


def _apply(change, parameter, state):
    """Do to a parameter, its gradient or its state what somebody may do between two steps."""
    kind, *arguments = change
    held = {"param": parameter, "grad": parameter.grad, **state}

    def put(place, value, in_place=True):
        if place == "param" or (in_place and isinstance(held.get(place), torch.Tensor)):
            held[place].data = value
        elif place == "grad":
            parameter.grad = value if value.shape == parameter.shape and value.dtype == parameter.dtype else None
        else:
            state[place] = value

    if kind in ("lie", "cut"):
        place, how, in_place = arguments
        if isinstance(held.get(place), torch.Tensor) and held[place].ndim == 2:
            value = (
                _laid_out(held[place].data, how) if kind == "lie" else held[place].data[: held[place].shape[0] - how]
            )
            put(place, value, in_place)
    elif kind in ("dtype", "meta"):
        if isinstance(held.get(arguments[0]), torch.Tensor):
            put(arguments[0], held[arguments[0]].data.to(arguments[1] if kind == "dtype" else "meta"), kind == "dtype")
    elif kind == "frozen":
        parameter.requires_grad_(not parameter.requires_grad)
    elif kind == "forgotten":
        state.clear()
    else:
        for place in _PLACES[:4]:
            if isinstance(held.get(place), torch.Tensor) and held[place].ndim == 2:
                value = held[place].data
                put(place, value[: -arguments[0]] if kind == "cut all" else value.to(arguments[0]))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["default", "torch's kernels", "foreach", "triton"])
@given(changes=st.lists(st.tuples(st.integers(0, 1), _CHANGES), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=settings().max_examples * 4)
def test_whatever_is_done_to_tensors_between_steps(backend, changes, seed):
    """Either a ValueError and nothing changed, or the step that the readable backend takes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if backend == "torch's kernels":
            monkeypatch.setattr("hf_tam.backends.native.is_available", lambda: False)
        if backend == "triton":
            _use_triton(monkeypatch)
        generator = torch.Generator().manual_seed(seed)
        parameters = [torch.nn.Parameter(torch.randn(30, 8, generator=generator)) for _ in range(2)]
        twins = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        optimizer = hf_tam.AdaTAMW(parameters, lr=1e-2, **BACKENDS[backend])
        twin = hf_tam.AdaTAMW(twins, lr=1e-2, **BACKENDS["single"])
        for step in range(len(changes) + 1):
            for parameter, other in zip(parameters, twins, strict=True):
                if parameter.requires_grad:
                    grad = torch.randn(parameter.shape, generator=generator)
                    parameter.grad, other.grad = grad.to(parameter.dtype), grad.to(other.dtype)
            if step:
                place, change = changes[step - 1]
                _apply(change, parameters[place], optimizer.state[parameters[place]])
                _apply(change, twins[place], twin.state[twins[place]])
            if not _step_alike(optimizer, twin, parameters, twins):
                return


def _step_alike(optimizer, twin, parameters, twins):
    """Step both; False where both refuse."""
    before = copy.deepcopy([dict(optimizer.state[parameter]) for parameter in parameters])
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        _step_with(single, twin)
    except ValueError as refused:
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            optimizer.step()
        assert all(torch.equal(left, right) for left, right in zip(values, parameters, strict=True))
        for parameter, state in zip(parameters, before, strict=True):
            for key, value in state.items():
                assert value.is_meta or torch.equal(value, optimizer.state[parameter][key])
        return False
    optimizer.step()
    for parameter, other in zip(parameters, twins, strict=True):
        coarse = {parameter.dtype, *(value.dtype for value in optimizer.state[parameter].values())}
        rtol, atol = (2**-6, 1e-2) if torch.bfloat16 in coarse else (1e-5, 1e-6)
        torch.testing.assert_close(parameter.detach(), other.detach(), rtol=rtol, atol=atol)
        for key, value in optimizer.state[parameter].items():
            torch.testing.assert_close(value, twin.state[other][key], rtol=rtol, atol=atol)
    return True


def _step_with(backend, optimizer):
    """A step of one backend, whatever a test has put in the place of the choice."""
    from hf_tam.step import gathering

    chosen, gathering.select_backend = gathering.select_backend, lambda device, **_: backend
    try:
        optimizer.step()
    finally:
        gathering.select_backend = chosen


@pytest.mark.skipif(not native.is_available(), reason="needs a C compiler")
def test_the_default_is_the_compiled_backend():
    """Otherwise the tests above would not try it."""
    assert select_backend(torch.device("cpu"), foreach=None, fused=None, on_host=True) is native


@pytest.mark.parametrize("cls", [torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM])
def test_another_shape_with_the_same_address_strides_and_size(cls):
    """Elements 2 and 5 are not the new parameter's, and 6 and 7 are."""
    buffer = torch.arange(12.0)
    parameter = torch.nn.Parameter(buffer[:6].view(2, 3))
    optimizer = cls([parameter], lr=0.1)
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    parameter.grad = None
    parameter.data = buffer.as_strided((3, 2), (3, 1))
    parameter.grad = torch.ones(16).as_strided((3, 2), (3, 1))
    before = buffer.clone()
    with pytest.raises((RuntimeError, ValueError), match=r"size of tensor|has shape \(3, 2\), and its moment"):
        optimizer.step()
    assert buffer.equal(before) or cls is torch.optim.AdamW  # which had begun
