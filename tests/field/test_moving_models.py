"""Models that are moved, converted, freed or copied while their optimizer lives; torch.optim.AdamW is the control.

torch moves DTensors and quantised parameters by swapping them under their identity, and refuses where anything holds
a weak reference to one. A strong reference keeps memory that others believe they have freed.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import return_and_correct_aliasing

import hf_tam

OPTIMIZERS = [torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]
CONVERSIONS = {
    "to cpu": lambda model: model.to("cpu"),
    "to double": lambda model: model.double(),
    "to bfloat16": lambda model: model.bfloat16(),
}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def trained(module, cls, steps, **options):
    """An optimizer for what `module` trains, which knows its module where it can, after some steps."""
    optimizer = cls([parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.1, **options)
    if isinstance(optimizer, hf_tam.torque_aware.TorqueAware):
        optimizer.attach(module)
    for _ in range(steps):
        step(module, optimizer)
    return optimizer


def step(module, optimizer):
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.requires_grad)
    module(torch.linspace(-1, 1, 16, dtype=dtype).reshape(2, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def parameters_change(module, optimizer):
    before = [parameter.detach().clone() for parameter in module.parameters() if parameter.requires_grad]
    step(module, optimizer)
    after = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return not any(torch.equal(left, right) for left, right in zip(before, after, strict=True))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_plain_model_is_moved_by_swapping(swapping, cls, conversion, steps):
    module = plain()
    optimizer = trained(module, cls, steps)
    weight = module[0].weight
    CONVERSIONS[conversion](module)
    assert module[0].weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    if not steps or conversion == "to cpu":  # with moments of another dtype AdamW refuses
        assert parameters_change(module, optimizer)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_model_under_fsdp2_is_moved(one_rank, cls, conversion, steps):
    mesh = init_device_mesh("cpu", (1,))
    module = fully_shard(plain(), mesh=mesh)
    optimizer = trained(module, cls, steps)
    assert type(module[0].weight).__name__ == "DTensor"
    CONVERSIONS[conversion](module)
    assert optimizer.param_groups[0]["params"][0] is module[0].weight
    if not steps or conversion == "to cpu":  # FSDP2 itself keeps the dtype of its first forward pass
        assert parameters_change(module, optimizer)


class EightBit(torch.Tensor):
    """Stands for torchao's quantised weights, which are tensor subclasses with several tensors inside."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])

    def values(self):
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            dtype = kwargs.get("dtype") or args[0].scale.dtype
            copied = cls(func(args[0].codes), args[0].scale.detach().to(dtype))
            return return_and_correct_aliasing(func, args, kwargs, copied)
        plain_args = [arg.values() if isinstance(arg, EightBit) else arg for arg in args]
        return func(*plain_args, **kwargs)


class Adapted(nn.Module):
    """A frozen quantised weight with a LoRA pair."""

    def __init__(self):
        super().__init__()
        codes = torch.randint(-127, 127, (8, 8), dtype=torch.int8)
        self.base = nn.Parameter(EightBit(codes, torch.tensor(0.01)), requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(2, 8))
        self.lora_b = nn.Parameter(torch.ones(8, 2))

    def forward(self, inputs):
        return inputs @ self.base.t() + inputs @ self.lora_a.t() @ self.lora_b.t()


@pytest.mark.parametrize("everything", [False, True], ids=["the adapters", "frozen ones too"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_quantised_base_with_lora_is_moved(cls, conversion, everything):
    torch.manual_seed(0)
    module = nn.Sequential(Adapted(), Adapted())
    if everything:
        optimizer = cls(module.parameters(), lr=0.1)
        if hasattr(optimizer, "attach"):
            optimizer.attach(module)
        step(module, optimizer)
    else:
        optimizer = trained(module, cls, 1)
    base = module[0].base
    assert isinstance(base, EightBit)
    CONVERSIONS[conversion](module)
    assert module[0].base is base
    if conversion == "to cpu":
        assert parameters_change(module, optimizer)


def shard_by_hand(module, optimizer, mesh):
    """What accelerate does for FSDP2: shard, then put the new parameters into the groups by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    fully_shard(module, mesh=mesh)
    new = dict(module.named_parameters())
    for group, inside in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [new[name] for name in inside]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_unsharded_parameters_of_fsdp2_are_freed(one_rank, cls):
    module = plain()
    optimizer = trained(module, cls, 0)
    whole = [weakref.ref(parameter) for parameter in module.parameters()]
    memory = [StorageWeakRef(parameter.untyped_storage()) for parameter in module.parameters()]
    shard_by_hand(module, optimizer, init_device_mesh("cpu", (1,)))
    gc.collect()
    assert [reference() for reference in whole] == [None] * 4
    assert all(reference.expired() for reference in memory)
    step(module, optimizer)
    if cls is not torch.optim.AdamW:
        assert optimizer.torque_stats()["names"] == [name for name, _ in plain().named_parameters()]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_removed_group_is_freed_at_once(cls, attached, steps):
    module = plain()
    optimizer = cls([{"params": module[0].parameters()}, {"params": module[2].parameters()}], lr=0.1)
    if attached and hasattr(optimizer, "attach"):
        optimizer.attach(module)
    for _ in range(steps):
        step(module, optimizer)
    removed = list(module[2].parameters())
    states = [value for parameter in removed for value in optimizer.state[parameter].values()] if steps else []
    references = [weakref.ref(tensor) for tensor in (*removed, *states)]
    module[2] = nn.Linear(8, 2)
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    del optimizer.param_groups[1], removed, states, parameter
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    module[0](torch.ones(2, 8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_nothing_but_param_groups_and_state_holds_a_sharded_parameter(one_rank, cls):
    """After steps too: parameters, gradients and moments go with the optimizer's own lists."""
    module = fully_shard(plain(), mesh=init_device_mesh("cpu", (1,)))
    optimizer = trained(module, cls, 2)
    removed = optimizer.param_groups[0]["params"][2:]
    states = [value for parameter in removed for value in optimizer.state[parameter].values()]
    references = [weakref.ref(tensor) for tensor in (*removed, *states)]
    assert len(references) >= 4
    for parameter in removed:
        del optimizer.state[parameter]
    del optimizer.param_groups[0]["params"][2:], parameter, removed, states, module
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.long
@pytest.mark.parametrize("cls", [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM])
def test_attaching_keeps_no_module_alive(cls):
    module = plain()
    optimizer = trained(module, cls, 1)
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.torque_stats()["names"][0] == "0.weight"


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_copy_goes_on_by_itself(cls, way):
    module = plain()
    optimizer = trained(module, cls, 2)
    if way == "deepcopy":
        twin_module, twin = copy.deepcopy((module, optimizer))
    else:
        twin_module, twin = pickle.loads(pickle.dumps((module, optimizer)))
    step(twin_module, twin)
    step(module, optimizer)
    for left, right in zip(module.parameters(), twin_module.parameters(), strict=True):
        assert left is not right
        assert torch.equal(left, right)
    del optimizer.param_groups[0]["params"][2:]
    twin_module.double()
    assert len(twin.param_groups[0]["params"]) == 4
