"""What users write into `param_groups` between steps: numbers in tensors and arrays, groups that move, and go."""

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_tam

NEUTRAL = {"gamma": 1.0, "damping_eps": 0.0}
PAIRS = [(torch.optim.AdamW, hf_tam.AdaTAMW), (torch.optim.Adam, hf_tam.AdaTAM), (torch.optim.SGD, hf_tam.TAM)]
BACKENDS = ["default", "single", "foreach", "triton"]


@pytest.fixture(params=BACKENDS)
def options(request, monkeypatch):
    """The constructor's, for a backend; Triton's kernels run in the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from hf_tam.backends import triton
        from tests import interpreting

        interpreting.prepare()
        monkeypatch.setattr("hf_tam.step.gathering.select_backend", lambda device, **_: triton)
    return {"single": {"foreach": False}, "foreach": {"foreach": True}}.get(request.param, {})


def stepped(cls, write, **options):
    """Parameters after four steps; `write(group, step)` changes the group before each."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (40,), ())]
    optimizer = cls(parameters, lr=0.1, **({"momentum": 0.9} if cls is torch.optim.SGD else {}), **options)
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        write(optimizer.param_groups[0], step)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def replaced_by_tensors(group, step):
    group["weight_decay"] = torch.tensor(0.1 * step)
    if "betas" in group:
        group["betas"] = (torch.tensor(0.9 - 0.1 * step), torch.tensor(0.99))
        group["eps"] = torch.tensor(1e-3)
    else:
        group["momentum"] = torch.tensor(0.9 - 0.1 * step)


def written_to_in_place(group, step):
    if step == 0:
        group["weight_decay"] = torch.tensor(0.0)
    group["weight_decay"].fill_(0.3 * step)


def numpys(group, step):
    group["weight_decay"] = numpy.float32(0.1 * step)
    group["lr"] = numpy.float64(0.1 / (step + 1))
    group["maximize"] = numpy.True_


@pytest.mark.parametrize("write", [replaced_by_tensors, written_to_in_place, numpys])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_numbers_in_tensors_and_arrays_are_those_of_this_step(theirs, ours, write, options):
    found, expected = stepped(ours, write, **NEUTRAL, **options), stepped(theirs, write)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


def test_the_same_norm_in_tensors_is_the_same_norm():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = hf_tam.AdaTAMW([{"params": [parameter]} for parameter in parameters])
    for group in optimizer.param_groups:
        group["max_grad_norm"] = torch.tensor(0.5)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.torque_stats()["grad_norm"]) == pytest.approx(6**0.5)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS[:2])
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=str)
def test_a_parameter_in_two_groups_is_stepped_twice(theirs, ours, options):
    """torch.optim steps it once a group, by the numbers of each."""
    results = []
    for cls, more in ((theirs, {}), (ours, {**NEUTRAL, **options})):
        first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = cls([{"params": [first]}, {"params": [second], "lr": 0.03}], lr=0.1, **more)
        optimizer.param_groups[1]["params"].append(first)
        for step in range(3):
            first.grad, second.grad = torch.full((2,), 1.0 + step), torch.ones(2)
            optimizer.step()
        assert optimizer.state[first]["step"] == 6
        results.append(torch.cat([first, second]).detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)


def test_statistics_follow_the_parameters():
    """Groups are reversed, and one is taken out, after the step that the statistics are of."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = hf_tam.AdaTAMW([{"params": [first]}, {"params": [second]}])
    for scale in (1.0, 2.0):
        first.grad, second.grad = torch.full((2,), scale), torch.full((2,), 10 * scale * (-1) ** scale)
        optimizer.step()
    before = optimizer.torque_stats()
    assert before["cosine"].tolist() == pytest.approx([1.0, -1.0])
    optimizer.param_groups.reverse()
    after = optimizer.torque_stats()
    for key in ("cosine", "torque", "damping", "effective_lr", "grad_norms"):
        torch.testing.assert_close(after[key], before[key].flip(0))
    optimizer.param_groups.pop(1)
    assert optimizer.torque_stats()["cosine"].tolist() == pytest.approx([-1.0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.torque_stats()["cosine"].tolist() == pytest.approx([-1.0, 0.0])


def test_a_frozen_parameter_without_values_stands_first():
    frozen = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    trained = nn.Parameter(torch.ones(2))
    optimizer = hf_tam.AdaTAMW([frozen, trained], max_grad_norm=1.0)
    norm = optimizer.promise_grad_norm()
    trained.grad = torch.ones(2)
    optimizer.step()
    assert norm.item() == pytest.approx(2**0.5)
    assert optimizer.torque_stats()["damping"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("ours", [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM])
def test_gradients_that_are_to_be_negated(ours):
    """Autograd of torch.complex leaves one on a 0-d parameter, which torch's fused kernels refuse."""
    results = []
    for options in ({}, {"foreach": False}):
        first, real, imaginary = (nn.Parameter(torch.tensor(value)) for value in (3.0, 1.0, 2.0))
        optimizer = ours([first, real, imaginary], lr=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            ((torch.complex(real, imaginary).conj() * (1 + 2j)).real + first).backward()
            assert imaginary.grad.is_neg()
            optimizer.step()
        results.append(torch.stack([first, real, imaginary]).detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_state_dict_of_fake_tensors():
    with FakeTensorMode():
        model = nn.Linear(2, 2)
        optimizer = hf_tam.AdaTAMW(model.parameters())
        model(torch.randn(1, 2)).sum().backward()
        optimizer.step()
        assert set(optimizer.state_dict()["state"]) == {0, 1}
