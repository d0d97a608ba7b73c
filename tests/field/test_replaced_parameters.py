"""Parameters that somebody puts into `param_groups`, or takes out of the model, while the optimizer lives.

torch.optim.AdamW is the control. With the torque held at 0 (gamma=1, damping_eps=0) AdaTAMW is AdamW, so what it does
with parameters that were put in by hand can be compared number by number.
"""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import hf_tam

OPTIMIZERS = [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


def both(parameters, **groups):
    """torch's AdamW and ours without a torque, each with its own copy of the parameters."""
    ours = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    options = {"lr": 0.05, "weight_decay": 0.1}
    return (
        torch.optim.AdamW([{"params": [parameter], **groups} for parameter in theirs], **options),
        hf_tam.AdaTAMW([{"params": [parameter], **groups} for parameter in ours], gamma=1, damping_eps=0, **options),
    )


def step_with_gradients(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def assert_same(theirs, ours):
    for left, right in zip(theirs.param_groups, ours.param_groups, strict=True):
        for one, other in zip(left["params"], right["params"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def replace_in_optimizer(optimizer, change):
    """As gaussian splatting densifies and prunes: new tensors, and the moments changed alike."""
    for group in optimizer.param_groups:
        (old,) = group["params"]
        state = optimizer.state.pop(old)
        new = nn.Parameter(change(old.detach()))
        for key, value in state.items():
            if torch.is_tensor(value) and value.shape == old.shape:
                state[key] = change(value) if value.ndim else value
        group["params"][0] = new
        optimizer.state[new] = state


@pytest.mark.parametrize("change", ["densify", "prune", "same"])
def test_gaussian_splatting_replaces_the_tensors_in_the_optimizer(change):
    changes = {
        "densify": lambda tensor: torch.cat([tensor, torch.zeros_like(tensor[:2])]),
        "prune": lambda tensor: tensor[1:].clone(),
        "same": torch.Tensor.clone,
    }
    optimizers = both([torch.randn(6, 3), torch.randn(6, 1), torch.randn(6, 4)])
    for optimizer in optimizers:
        step_with_gradients(optimizer, 0)
        replace_in_optimizer(optimizer, changes[change])
        step_with_gradients(optimizer, 1)
        replace_in_optimizer(optimizer, changes[change])
        step_with_gradients(optimizer, 2)
    assert_same(*optimizers)


def test_partial_fc_puts_other_centres_in_at_every_step():
    """The sampled rows are a new parameter each time, and the old one's state is thrown away."""
    optimizers = both([torch.randn(4, 3), torch.randn(20, 3)])
    for optimizer in optimizers:
        for seed in range(4):
            rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:8]
            group = optimizer.param_groups[-1]
            optimizer.state.pop(group["params"][0], None)
            group["params"][0] = nn.Parameter(torch.ones(20, 3)[rows] * seed)
            step_with_gradients(optimizer, seed)
    assert_same(*optimizers)


def test_lightning_rebuilds_the_groups_when_it_resumes():
    """A fine-tuning callback maps names to parameters, some of which were unfrozen only later."""
    optimizers = both([torch.randn(3, 3)])
    for optimizer in optimizers:
        torch.manual_seed(0)
        later = [nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(4))]
        kept = optimizer.param_groups[0]
        optimizer.param_groups = [kept, {**kept, "params": later, "lr": 0.01}]
        for seed in range(3):
            step_with_gradients(optimizer, seed)
    assert_same(*optimizers)


def test_mmcv_copies_the_groups_for_its_fp32_weights():
    optimizers = both([torch.randn(3, 3), torch.randn(5)])
    for optimizer in optimizers:
        optimizer.param_groups = copy.deepcopy(optimizer.param_groups)
        for seed in range(3):
            step_with_gradients(optimizer, seed)
    assert_same(*optimizers)


def test_plain_tensors_in_the_place_of_plain_tensors():
    results = []
    for cls, options in ((torch.optim.AdamW, {}), (hf_tam.AdaTAMW, {"gamma": 1, "damping_eps": 0})):
        optimizer = cls([torch.ones(3, 2, requires_grad=True)], lr=0.1, **options)
        step_with_gradients(optimizer, 0)
        optimizer.param_groups[0]["params"][0] = torch.full((4, 2), 2.0, requires_grad=True)
        step_with_gradients(optimizer, 1)
        results.append(optimizer)
    assert_same(*results)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_flat_buffer_in_the_place_of_parameters_is_refused(cls):
    """One process is enough to be wrong: one angle for all that lies in the buffer."""
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    optimizer = cls(parameters, lr=0.1)
    flat = torch.ones(10, requires_grad=True)
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(10)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(10,\)\): it is no parameter.*optimizer\.attach"):
        optimizer.step()
    module = nn.ParameterList(parameters)
    optimizer.attach(module)
    with pytest.raises(RuntimeError, match="it is no parameter"):
        optimizer.step()


def takes_an_id_of(freed, make):
    """A new tensor that Python puts where one of the freed ones was."""
    others = []
    for _ in range(100_000):
        tensor = make()
        if id(tensor) in freed:
            return tensor
        others.append(tensor)
    pytest.skip("Python put nothing where one of the freed parameters was")


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_the_id_of_a_freed_parameter_makes_no_buffer_whole(shape):
    optimizer = hf_tam.AdaTAMW([nn.Parameter(torch.ones(3, 2)) for _ in range(200)], lr=0.1)
    freed = set(map(id, optimizer.param_groups[0]["params"]))
    optimizer.param_groups[0]["params"].clear()
    flat = takes_an_id_of(freed, lambda: torch.ones(shape, requires_grad=True))
    flat.grad = torch.ones(shape)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="it is no parameter"):
        optimizer.step()


def test_a_freed_parameter_leaves_no_name():
    other = nn.Parameter(torch.ones(2))
    named = [(f"old {number}", nn.Parameter(torch.ones(3, 2))) for number in range(200)]
    optimizer = hf_tam.AdaTAMW([{"params": named}, {"params": [("other", other)]}], lr=0.1)
    del named
    group = optimizer.param_groups[0]
    freed = set(map(id, group["params"]))
    group["params"].clear()
    new = takes_an_id_of(freed, lambda: nn.Parameter(torch.ones(5)))
    optimizer.param_groups[0] = {
        key: [new] if key == "params" else group[key] for key in group if key != "param_names"
    }
    step_with_gradients(optimizer, 1)
    assert optimizer.torque_stats()["names"] == [None, "other"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(module):
    module(torch.linspace(-1, 1, 8).reshape(2, 4).to(next(module.parameters()).dtype)).square().sum().backward()


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assign(module):
    module.load_state_dict({key: value.clone() for key, value in module.state_dict().items()}, assign=True)


def overwrite(module):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    module.double()
    torch.__future__.set_overwrite_module_params_on_conversion(False)


LEFT_BEHIND = {
    "fully_shard": lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (1,))),
    "load_state_dict(assign=True)": assign,
    "double, overwriting": overwrite,
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", LEFT_BEHIND)
def test_a_model_that_got_new_parameters_leaves_the_optimizer_behind(one_rank, way, steps):
    for cls in (torch.optim.AdamW, *OPTIMIZERS):
        module = model()
        optimizer = cls(module.parameters(), lr=0.1)
        ours = cls is not torch.optim.AdamW
        if ours:
            optimizer.attach(module)
        for _ in range(steps):
            backward(module)
            optimizer.step()
            optimizer.zero_grad()
        LEFT_BEHIND[way](module)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        backward(module)
        if not ours:  # it trains nothing, and says nothing
            optimizer.step()
            assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
            continue
        with pytest.raises(RuntimeError, match=r"none is .*'s any more.*Build the optimizer after that"):
            optimizer.step()


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_without_gradients_of_a_model_that_is_still_there(cls):
    module, other = model(), nn.Linear(2, 2)
    optimizer = cls([{"params": module.parameters()}, {"params": other.parameters()}], lr=0.1)
    optimizer.attach(module)
    optimizer.attach(other)
    optimizer.step()
    del optimizer.param_groups[0]  # `module` is no longer trained, and has not lost its parameters
    with pytest.warns(RuntimeWarning, match="none of the optimizer's parameters has had a gradient"):
        optimizer.step()
    backward(module)
    optimizer.step()
    assert not optimizer.state


# From here on with two processes.


def on_two_ranks(case):
    """What a rank of two says; `case` is a function of this module."""
    try:
        return globals()[case](torch.distributed.get_rank())
    except RuntimeError as error:
        return str(error)


def cut_by_data(rank, *, steps=0, attach=True):
    """As DeepSpeed's AutoTP does at stage 0: other data under the same parameter."""
    module = model()
    optimizer = hf_tam.AdaTAMW(module.named_parameters(), lr=0.1)
    for _ in range(steps):
        backward(module)
        optimizer.step()
        optimizer.zero_grad()
    module[0].weight.data = module[0].weight.data.chunk(2)[rank].clone()
    if attach:
        optimizer.attach(module)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def cut_after_a_step(rank):
    cut_by_data(rank, steps=2)


def cut_without_a_module(rank):
    cut_by_data(rank, attach=False)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["cut_by_data", "cut_after_a_step", "cut_without_a_module", "cut_while_frozen"])
def test_a_parameter_that_was_cut_is_refused_among_several_processes(worlds, case):
    for message in worlds(2).run(on_two_ranks, case):
        assert "parameter 0.weight (shape (2, 4)): its shape was (4, 4) when the optimizer was given it" in message


def frozen_and_packed(rank):
    """As bitsandbytes does with a frozen base when it reaches the device; `model.parameters()` holds it too."""
    module = model()
    module[0].requires_grad_(False)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    module[0].weight.data = torch.zeros(8, 1)
    for _ in range(2):
        for parameter in module[2].parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return len(optimizer.state)


def cut_while_frozen(rank):
    module = model()
    module[0].weight.requires_grad_(False)
    optimizer = hf_tam.AdaTAMW(module.named_parameters(), lr=0.1)
    module[0].weight.data = module[0].weight.data.chunk(2)[rank].clone()
    module[2].weight.grad = torch.ones_like(module[2].weight)
    optimizer.step()
    module[0].weight.requires_grad_(True)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    optimizer.step()


def grown(rank):
    module = model()
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    module[0].weight.data = torch.cat([module[0].weight.data, torch.zeros(2, 4)])
    step_with_gradients(optimizer, 0)
    return len(optimizer.state)


def every_parameter_grown(rank, *, attach=False):
    module = nn.Linear(3, 3, bias=False)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    module.weight.data = torch.ones(4, 3)
    if attach:
        optimizer.attach(module)
    step_with_gradients(optimizer, 0)
    return len(optimizer.state)


def every_parameter_grown_and_attached(rank):
    return every_parameter_grown(rank, attach=True)


def some_by_hand(rank):
    """Lightning's resume under DDP: what was frozen before stands beside what was handed over."""
    module = model()
    wrapped = nn.parallel.DistributedDataParallel(module)
    optimizer = hf_tam.AdaTAMW(module[2].parameters(), lr=0.1)
    kept = optimizer.param_groups[0]
    optimizer.param_groups = [kept, {**kept, "params": list(module[0].parameters())}]
    backward(wrapped)
    optimizer.step()
    return len(optimizer.state)


def copies_by_hand(rank):
    optimizer = hf_tam.AdaTAMW(model().parameters(), lr=0.1)
    optimizer.param_groups = copy.deepcopy(optimizer.param_groups)
    step_with_gradients(optimizer, 0)
    return len(optimizer.state)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "states"),
    [
        ("grown", 4),
        ("frozen_and_packed", 2),
        ("every_parameter_grown_and_attached", 1),
        ("some_by_hand", 4),
        ("copies_by_hand", 4),
    ],
)
def test_whole_parameters_are_taken_by_several_processes(worlds, case, states):
    assert worlds(2).run(on_two_ranks, case) == [states, states]


def all_by_hand(rank):
    optimizer = hf_tam.AdaTAMW(model().parameters(), lr=0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(15))]
    step_with_gradients(optimizer, 0)


def beside_shards(rank):
    module = fully_shard(model(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("all_by_hand", "all that this optimizer was built with has been replaced"),
        ("every_parameter_grown", "all that this optimizer was built with has been replaced"),
        ("beside_shards", "it was put in beside sharded parameters"),
    ],
)
def test_what_may_be_a_part_is_refused_by_several_processes(worlds, case, words):
    for message in worlds(2).run(on_two_ranks, case):
        assert words in message
        assert "optimizer.attach(module)" in message


def cut_in_another_way(rank, first, then):
    """The same parameters hold other shards: torch.utils.swap_tensors, as `module.to()` uses it."""
    mesh = init_device_mesh("cpu", (2,))
    twin = list(model().parameters())
    sharded = [nn.Parameter(distribute_tensor(parameter.detach().clone(), mesh, [first])) for parameter in twin]
    optimizers = [hf_tam.AdaTAMW(parameters, lr=0.05) for parameters in (twin, sharded)]
    for placement in (first, then):
        for parameter in sharded:
            parameter.grad = None
            whole = parameter.detach().full_tensor()
            torch.utils.swap_tensors(parameter, nn.Parameter(distribute_tensor(whole, mesh, [placement])))
        for optimizer in optimizers:
            optimizer.state.clear()
        for seed in range(4):
            step_with_gradients(optimizers[0], seed)
            for left, right in zip(twin, sharded, strict=True):
                right.grad = distribute_tensor(left.grad, mesh, [placement])
            optimizers[1].step()
    left, right = (optimizer.torque_stats()["torque"] for optimizer in optimizers)
    return left.abs().max().item() > 0.01 and (left - right).abs().max().item() <= 1e-6


def shards_became_replicas(rank):
    return cut_in_another_way(rank, Shard(0), Replicate())


def replicas_became_shards(rank):
    return cut_in_another_way(rank, Replicate(), Shard(0))


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["shards_became_replicas", "replicas_became_shards"])
def test_the_same_parameters_cut_in_another_way(worlds, case):
    assert worlds(2).run(on_two_ranks, case) == [True, True]


def lazy(rank):
    module = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.05)
    optimizer.attach(module)
    optimizer.step()
    for _ in range(2):
        backward(module)
        optimizer.step()
    return len(optimizer.state)


@pytest.mark.distributed
def test_a_lazy_module_gets_its_shapes_after_the_optimizer(worlds):
    assert lazy(0) == 4
    assert worlds(2).run(on_two_ranks, "lazy") == [4, 4]
