"""bfloat16 weights that a learning rate of fine-tuning does not move are said, once, with what to pass."""

import warnings

import pytest
import torch

import hf_tam
from tests.cases import BACKENDS

MESSAGE = r"\d+% of the elements of bfloat16 parameters did not move in a step with a learning rate of 2e-05"


def train(steps=3, *, lr=2e-5, dtype=torch.bfloat16, gradient=1.0, size=0.02, **options):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter((size * torch.randn(50, 20, generator=generator)).to(dtype)) for _ in range(2)]
    optimizer = hf_tam.AdaTAMW(parameters, lr=lr, **options)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = gradient * torch.randn(50, 20, generator=generator).to(dtype)
        optimizer.step()
    return optimizer


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_said_once_with_the_share_and_the_remedy(backend):
    (message,) = said(lambda: train(**BACKENDS[backend]).state_dict())
    share = int(message.split("%")[0])
    # A weight moves by its own rounding if the step is more than half an ulp: |w| < 2e-5 * 512 and less.
    assert 55 <= share <= 85
    assert "--optim_args param_correction=bits16" in message


def test_the_share_is_that_of_all_elements_that_were_to_move():
    parameters = [torch.nn.Parameter(torch.tensor([1.0, 1.0, 1e-6, 1.0], dtype=torch.bfloat16))]
    optimizer = hf_tam.AdaTAMW(parameters, lr=2e-5, weight_decay=0.0)
    parameters[0].grad = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="^67% of the elements"):
        optimizer.step()


def test_a_capturable_step_waits_for_nothing_and_says_it_with_the_state():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = train(capturable=True)
    with pytest.warns(UserWarning, match=MESSAGE):
        optimizer.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32}, {"param_correction": "bits16"}, {"lr": 1e-3}, {"lr": 0.0}, {"gradient": 0.0},
        {"size": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_said_where_nothing_is_lost(options):
    assert said(lambda: train(**options).state_dict()) == []


def test_a_warm_up_that_begins_at_0_is_looked_at_in_its_first_step():
    parameters = [torch.nn.Parameter(torch.ones(50, dtype=torch.bfloat16))]
    optimizer = hf_tam.AdaTAMW(parameters, lr=2e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 1))

    def steps():
        for _ in range(3):
            parameters[0].grad = torch.ones_like(parameters[0])
            optimizer.step()
            schedule.step()

    (message,) = said(steps)
    assert message.startswith("100% of the elements")
