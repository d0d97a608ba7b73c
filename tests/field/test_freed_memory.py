"""What the user gives up is freed: no reference of ours outlives what stands in `param_groups` and `state`.

torch.optim.AdamW is the control of each flow.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import hf_tam

OPTIMIZERS = {
    "AdamW, the control": lambda groups: torch.optim.AdamW(groups),
    "default": lambda groups: hf_tam.AdaTAMW(groups),
    "foreach": lambda groups: hf_tam.AdaTAMW(groups, foreach=True),
    "single": lambda groups: hf_tam.AdaTAMW(groups, foreach=False, fused=False),
    "capturable": lambda groups: hf_tam.AdaTAMW(groups, capturable=True),
    "clipping": lambda groups: hf_tam.AdaTAMW(groups, max_grad_norm=0.5),
    "one angle": lambda groups: hf_tam.AdaTAMW(groups, scope="model"),
    "AdaTAM": lambda groups: hf_tam.AdaTAM(groups, weight_decay=0.1, max_grad_norm=0.5),
    "TAM": lambda groups: hf_tam.TAM(groups),
    "layouts that no kernel walks": lambda groups: hf_tam.AdaTAMW(groups),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_garbage")


@pytest.fixture(params=OPTIMIZERS)
def training(request):
    """A model of two groups, attached, and its optimizer after two steps."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3))
    if "layouts" in request.param:
        for parameter in model.parameters():
            parameter.data = torch.stack([parameter.data, parameter.data], -1)[..., 0]
    optimizer = OPTIMIZERS[request.param]([{"params": list(layer.parameters())} for layer in model])
    if hasattr(optimizer, "attach"):
        optimizer.attach(model)
    for _ in range(2):
        _step(model, optimizer)
    if hasattr(optimizer, "torque_stats"):
        optimizer.torque_stats()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def _step(model, optimizer):
    optimizer.zero_grad(set_to_none=True)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()


def _watch(*tensors):
    """Whether any of the tensors, or of what they keep their numbers in, is still there."""
    objects = [weakref.ref(tensor) for tensor in tensors]
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]

    def alive():
        gc.collect()
        return [reference() is not None for reference in (*objects, *memory)].count(True)

    return alive


def test_states_that_are_cleared(training):
    model, optimizer = training
    alive = _watch(*(value for state in optimizer.state.values() for value in state.values()))
    optimizer.state.clear()
    assert alive() == 0
    _step(model, optimizer)
    assert all(float(state.get("step", 1)) == 1 for state in optimizer.state.values())


def test_the_state_of_one_parameter(training):
    """Of its scalars the memory is shared with others', and stays."""
    _, optimizer = training
    param = optimizer.param_groups[1]["params"][0]
    moments = [value for key, value in optimizer.state[param].items() if "exp" in key or "buffer" in key]
    alive = _watch(*(value for value in moments if value.ndim))
    del optimizer.state[param], moments
    assert alive() == 0


def test_values_that_are_replaced_under_the_same_parameter(training):
    """`p.data = ...`: offloading, merging, requantising."""
    model, _optimizer = training
    values = [parameter.data for parameter in model.parameters()]
    alive = _watch(*values)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    del values
    assert alive() == 0


def test_moments_that_are_replaced(training):
    _model, optimizer = training
    moments = [
        (state, key) for state in optimizer.state.values() for key, value in state.items() if value.ndim
    ]  # fmt: skip
    alive = _watch(*(state[key] for state, key in moments))
    for state, key in moments:
        state[key] = state[key].clone()
    assert alive() == 0


def test_a_param_group_that_is_removed(training):
    """And the part of the model with it; nothing may wait for another step."""
    model, optimizer = training
    group = optimizer.param_groups.pop(1)
    held = [*group["params"], *(value for param in group["params"] for value in optimizer.state[param].values())]
    alive = _watch(*(tensor for tensor in held if tensor.ndim))
    for param in group["params"]:
        del optimizer.state[param]
    del model[1], group, held, param
    assert alive() == 0


def test_gradients(training):
    model, optimizer = training
    model(torch.randn(4, 5)).square().sum().backward()
    alive = _watch(*(parameter.grad for parameter in model.parameters()))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert alive() == 0


def test_an_optimizer_that_is_deleted():
    """At once, not when the garbage is collected: the states are most of the memory of a training."""
    for make in OPTIMIZERS.values():
        parameter = torch.nn.Parameter(torch.randn(6, 5))
        optimizer = make([{"params": [parameter]}])
        for _ in range(2):
            parameter.grad = torch.randn(6, 5)
            optimizer.step()
        references = [weakref.ref(value.untyped_storage()) for value in optimizer.state[parameter].values()]
        references.append(weakref.ref(optimizer))
        gc.collect()
        gc.disable()
        try:
            del optimizer
            assert [reference() for reference in references] == [None] * len(references)
        finally:
            gc.enable()


def test_resident_memory_falls_as_adamws():
    """128 MiB of moments, given up: the process has them back."""
    psutil = pytest.importorskip("psutil")
    falls = []
    for make in (torch.optim.AdamW, hf_tam.AdaTAMW):
        parameter = torch.nn.Parameter(torch.ones(16 << 20))
        parameter.grad = torch.ones_like(parameter)
        optimizer = make([parameter])
        optimizer.step()
        before = psutil.Process().memory_info().rss
        optimizer.state.clear()
        gc.collect()
        falls.append((before - psutil.Process().memory_info().rss) / 2**20)
        del optimizer, parameter
        gc.collect()
    assert falls[1] > 0.9 * falls[0] > 100
