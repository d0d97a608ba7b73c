"""state_dicts whose param groups hold more, less or other things than ours, and what is said of them."""

from __future__ import annotations

import copy
import warnings

import numpy
import pytest
import torch
from torch import nn

from tests.field.loading import CLASSES, COUNTERPARTS, NAMES, OURS, Run, is_ours, parameters_in, step

EVERY_CLASS = pytest.mark.parametrize("name", [*OURS, "AdamW", "SGD"])
EVERY_OURS = pytest.mark.parametrize("name", OURS)


@pytest.fixture(autouse=True)
def _silent():
    """Correct use warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- keys of others ------------------------------------------------------------------------------------------------

VALUES = {
    "text": "encoder",
    "none": None,
    "tensor": torch.ones(3),
    "array": numpy.ones(3),
    "dict of tensors": {"mask": torch.ones(2)},
    "list": [1, 2],
}


@pytest.mark.parametrize("name", ["AdaTAMW", "TAM", "AdamW"])
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("here", ["absent", "same", "other"])
def test_a_key_of_the_users_in_a_group_is_the_checkpoints(name, kind, here):
    """Names, masks, multipliers: what is no hyperparameter of ours is neither compared nor judged."""
    run = Run(name)
    run.saved["param_groups"][0]["mine"] = copy.deepcopy(VALUES[kind])
    resumed = run.fresh()
    if here != "absent":
        resumed.param_groups[0]["mine"] = copy.deepcopy(VALUES[kind]) if here == "same" else torch.zeros(7)
    resumed.load_state_dict(run.saved)
    run.assert_goes_on(resumed)
    assert type(resumed.param_groups[0]["mine"]) is type(VALUES[kind])
    again = run.resumed(resumed.state_dict())
    assert str(again.param_groups[0]["mine"]) == str(VALUES[kind])


@EVERY_CLASS
def test_flags_of_a_later_torch(name):
    run = Run(name)
    run.saved["param_groups"][0].update({"differentiable": False, "a_later_flag": None})
    resumed = run.resumed()
    run.assert_goes_on(resumed)
    assert resumed.param_groups[0]["a_later_flag"] is None


@EVERY_CLASS
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("here", [True, False])
def test_names_of_parameters(name, saved, here):
    """As torch: the checkpoint's where it has some, otherwise those that are here."""
    run = Run(name, named=saved)
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in run.parameters]
    given = [(f"here.{name}", value) for name, value in zip(NAMES, parameters, strict=True)] if here else parameters
    resumed = CLASSES[name](given, lr=0.01)
    resumed.load_state_dict(run.saved)
    expected = list(NAMES) if saved else [f"here.{name}" for name in NAMES] if here else None
    assert resumed.param_groups[0].get("param_names") == expected
    if is_ours(name):
        assert resumed.torque_stats()["names"] == (expected or [None] * 3)
    run.assert_goes_on(resumed)


@EVERY_OURS
def test_groups_from_before_our_hyperparameters_were_there(name):
    """Whatever of ours is missing is the constructor's."""
    run = Run(name, gamma=0.5, max_grad_norm=1.0)
    keys = ("scope", "torque_steps", "nonfinite", "max_grad_norm", "maximize", "foreach", "fused", "capturable")
    for key in keys:
        run.saved["param_groups"][0].pop(key, None)
    run.assert_goes_on(run.resumed(gamma=0.5, max_grad_norm=1.0))


# --- hyperparameters in another form -------------------------------------------------------------------------------

FORMS = {
    "numpy scalar": numpy.float64,
    "numpy array": numpy.array,
    "one-element array": lambda value: numpy.array([value]),
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
}


@pytest.mark.parametrize("form", FORMS)
@EVERY_OURS
def test_hyperparameters_in_another_form(name, form):
    """They become plain numbers, which every backend takes and torch.load(weights_only=True) reads."""
    run = Run(name, weight_decay=0.1)
    group = run.saved["param_groups"][0]
    for key, value in group.items():
        if isinstance(value, float) and (key != "lr" or form != "tensor"):
            group[key] = FORMS[form](value)
    if "betas" in group:
        group["betas"] = [FORMS[form](beta) for beta in group["betas"]]
    resumed = run.resumed(weight_decay=0.1)
    for key, value in run.optimizer.param_groups[0].items():
        if key != "params":
            assert resumed.param_groups[0][key] == value
            assert type(resumed.param_groups[0][key]) is type(value)
    run.assert_goes_on(resumed)


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM"])
@pytest.mark.parametrize("form", [list, numpy.array, torch.tensor])
def test_betas_as_one_list_or_array(name, form):
    run = Run(name)
    run.saved["param_groups"][0]["betas"] = form([0.9, 0.999])
    resumed = run.resumed()
    assert resumed.param_groups[0]["betas"] == pytest.approx((0.9, 0.999))
    assert isinstance(resumed.param_groups[0]["betas"], tuple)


@EVERY_CLASS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_in_a_tensor(name, shape):
    """It stays one, so that whoever moves it in place still does."""
    run = Run(name)
    run.saved["param_groups"][0]["lr"] = torch.full(shape, 0.005)
    resumed = run.resumed()
    rate = resumed.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert rate.shape == shape
    assert rate is not run.saved["param_groups"][0]["lr"]
    step(resumed, 99)


@EVERY_CLASS
def test_a_schedule_that_went_below_zero_by_rounding(name):
    """`lr -= decrement` may end at -1e-17; the step took it, so a resume must."""
    run = Run(name)
    rate = 0.01
    for _ in range(3):
        rate -= 0.01 / 3
    assert -1e-12 < rate < 0
    run.optimizer.param_groups[0]["lr"] = rate
    resumed = run.resumed(copy.deepcopy(run.optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == rate
    run.assert_goes_on(resumed)


@EVERY_OURS
@pytest.mark.parametrize(("key", "value"), [("lr", float("nan")), ("gamma", 2.0), ("scope", "layer"), ("lr", "1e-3")])
def test_what_no_step_could_take_is_refused(name, key, value):
    run = Run(name)
    run.saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=str(value)):
        run.resumed()


# --- what overrides what was requested -----------------------------------------------------------------------------


class MovedByHand:
    """`group["lr"] = ...` before every step: nanoGPT, detectron2's warm-up, ignite's parameter schedulers."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0

    def step(self, *_):
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + self.count)


class NotedAsInitial(MovedByHand):
    """timm's and mmengine's schedulers move anything, and note where it started as `initial_...`."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            for key in ("lr", "weight_decay", *({"betas", "momentum"} & group.keys())):
                group.setdefault(f"initial_{key}", group[key])

    def step(self, *_):
        super().step()
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 + 0.01 * self.count
            if "betas" in group:
                group["betas"] = (0.8, 0.99)
            else:
                group["momentum"] = 0.8


def averaging(optimizer):
    """Lightning's StochasticWeightAveraging starts SWALR from a rate of its own, and says so in `initial_lr`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.02
    return torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)


SCHEDULES = {
    "by hand": MovedByHand,
    "noted as initial": NotedAsInitial,
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=30),
    "cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1),
    "swa": averaging,
}


@pytest.mark.parametrize(
    ("schedule", "tensor_lr"), [*((schedule, False) for schedule in SCHEDULES), ("by hand", True), ("lambda", True)]
)
@pytest.mark.parametrize("made_first", [True, False])
@pytest.mark.parametrize("name", ["AdaTAMW", "TAM"])
def test_what_a_schedule_moved_is_no_override(name, schedule, made_first, tensor_lr):
    run = Run(name, weight_decay=0.1)
    optimizer = run.fresh(weight_decay=0.1, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    scheduler = SCHEDULES[schedule](optimizer)
    for seed in range(4):
        step(optimizer, seed)
        scheduler.step(*([1.0] if schedule == "plateau" else []))
    moved = optimizer.param_groups[0]["lr"]
    assert float(moved) != pytest.approx(0.01)
    resumed = run.fresh(weight_decay=0.1, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    if made_first:
        SCHEDULES[schedule](resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == moved


@EVERY_OURS
@pytest.mark.parametrize("made_first", [True, False])
def test_another_learning_rate_for_a_schedule_to_start_from(name, made_first):
    """Schedulers note what was requested, so that a changed request is seen, however far lr has been moved."""
    run = Run(name)
    torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5)
    resumed = run.fresh(lr=0.02)
    if made_first:
        torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 0.5)
    with pytest.warns(UserWarning, match=r"lr=0\.005 \(requested: 0\.0[12]\)"):
        resumed.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.005


@EVERY_OURS
def test_another_weight_decay_for_a_schedule_to_start_from(name):
    run = Run(name, weight_decay=0.1)
    NotedAsInitial(run.optimizer).step()
    resumed = run.fresh(weight_decay=0.2)
    with pytest.warns(UserWarning, match=r"weight_decay=0\.11 \(requested: 0\.2\)"):
        resumed.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


@EVERY_OURS
def test_a_constant_learning_rate_is_the_checkpoints_as_in_torch(name):
    """Without a scheduler nobody can tell it from one that was moved by hand."""
    for each in (name, COUNTERPARTS[name]):
        run = Run(each)
        resumed = run.resumed(lr=0.5)
        assert resumed.param_groups[0]["lr"] == 0.01


# --- groups made by hand -------------------------------------------------------------------------------------------


@EVERY_CLASS
@pytest.mark.parametrize("how", ["add_param_group", "append"])
def test_a_group_that_was_added_in_both_runs(name, how):
    """Gradual unfreezing: the run that resumes adds the group as the first one did, and loads."""

    def with_group(optimizer):
        parameter = nn.Parameter(torch.ones(5))
        if how == "append":
            optimizer.param_groups.append({**optimizer.param_groups[0], "params": [parameter], "lr": 0.1})
        else:
            optimizer.add_param_group({"params": [parameter], "lr": 0.1})
        return optimizer

    run = Run(name)
    with_group(run.optimizer)
    saved = copy.deepcopy(run.optimizer.state_dict())
    resumed = with_group(run.fresh())
    resumed.load_state_dict(saved)
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.1]
    assert [len(resumed.state.get(parameter, {})) > 0 for parameter in parameters_in(resumed)] == [True] * 3 + [False]


@EVERY_OURS
def test_a_copy_that_gets_another_group_saves_what_the_first_does(name):
    """torch puts a flag of its own into the defaults of whatever was copied or loaded."""
    run = Run(name)
    resumed = copy.deepcopy(run.resumed())
    keys = set(resumed.param_groups[0])
    resumed.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert set(resumed.param_groups[1]) == keys
