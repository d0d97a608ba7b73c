"""Everything torch.optim promises of an optimizer, for every backend."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import hf_tam
from tests.cases import backends_of, takes_tensor_lr
from tests.reference import ReferenceOptimizer, real_f64
from tests.running import first_moment
from tests.test_properties import EVERY_BACKEND, SCOPES, fresh_parameters, make

NAMES = pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (noise + (1.0 if seed % 8 < 4 else -1.0)).to(parameter.dtype)


def walk(optimizer, parameters, seeds):
    for seed in seeds:
        set_gradients(parameters, seed)
        optimizer.step()


def assert_bitwise(left, left_parameters, right, right_parameters):
    """The same parameters and the same state, to the last bit."""
    for mine, their in zip(left_parameters, right_parameters, strict=True):
        assert torch.equal(mine, their)
        assert left.state[mine].keys() == right.state[their].keys()
        for key, value in left.state[mine].items():
            assert torch.equal(value, right.state[their][key]), key
            assert value.dtype == right.state[their][key].dtype, key


# --- the call ------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_is_an_optimizer(name, backend):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert name in repr(optimizer)
    walk(optimizer, parameters, range(2))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)
    optimizer.step()  # nothing to do
    assert all(float(optimizer.state[parameter]["step"]) == 2 for parameter in parameters)
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


@EVERY_BACKEND
def test_closure(name, backend):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make(name, [parameter], backend)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert optimizer.step() is None
    assert not torch.equal(parameter, before)


@NAMES
def test_hooks(name):
    parameters = fresh_parameters()
    optimizer = make(name, parameters)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    walk(optimizer, parameters, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "loaded"]


@EVERY_BACKEND
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_left_alone(name, backend, maximize):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend, maximize=maximize, weight_decay=0.1)
    for seed in range(3):
        set_gradients(parameters, seed)
        before = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        assert all(torch.equal(parameter.grad, old) for parameter, old in zip(parameters, before, strict=True))


@EVERY_BACKEND
def test_autograd_notices_the_step(name, backend):
    """A graph that saved the parameter must not be used after it changed (torch's fused kernels count no version)."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make(name, [parameter], backend, lr=0.1)
    for _ in range(2):
        loss = (parameter**2).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@EVERY_BACKEND
def test_state_is_created_lazily(name, backend):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend)
    assert not optimizer.state
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert [parameter in optimizer.state for parameter in parameters] == [True, False, False]


# --- param groups --------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_a_group_overrides_any_hyperparameter(name, backend):
    """Each group alone, under its own hyperparameters, ends where it ends together with the others."""
    own = [
        {"lr": 0.02},
        {"momentum": 0.5} if name == "TAM" else {"betas": (0.5, 0.9)},
        {"weight_decay": 0.3},
        {"gamma": 0.3},
        {"damping_eps": 0.2},
        {"torque_steps": 2},
        {"maximize": True},
        {"step_size": "paper"},
        *([] if name == "TAM" else [{"eps": 0.1}]),
    ]
    sets = [fresh_parameters(((4, 3), (5,)), seed=index) for index in range(len(own))]
    groups = [{**options, "params": parameters} for options, parameters in zip(own, sets, strict=True)]
    optimizer = make(name, groups, backend)
    alone = [fresh_parameters(((4, 3), (5,)), seed=index) for index in range(len(own))]
    optimizers = [make(name, parameters, backend, **options) for options, parameters in zip(own, alone, strict=True)]
    plain = fresh_parameters(((4, 3), (5,)), seed=0)
    for seed in range(6):
        for parameters in (*sets, *alone):
            set_gradients(parameters, seed)
        for each in (optimizer, *optimizers):
            each.step()
    for parameters, same, each in zip(sets, alone, optimizers, strict=True):
        assert_bitwise(optimizer, parameters, each, same)
    assert not torch.equal(sets[0][0], plain[0])


@EVERY_BACKEND
@SCOPES
def test_add_param_group_in_mid_run(name, backend, scope):
    """The others keep their state; the new one starts fresh; both go on as the reference does."""
    first, second = fresh_parameters(), fresh_parameters(((5, 2),), seed=4)
    options = {"lr": 0.01, "scope": scope}
    optimizer = make(name, first, backend, **options)
    reference = ReferenceOptimizer(name, [{"params": [p.detach().clone() for p in first]}], **options)
    later = ReferenceOptimizer(name, [{"params": second, "gamma": 0.5}], **options)
    for seed in range(9):
        if seed == 4:
            kept = copy.deepcopy(optimizer.state_dict()["state"])
            optimizer.add_param_group({"params": second, "gamma": 0.5})
            now = optimizer.state_dict()["state"]
            assert now.keys() == kept.keys()
            assert all(torch.equal(now[index][key], value) for index in kept for key, value in kept[index].items())
            reference.states += later.states
        parameters = [*first, *second] if seed >= 4 else first
        set_gradients(parameters, seed)
        optimizer.step()
        reference.step([parameter.grad for parameter in parameters])
    for parameter, state in zip((*first, *second), reference.states, strict=True):
        assert float(optimizer.state[parameter]["step"]) == state.step
        assert float(optimizer.state[parameter]["torque"]) == pytest.approx(state.torque, abs=2e-6)
        torch.testing.assert_close(real_f64(parameter), state.parameter, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first_moment(optimizer.state[parameter]), state.first_moment, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_requires_grad_toggled(name, backend):
    """While a parameter is frozen nothing of it changes, and the others do not notice."""
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer, twin = make(name, parameters, backend), make(name, twins, backend)
    walk(optimizer, parameters, range(3))
    walk(twin, twins, range(3))
    frozen = {key: value.clone() for key, value in optimizer.state[parameters[1]].items()}
    value = parameters[1].detach().clone()
    parameters[1].requires_grad_(False)
    for seed in range(3, 6):
        set_gradients(parameters, seed)
        set_gradients(twins, seed)
        parameters[1].grad = None
        optimizer.step()
        twin.step()
    assert torch.equal(parameters[1], value)
    assert all(torch.equal(optimizer.state[parameters[1]][key], old) for key, old in frozen.items())
    assert torch.equal(parameters[0], twins[0])
    assert torch.equal(parameters[2], twins[2])
    parameters[1].requires_grad_(True)
    walk(optimizer, parameters, [6])
    assert float(optimizer.state[parameters[1]]["step"]) == 4


@NAMES
def test_empty_group_is_legal(name):
    parameters = fresh_parameters()
    optimizer = make(name, [{"params": []}, {"params": parameters}, {"params": []}])
    walk(optimizer, parameters, range(2))
    assert optimizer.torque_stats()["torque"].shape == (3,)
    only_empty = make(name, [{"params": []}])
    only_empty.step()
    only_empty.load_state_dict(only_empty.state_dict())
    assert only_empty.torque_stats()["torque"].shape == (0,)


# --- learning rates ------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_learning_rate(name, backend, shape):
    """Equal to the float, moved in place by whoever holds the tensor, and never changed by the step."""
    lr = torch.full(shape, 0.25)
    if not takes_tensor_lr(name, backend):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
            make(name, fresh_parameters(), backend, lr=lr)
        return
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer, twin = make(name, parameters, backend, lr=lr), make(name, twins, backend, lr=0.25)
    for seed in range(6):
        if seed == 3:
            lr.fill_(0.125)
            twin.param_groups[0]["lr"] = 0.125
        walk(optimizer, parameters, [seed])
        walk(twin, twins, [seed])
    assert optimizer.param_groups[0]["lr"] is lr
    assert torch.equal(lr, torch.full(shape, 0.125))
    for mine, their in zip(parameters, twins, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-6)


@EVERY_BACKEND
def test_one_cycle_moves_betas(name, backend):
    """OneCycleLR finds betas (momentum) in the groups, moves them, and the steps are the reference's."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
    reference = ReferenceOptimizer(name, [{"params": [p.detach().clone() for p in parameters]}])
    moved = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others "lr_scheduler.step() before optimizer.step()"
        for seed in range(15):
            set_gradients(parameters, seed)
            keys = ("lr", "momentum") if name == "TAM" else ("lr", "betas")
            reference.groups[0].update({key: optimizer.param_groups[0][key] for key in keys})
            moved.add(reference.groups[0][keys[1]])
            reference.step([parameter.grad for parameter in parameters])
            optimizer.step()
            scheduler.step()
    assert len(moved) > 10
    for parameter, state in zip(parameters, reference.states, strict=True):
        torch.testing.assert_close(real_f64(parameter), state.parameter, rtol=1e-5, atol=2e-6)
        assert float(optimizer.state[parameter]["torque"]) == pytest.approx(state.torque, abs=2e-6)


# --- copies --------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("steps", [0, 3])
def test_deepcopy(name, backend, steps):
    """With the model: the copy goes on by itself, bit for bit as the original does."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(name, model.parameters(), backend)
    walk(optimizer, list(model.parameters()), range(steps))
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert twin.param_groups[0]["params"][0] is next(twin_model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    walk(twin, list(twin_model.parameters()), range(steps, steps + 3))
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    walk(optimizer, list(model.parameters()), range(steps, steps + 3))
    assert_bitwise(optimizer, list(model.parameters()), twin, list(twin_model.parameters()))
    assert torch.equal(optimizer.torque_stats()["torque"], twin.torque_stats()["torque"])


@EVERY_BACKEND
@pytest.mark.parametrize("steps", [0, 3])
def test_pickle(name, backend, steps):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(name, model.parameters(), backend)
    walk(optimizer, list(model.parameters()), range(steps))
    twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
    walk(twin, list(twin_model.parameters()), range(steps, steps + 3))
    walk(optimizer, list(model.parameters()), range(steps, steps + 3))
    assert_bitwise(optimizer, list(model.parameters()), twin, list(twin_model.parameters()))


@NAMES
def test_unpickled_alone(name):
    """Without its model: the parameters it brings along are its own."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters)
    walk(optimizer, parameters, range(2))
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    walk(twin, twin.param_groups[0]["params"], [2])
    walk(optimizer, parameters, [2])
    assert_bitwise(optimizer, parameters, twin, twin.param_groups[0]["params"])


# --- torch's own list of what AdamW must take -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends_of("AdaTAMW"))
def test_the_inputs_of_torchs_own_tests(backend):
    """Held neutral, each of the argument sets PyTorch tests AdamW with gives AdamW's result."""
    common = pytest.importorskip("torch.testing._internal.common_optimizers")
    info = next(info for info in common.optim_db if info.optim_cls is torch.optim.AdamW)
    tried = 0
    for case in info.optim_inputs_func(device="cpu"):
        options = {key: value for key, value in case.kwargs.items() if key not in ("foreach", "fused", "capturable")}
        if options.pop("amsgrad", False) or (isinstance(options.get("lr"), torch.Tensor) and backend == "foreach"):
            continue
        parameters, twins = fresh_parameters(), fresh_parameters()
        optimizer = make("AdaTAMW", parameters, backend, gamma=1.0, damping_eps=0.0, **options)
        twin = torch.optim.AdamW(twins, **options)
        walk(optimizer, parameters, range(7))
        walk(twin, twins, range(7))
        for mine, their in zip(parameters, twins, strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)
        tried += 1
    assert tried >= 4


def test_public_names():
    for name in ("AdaTAMW", "AdaTAM", "TAM", "export_torch_state_dict"):
        assert name in hf_tam.__all__
        assert hasattr(hf_tam, name)
