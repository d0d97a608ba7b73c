"""Parameters over one storage: listed twice, or tied by `.data`. torch.optim.AdamW steps each in turn, and controls.

With the torque held at 0 (gamma=1, damping_eps=0) AdaTAMW is AdamW, number by number.
"""

import pytest
import torch
from torch import nn

import hf_tam

NEUTRAL = {"gamma": 1, "damping_eps": 0}
BACKENDS = {"default": {}, "foreach": {"foreach": True}, "single": {"foreach": False, "fused": False}}


def pair(make, *, control=None, **options):
    """torch's AdamW and ours, each over parameters of its own."""
    torch.manual_seed(0)
    theirs = torch.optim.AdamW(make(), lr=0.05, weight_decay=0.1, foreach=control)
    torch.manual_seed(0)
    return theirs, hf_tam.AdaTAMW(make(), lr=0.05, weight_decay=0.1, **NEUTRAL, **options)


def listed(times):
    tied, other = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(4))
    return [tied, other, *[tied] * (times - 1)]


def tied(count):
    storage = torch.randn(300_000)
    return [nn.Parameter(storage) for _ in range(count)]


def overlapping(shift):
    buffer = torch.randn(3000)
    return [nn.Parameter(buffer[:1000]), nn.Parameter(buffer[shift : shift + 1500])]


def steps(optimizer, count=4):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        for parameter in dict.fromkeys(optimizer.param_groups[0]["params"]):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("times", [2, 3])
def test_a_parameter_listed_more_than_once(backend, times):
    """A head that is tied to the embedding, collected by hand: torch warns, and steps it as often."""
    theirs, ours = pair(lambda: listed(times), **BACKENDS[backend])
    for optimizer in (theirs, ours):
        steps(optimizer)
    for left, right in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        assert theirs.state[left]["step"] == ours.state[right]["step"]
    assert ours.state[ours.param_groups[0]["params"][0]]["step"] == 4 * times


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_what_is_listed_twice_is_not_stepped_twice_once_it_is_listed_once():
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = hf_tam.AdaTAMW([*parameters, parameters[0]], lr=0.05)
    steps(optimizer, 1)
    del optimizer.param_groups[0]["params"][-1]
    steps(optimizer, 1)
    assert [optimizer.state[parameter]["step"] for parameter in parameters] == [3, 2]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    ("name", "options", "scaled"),
    [("AdaTAMW", {"max_grad_norm": 1.0}, False), ("TAM", {"weight_decay": 0.1}, True)],
    ids=["clipped", "unscaled"],
)
def test_what_is_listed_twice_is_not_clipped_or_unscaled_twice(name, options, scaled):
    """torch's way is clip_grad_norm_ before the step, which takes each parameter once."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = getattr(hf_tam, name)([parameter, parameter], lr=0.05, **options)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    parameter.grad = torch.full((3,), 7.0)
    with pytest.raises(ValueError, match=r"more than once.*hand each parameter over once"):
        optimizer.step()
    assert parameter.tolist() == [1.0] * 3
    assert parameter.grad.tolist() == [7.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_tied_by_data(backend):
    """As large as it takes for several threads; each would write what the other reads."""
    torch.set_num_threads(4)
    control = backend == "foreach"  # which takes the decay of all before the update of the first
    theirs, ours = pair(lambda: tied(4), control=control, **BACKENDS[backend])
    for optimizer in (theirs, ours):
        addresses = {parameter.data_ptr() for parameter in optimizer.param_groups[0]["params"]}
        assert len(addresses) == 1
        steps(optimizer)
    left, right = theirs.param_groups[0]["params"][0], ours.param_groups[0]["params"][0]
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1, 500, 999])
def test_parameters_that_overlap(shift):
    """Views of one buffer, some elements on."""
    theirs, ours = pair(lambda: overlapping(shift))
    for optimizer in (theirs, ours):
        steps(optimizer)
    for left, right in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_which_tensors_overlap():
    """What shares no element is walked by the kernels as before."""
    buffer = torch.randn(100)
    parameters = [nn.Parameter(buffer[start:end]) for start, end in [(0, 60), (10, 20), (50, 70), (70, 100), (30, 30)]]
    optimizer = hf_tam.AdaTAMW(parameters, lr=0.1, **NEUTRAL)
    steps(optimizer, 1)
    (known,) = optimizer._pipeline._gatherer._known.values()
    assert known.memory.walkable == [False, False, False, True, True]
