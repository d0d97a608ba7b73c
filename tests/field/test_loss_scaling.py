"""fp16 training with torch.amp.GradScaler: `fused=True` unscales and skips inside its step, as torch's AdamW does.

What PyTorch's own test_fused_does_not_step_if_foundinf asks for, and that both ways of a scaler are one training.
"""

from __future__ import annotations

import os

import pytest
import torch

import hf_tam

CLASSES = (hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM)
OPTIONS = {
    "default": {},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "clipping": {"max_grad_norm": 0.5},
    "coupled decay": {"weight_decay": 0.1},
    "coupled decay, clipped": {"weight_decay": 0.1, "max_grad_norm": 0.5},
    "one angle": {"scope": "model"},
    "propagate": {"nonfinite": "propagate"},
    "raise": {"nonfinite": "raise"},
    "literal": {"step_size": "paper"},
}


def _skip_what_tam_lacks(cls, options):
    if cls is hf_tam.TAM and set(options) & {"capturable", "fused"}:
        pytest.skip("TAM has no such argument")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cls", CLASSES)
def test_found_inf_leaves_everything_as_it_was(cls, options, scaled):
    _skip_what_tam_lacks(cls, options)
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (1, 5)]
    optimizer = cls(parameters, **options)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.grad_scale = torch.ones(1) if scaled else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    for parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            assert not value.any(), key
    assert int(optimizer.torque_stats()["skipped"]) == 0
    del optimizer.found_inf, optimizer.grad_scale
    optimizer.step()
    assert all(float(optimizer.state[parameter]["step"]) == 1.0 for parameter in parameters)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_grad_scale_divides_the_gradients(cls, options, scale):
    """A power of two exactly; another to rounding. The reported norm is that of the gradients without the scale."""
    _skip_what_tam_lacks(cls, options)
    runs = []
    for factor in (1.0, scale):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (300, 5, 1)]
        optimizer = cls(parameters, lr=1e-2, **options)
        norms = []
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator) * factor
            if factor != 1.0:
                optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor([factor])
            optimizer.step()
            norms.append(optimizer.torque_stats()["grad_norm"])
        states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
        runs.append([*(parameter.detach() for parameter in parameters), *states, torch.stack(norms)])
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_who_announces_it():
    """As in torch: `fused=True`. Lightning refuses to clip for an optimizer that announces it."""
    parameter = torch.nn.Parameter(torch.ones(1))
    for cls in (torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM):
        assert cls([parameter], fused=True)._step_supports_amp_scaling
        assert not getattr(cls([parameter]), "_step_supports_amp_scaling", False)
    assert not hf_tam.TAM([parameter])._step_supports_amp_scaling


@pytest.mark.parametrize("unscaled_by_hand", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM])
def test_a_scaler_trains_alike_either_way(cls, unscaled_by_hand):
    """With an overflow on the way, by the optimizer that unscales and by the one that is unscaled for."""
    runs = []
    for fused in (None, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        optimizer = cls(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        for step in range(6):
            loss = model(torch.randn(4, 6)).square().sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step == 3:
                model.weight.grad[0, 0] = torch.inf
            if unscaled_by_hand:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        runs.append(([parameter.detach() for parameter in model.parameters()], scales))
    assert runs[0][1] == runs[1][1]
    for left, right in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_the_promised_norm_stays_unknown_where_the_step_is_called_off():
    for options in ({}, {"capturable": True}):
        parameter = torch.nn.Parameter(torch.ones(4))
        optimizer = hf_tam.AdaTAMW([parameter], max_grad_norm=1.0, **options)
        for found, expected in ((1.0, torch.nan), (0.0, 2.0)):
            parameter.grad = torch.ones(4)
            norm = optimizer.promise_grad_norm()
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
            torch.testing.assert_close(norm, torch.tensor(expected), equal_nan=True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
def test_nothing_is_read_for_it_on_an_accelerator(monkeypatch):
    """By the Triton backend, as far as the interpreter can tell."""
    pytest.importorskip("triton")
    from hf_tam.backends import triton as backend
    from tests import interpreting
    from tests.test_equivalence import Dispatched

    interpreting.prepare()
    monkeypatch.setattr("hf_tam.step.gathering.select_backend", lambda device, **_: backend)
    for found in (0.0, 1.0):
        parameter = torch.nn.Parameter(torch.ones(9))
        optimizer = hf_tam.AdaTAMW([parameter], lr=1e-2, capturable=True)
        parameter.grad = torch.full((9,), 1024.0)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor([1024.0])
        with Dispatched() as dispatched:
            optimizer.step()
        assert dispatched.count("aten._local_scalar_dense") == 0
        assert float(optimizer.state[parameter]["step"]) == 1.0 - found
        assert torch.equal(parameter.detach(), torch.ones(9)) == bool(found)
