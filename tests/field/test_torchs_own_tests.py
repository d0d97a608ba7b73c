"""What PyTorch's tests ask of every optimizer about states, groups, hooks and copies, asked of ours and of AdamW.

After test/test_optim.py, TestOptimRenewed, with the argument sets of torch/testing/_internal/common_optimizers.py.
Those that need a GPU are not here: test_state_dict_with_cuda_params, test_cpu_load_state_dict.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hf_tam
from tests.field.loading import CLASSES, COUNTERPARTS, OURS

common = pytest.importorskip("torch.testing._internal.common_optimizers")


def _argument_sets(name):
    """torch's own for the counterpart, without what is not in ours, in each form of the step."""
    counterpart = getattr(torch.optim, COUNTERPARTS.get(name, name))
    info = next(info for info in common.optim_db if info.optim_cls is counterpart)
    refused = {"amsgrad", "nesterov", "dampening", "differentiable", "decoupled_weight_decay"}
    for number, case in enumerate(info.optim_inputs_func(device="cpu")):
        if refused & {key for key, value in case.kwargs.items() if value} or case.kwargs.get("capturable"):
            continue
        for form in ({}, {"foreach": True}, *([{"fused": True}] if name != "TAM" else [])):
            if "foreach" in form and isinstance(case.kwargs.get("lr"), torch.Tensor):
                continue
            yield f"{name}-{number}-{'-'.join(form) or 'default'}", name, {**case.kwargs, **form}


ARGUMENTS = [
    pytest.param(name, options, id=label) for each in (*OURS, "AdamW") for label, name, options in _argument_sets(each)
]
EVERY_SET = pytest.mark.parametrize(("name", "options"), ARGUMENTS)
EVERY_CLASS = pytest.mark.parametrize("name", [*OURS, "AdamW"])


def make(name, parameters, options=None):
    cls = getattr(hf_tam, name) if name in OURS else getattr(torch.optim, name)
    return cls(parameters, **{"lr": 1e-3, **copy.deepcopy(options or {})})


class Trained:
    """A linear map and its optimizer, named or not."""

    def __init__(self, name, options=None, *, named=False, values=None, groups=None):
        torch.manual_seed(1)
        self.weight, self.bias = values or (nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2)))
        self.input = torch.randn(3)
        parameters = [self.weight, self.bias]
        if named:
            parameters = [(f"name{index}", parameter) for index, parameter in enumerate(parameters)]
        self.optimizer = make(name, groups(self.weight, self.bias) if groups else parameters, options)

    def loss(self):
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).pow(2).sum()
        loss.backward()
        return loss

    def steps(self, count):
        for _ in range(count):
            self.optimizer.step(self.loss)
        return self

    def copied(self, name, options, *, named=False):
        values = [nn.Parameter(value.detach().clone()) for value in (self.weight, self.bias)]
        twin = Trained(name, options, named=named, values=values)
        twin.input = self.input
        return twin


def without_names(state_dict):
    groups = [
        {key: value for key, value in group.items() if key != "param_names"} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list):
        for mine, theirs in zip(actual, expected, strict=True):
            assert_same(mine, theirs)
    else:
        assert actual == expected


@EVERY_SET
@pytest.mark.parametrize("named", [(False, False), (True, False), (False, True)])
def test_state_dict_deterministic(name, options, named):
    first = Trained(name, options, named=named[0]).steps(10)
    second = first.copied(name, options, named=named[1])
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for _ in range(10):
        first.steps(1)
        second.steps(1)
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.bias, second.bias)
    assert_same(without_names(first.optimizer.state_dict()), without_names(second.optimizer.state_dict()))
    second.optimizer.param_groups.extend(second.optimizer.param_groups)
    repeated = without_names(second.optimizer.state_dict())["param_groups"][-1]
    assert_same(repeated, without_names(first.optimizer.state_dict())["param_groups"][-1])


@EVERY_SET
def test_can_load_older_state_dict(name, options):
    run = Trained(name, options).steps(3)
    older = copy.deepcopy(run.optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in ("foreach", "fused", "differentiable", "maximize", "capturable", "decoupled_weight_decay"):
            group.pop(flag, None)
    run.optimizer.load_state_dict(older)
    run.steps(1)


@EVERY_CLASS
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_can_load_from_to_named_state_dict(name, first, second):
    run = Trained(name, named=first).steps(3)
    resumed = run.copied(name, None, named=second)
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    resumed.steps(1)
    expected = ["name0", "name1"] if first or second else None
    assert resumed.optimizer.state_dict()["param_groups"][0].get("param_names") == expected


@EVERY_SET
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_load_equality_with_weights_only(name, options, weights_only, tmp_path):
    state_dict = Trained(name, options, named=weights_only).steps(3).optimizer.state_dict()
    torch.save(state_dict, tmp_path / "state")
    assert_same(torch.load(tmp_path / "state", weights_only=weights_only), state_dict)


@EVERY_SET
def test_load_nontensor_step(name, options):
    run = Trained(name, options).steps(3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    run.optimizer.load_state_dict(saved)
    run.steps(1)


@EVERY_CLASS
@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("pre", [True, False])
def test_state_dict_pre_and_post_hooks(name, pre, post):
    optimizer = Trained(name).optimizer

    def after(optimizer, state_dict):
        state_dict["ran before"] = state_dict["state"].pop("test", None) == 1
        return state_dict

    if pre:
        optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.__setitem__("test", 1))
    if post:
        optimizer.register_state_dict_post_hook(after)
    state_dict = optimizer.state_dict()
    assert state_dict.get("ran before") == (pre if post else None)
    assert ("test" in state_dict["state"]) == (pre and not post)


@EVERY_CLASS
def test_load_state_dict_pre_hook_and_prepend(name):
    optimizer = Trained(name).optimizer

    def in_place(optimizer, state_dict):
        state_dict["param_groups"][0]["lr"] = 0.002

    def another(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    state_dict = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(another, prepend=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002


@EVERY_CLASS
@pytest.mark.parametrize("pre", [True, False])
def test_load_state_dict_pre_and_post_hooks(name, pre):
    optimizer = Trained(name).optimizer

    def before(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    def after(optimizer):
        optimizer.state["saw"] = optimizer.param_groups[0]["lr"]

    if pre:
        optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["saw"] == (0.003 if pre else 0.001)


@EVERY_CLASS
def test_step_hooks_of_all_and_of_one(name):
    seen = []
    ours, other = Trained(name), Trained("SGD", {"lr": 1e-3})
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
    ]
    try:
        for trained in (ours, other):
            handles.append(trained.optimizer.register_step_pre_hook(lambda *_: seen.append("before")))
            handles.append(trained.optimizer.register_step_post_hook(lambda *_: seen.append("after")))
        ours.optimizer.step()
        assert seen == ["all before", "before", "after", "all after"]
        other.optimizer.step()
        assert seen == ["all before", "before", "after", "all after"] * 2
    finally:
        for handle in handles:
            handle.remove()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has had a gradient")  # none has
        ours.optimizer.step()
    assert len(seen) == 8


@EVERY_SET
def test_deepcopy_copies_all_public_attrs(name, options):
    optimizer = Trained(name, options).steps(3).optimizer
    copied = copy.deepcopy(optimizer)
    assert {key for key in vars(copied) if key[0] != "_"} == {key for key in vars(optimizer) if key[0] != "_"}
    assert_same(copied.state_dict(), optimizer.state_dict())


@EVERY_SET
def test_param_groups_weight_decay_and_lr(name, options):
    """A group's own values count, and one whose rate is almost 0 does not move."""
    own = {"lr": 1e-3, **options}
    irrelevant = nn.Parameter(torch.randn(2))
    before = irrelevant.detach().clone()
    run = Trained(
        name,
        {"lr": 1e-28, **{key: value for key, value in options.items() if key in ("foreach", "fused")}},
        groups=lambda weight, bias: [
            {"params": [weight], **own},
            {"params": [bias], **own, "weight_decay": 0.0},
            {"params": [irrelevant]},
        ],
    )
    initial = run.loss().item()
    for _ in range(20):
        irrelevant.grad = torch.rand_like(irrelevant)
        loss = run.loss()
        irrelevant.grad = torch.rand_like(irrelevant)
        run.optimizer.step()
    assert (loss.item() > initial) == bool(options.get("maximize"))
    assert torch.equal(irrelevant, before)


@EVERY_CLASS
def test_step_is_noop_when_params_have_no_grad(name):
    parameters = [torch.randn(2, 3) for _ in range(2)]
    before = [parameter.clone() for parameter in parameters]
    optimizer = make(name, parameters)
    optimizer.step(lambda: torch.tensor([1.0]))
    assert all(map(torch.equal, parameters, before))
    assert not optimizer.state


@EVERY_CLASS
def test_non_empty_state_and_repr(name):
    run = Trained(name).steps(1)
    assert len(run.optimizer.state) == 2
    assert all(run.optimizer.state.values())
    assert "Parameter Group 0" in repr(run.optimizer)


@EVERY_CLASS
def test_an_optimizer_through_pickle_and_a_subclass(name):
    run = Trained(name).steps(3)
    values, optimizer = pickle.loads(pickle.dumps(([run.weight, run.bias], run.optimizer)))
    twin = Trained(name, values=values)
    twin.input, twin.optimizer = run.input, optimizer
    shallow = copy.copy(run.optimizer)
    assert shallow.state is run.optimizer.state
    run.steps(2)
    twin.steps(2)
    assert torch.equal(run.weight, twin.weight)

    class Mine(type(run.optimizer)):
        """Counts its steps, as subclasses of users do."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

        def load_state_dict(self, state_dict):
            self.count = state_dict.pop("count")
            super().load_state_dict(state_dict)

        def state_dict(self):
            return {**super().state_dict(), "count": self.count}

    parameters = [nn.Parameter(value.detach().clone()) for value in (run.weight, run.bias)]
    mine = Mine(parameters, lr=1e-3)
    mine.load_state_dict({**copy.deepcopy(run.optimizer.state_dict()), "count": 5})
    followed = Trained(name, values=parameters)
    followed.input, followed.optimizer = run.input, mine
    followed.steps(1)
    run.steps(1)
    assert torch.equal(followed.weight, run.weight)
    assert mine.state_dict()["count"] == 6


@pytest.mark.parametrize("name", OURS)
def test_a_pickle_of_before_max_grad_norm(name):
    """torch fills in flags that a pickle lacks, in `__setstate__`; so must we."""
    run = Trained(name).steps(2)
    state = copy.deepcopy(run.optimizer.__getstate__())
    for options in (state["defaults"], *state["param_groups"]):
        del options["max_grad_norm"]
    optimizer = CLASSES[name].__new__(CLASSES[name])
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["max_grad_norm"] is None
    for mine, theirs in zip(optimizer.param_groups[0]["params"], (run.weight, run.bias), strict=True):
        mine.grad = theirs.grad.clone()
    optimizer.step()
    run.optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], run.weight)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
