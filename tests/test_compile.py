"""torch.compile(optimizer.step) works, and does not recompile at every scheduler step."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.cases import backends_of, takes_tensor_lr
from tests.test_properties import fresh_parameters, make
from tests.test_torch_contract import assert_bitwise, set_gradients, walk  # noqa: F401


class CountingBackend:
    """Runs the captured graph as it is and counts how often one was compiled."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, graph, example_inputs):
        self.compiled += 1
        return graph.forward


@pytest.mark.parametrize(
    ("name", "backend", "tensor_lr"),
    [(name, backend, tensor_lr) for name in ("AdaTAMW", "AdaTAM", "TAM") for backend in backends_of(name)
     for tensor_lr in (False, True) if takes_tensor_lr(name, backend) or not tensor_lr],
)  # fmt: skip
def test_compiled_step(name, backend, tensor_lr):
    """Ends where the eager step ends, and compiles nothing after the first steps while a scheduler moves lr."""
    torch._dynamo.reset()
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer = make(name, parameters, backend, lr=torch.tensor(0.1) if tensor_lr else 0.1)
    twin = make(name, twins, backend, lr=torch.tensor(0.1) if tensor_lr else 0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, twin)]
    compiler = CountingBackend()
    step = torch.compile(optimizer.step, backend=compiler)
    with warnings.catch_warnings():
        # the scheduler cannot see that the compiled function is optimizer.step
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for seed in range(14):
            set_gradients(parameters, seed)
            step()
            walk(twin, twins, [seed])
            for scheduler in schedulers:
                scheduler.step()
            if seed == 3:
                settled = compiler.compiled, _frames_compiled()
    assert (compiler.compiled, _frames_compiled()) == settled
    for mine, their in zip(parameters, twins, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)
        assert optimizer.state[mine].keys() == twin.state[their].keys()
    torch._dynamo.reset()


def _frames_compiled():
    return sum(torch._dynamo.utils.counters["frames"].values())
