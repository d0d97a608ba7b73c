"""A step in the backward pass, as docs/in-your-script.md shows it: the weights of the ordinary step, to the bit."""

import copy
import re
from pathlib import Path

import pytest
import torch

import hf_tam

PAGE = Path(__file__).parent.parent / "docs/in-your-script.md"
KEPT = {"param_correction": "bits16", "state_bits": 32}


class Tied(torch.nn.Module):
    """Two layers, and a third whose weight is the first one's."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, inputs):
        return torch.nn.functional.linear(torch.relu(self.second(torch.relu(self.first(inputs)))), self.first.weight)


def documented(model, **options):
    """Run the block of the page that registers the hooks; returns its optimizers."""
    (block,) = re.findall(r"```python\n(optimizers = .*?)```", PAGE.read_text(), flags=re.DOTALL)
    namespace = {"model": model, "hf_tam": hf_tam, "options": options}
    exec(block, namespace)
    return namespace["optimizers"]


def bits(tensor):
    """Of a correction some look like NaN, which equals nothing."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def run(model, step, *, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(5, 6, generator=generator).to(next(model.parameters()).dtype)
        (model(inputs) - inputs).square().mean().backward()
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"fused": False, "foreach": False}, KEPT], ids=str)
def test_the_weights_are_those_of_the_ordinary_step(dtype, options):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    twin = copy.deepcopy(model)
    optimizers = documented(model, lr=1e-2, **options)
    together = hf_tam.AdaTAMW(twin.parameters(), lr=1e-2, **options)

    def step():
        together.step()
        together.zero_grad()

    run(model, lambda: None)
    run(twin, step)
    assert all(parameter.grad is None for parameter in model.parameters())
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        state, expected = optimizers[mine].state[mine], together.state[theirs]
        assert all(torch.equal(bits(state[key]), bits(expected[key])) for key in expected)
    assert max(abs(optimizer.torque_stats()["torque"]).item() for optimizer in optimizers.values()) > 1e-3
