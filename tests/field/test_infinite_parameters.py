"""Parameters that hold infinities (masks, logits that are ruled out): they stay, and NaN comes from nowhere."""

import inspect
import math

import pytest
import torch
from torch import nn

import hf_tam
from tests.field.test_resized_parameters import options  # noqa: F401 - a fixture: the backends

PAIRS = {
    hf_tam.AdaTAMW: torch.optim.AdamW,
    hf_tam.AdaTAM: torch.optim.Adam,
    hf_tam.TAM: torch.optim.SGD,
}


def stepped(cls, dtype, decays, **given):
    torch.manual_seed(0)
    values = torch.randn(70)
    values[[0, 40, 69]] = torch.tensor([math.inf, -math.inf, -math.inf])
    parameters = [nn.Parameter(values.to(dtype)), nn.Parameter(torch.randn(9).to(dtype))]
    groups = [
        {"params": [parameter], "weight_decay": decay} for parameter, decay in zip(parameters, decays, strict=True)
    ]
    more = {"momentum": 0.9} if cls in (hf_tam.TAM, torch.optim.SGD) else {}
    optimizer = cls(groups, lr=0.1, **more, **given)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad[parameter.detach().isinf()] = 0.0
        optimizer.step()
    return parameters


@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.0, 0.1), (0.1, 0.1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.__name__)
def test_infinities_stay(options, cls, dtype, decays):  # noqa: F811
    if decays[0] and cls is not hf_tam.AdaTAMW:
        pytest.skip("a coupled decay makes the gradient infinite, in torch.optim too")
    theirs = stepped(PAIRS[cls], dtype, decays)
    known = inspect.signature(cls).parameters
    given = {key: value for key, value in options.items() if key in known}
    ours = stepped(cls, dtype, decays, gamma=1, damping_eps=0, **given)
    for left, right in zip(theirs, ours, strict=True):
        assert left.isinf().equal(right.isinf())
        assert not right.isnan().any()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
