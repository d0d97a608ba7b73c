"""Hyperparameters that come as NumPy numbers (optuna, a configuration file) or as tensors; torch.optim controls."""

import numpy
import pytest
import torch
from torch import nn

import hf_tam

NEUTRAL = {"gamma": 1, "damping_eps": 0}
TAKEN_BY_BOTH = {
    "lr, NumPy's": {"lr": numpy.float32(0.01)},
    "lr, an array": {"lr": numpy.array(0.01)},
    "weight decay, NumPy's": {"weight_decay": numpy.float32(0.1)},
    "weight decay, an array": {"weight_decay": numpy.array(0.1)},
    "weight decay, a tensor": {"weight_decay": torch.tensor(0.1)},
    "eps, a tensor": {"eps": torch.tensor(1e-6)},
    "betas, tensors": {"betas": (torch.tensor(0.8), torch.tensor(0.99))},
}


def trained(make, options, *, in_group=False):
    parameter = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    groups = [{"params": [parameter], **options}] if in_group else [parameter]
    optimizer = make(groups, **{} if in_group else options)
    for seed in range(3):
        parameter.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return optimizer, parameter.detach()


def neutral(groups, **options):
    return hf_tam.AdaTAMW(groups, **NEUTRAL, **options)


@pytest.mark.parametrize("in_group", [False, True], ids=["argument", "group"])
@pytest.mark.parametrize("options", TAKEN_BY_BOTH.values(), ids=TAKEN_BY_BOTH)
def test_what_torch_takes(options, in_group):
    _, expected = trained(torch.optim.AdamW, options, in_group=in_group)
    optimizer, actual = trained(neutral, options, in_group=in_group)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    group = optimizer.param_groups[0]
    plain = [*group["betas"], *(group[name] for name in ("lr", "weight_decay", "eps"))]
    assert all(type(value) in (float, numpy.float32) for value in plain)


def test_a_learning_rate_in_a_tensor_stays_the_callers():
    rate = torch.tensor(0.01)
    optimizer, _ = trained(neutral, {"lr": rate})
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("options", TAKEN_BY_BOTH.values(), ids=TAKEN_BY_BOTH)
def test_a_checkpoint_that_holds_them(options):
    """torch.optim saves what it was given."""
    saved, _ = trained(torch.optim.AdamW, options)
    plain = {
        name: tuple(map(float, value)) if isinstance(value, tuple) else float(value) for name, value in options.items()
    }
    optimizer = neutral([nn.Parameter(torch.zeros(3, 4))], **plain)
    optimizer.load_state_dict(saved.state_dict())
    for name, value in plain.items():
        assert optimizer.param_groups[0][name] == pytest.approx(value)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{"lr": numpy.array([0.1, 0.2])}, {"eps": torch.tensor([1e-8, 1e-8])}, {"weight_decay": numpy.array(-0.1)},
     {"betas": (torch.tensor(0.9), torch.tensor(1.0))}, {"weight_decay": torch.tensor(float("nan"))}],
    ids=["array of two", "tensor of two", "below 0", "not below 1", "NaN"],
)  # fmt: skip
def test_what_is_no_number_in_its_range(options):
    with pytest.raises(ValueError, match="Invalid"):
        hf_tam.AdaTAMW([nn.Parameter(torch.ones(2))], **options)
