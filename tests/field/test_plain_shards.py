"""Plain parameters that are parts of others, and say so: refused by name by attach() and step(), never stepped alone.

DeepSpeed's own layers are used where they are installed; of the other libraries only the marks that they set.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import hf_tam
from tests.sharding.zero_engine import import_deepspeed

ADVICE = "use one of those, or --optim adamw_torch"


class Net(nn.Module):
    """A layer that may be cut, and one that is not."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)


def marked(**attributes):
    """A linear layer whose weight has these attributes."""
    layer = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(layer.weight, name, value)
    return Net(layer)


def autotp():
    """Cuts the data of the very parameter that the optimizer may have already."""
    import_deepspeed().init_distributed("gloo")
    from deepspeed.module_inject.layers import LinearLayer

    layer = LinearLayer(nn.Linear(4, 4), torch.distributed.group.WORLD, name="layer")
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    assert layer.weight.shape == (2, 4)
    return Net(layer)


def experts(size):
    from deepspeed.moe.experts import Experts

    return Net(Experts(nn.Linear(4, 4), 2 // size, f"ep_size_{size}"))


def megatron(size, where):
    """Megatron and Transformer Engine mark weights that are not cut too."""
    net = marked(tensor_model_parallel=True, partition_dim=0, partition_stride=1)
    if where == "tp_size":
        net.layer.tp_size = size
    elif where == "tp_group":
        groups = [torch.distributed.new_group([rank]) for rank in range(2)]  # every rank makes all of them
        alone = groups[torch.distributed.get_rank()]
        net.layer.tp_group = alone if size == 1 else torch.distributed.group.WORLD
    return net


PARTS = {
    "DeepSpeed AutoTP": (autotp, "layer.weight (shape (2, 4)): it is marked ds_is_replaced_module=True"),
    "DeepSpeed experts": (lambda: experts(2), "it is marked allreduce=False: an expert that other ranks do not have"),
    "Megatron experts": (lambda: marked(allreduce=False, tensor_model_parallel=False), "marked allreduce=False"),
    "Megatron": (lambda: megatron(2, None), "it is marked tensor_model_parallel=True"),
    "Megatron over 2": (lambda: megatron(2, "tp_group"), "it is marked tensor_model_parallel=True"),
    "Transformer Engine over 2": (lambda: megatron(2, "tp_size"), "it is marked tensor_model_parallel=True"),
    "old Megatron": (lambda: marked(model_parallel=True), "it is marked model_parallel=True"),
    "AxoNN": (lambda: marked(is_tensor_parallel=True), "it is marked is_tensor_parallel=True"),
    "Nanotron": (lambda: marked(is_sharded=True), "it is marked is_sharded=True"),
    "fairscale": (lambda: marked(_is_sharded=True), "it is marked _is_sharded=True"),
    "fairseq experts": (lambda: marked(expert=True), "it is marked expert=True"),
    "Tutel experts": (lambda: marked(_tutel_expert=True), "it is marked _tutel_expert=True"),
    "FastMoE experts": (lambda: marked(dp_comm="none"), "it is marked dp_comm=none"),
    "ColossalAI": (lambda: marked(dist_layout=SimpleNamespace(global_shape=(8, 4))), "its dist_layout says"),
    "ColossalAI fused": (lambda: marked(shard_fn=len, gather_fn=len), "its shard_fn says"),
}
WHOLE = {
    "DeepSpeed experts, all on every rank": lambda: experts(1),
    "Megatron, not cut": lambda: marked(tensor_model_parallel=False, allreduce=True),
    "Megatron over 1": lambda: megatron(1, "tp_group"),
    "Transformer Engine over 1": lambda: megatron(1, "tp_size"),
    "fairscale over 1": lambda: marked(_is_sharded=False),
    "FastMoE, not an expert": lambda: marked(dp_comm="world"),
    "ColossalAI, not cut": lambda: marked(dist_layout=SimpleNamespace(global_shape=(4, 4))),
    "Nanotron, not cut": lambda: marked(is_sharded=False),
}


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def answer(function, *args):
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def step_and_attach(which):
    """What step(), attach() and step() again say; then what they say of the part of the model that is whole."""
    net = {**{name: make for name, (make, _) in PARTS.items()}, **WHOLE}[which]()
    optimizer = hf_tam.AdaTAMW(net.named_parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    first = answer(step, optimizer)
    untouched = all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    answers = [first, answer(optimizer.attach, net), answer(step, optimizer)]
    rest = hf_tam.AdaTAMW(net.head.parameters(), lr=0.1)
    return answers, untouched, [answer(rest.attach, net), answer(step, rest)]


@pytest.mark.distributed
@pytest.mark.parametrize("which", PARTS)
def test_parts_are_refused(worlds, which):
    if which.startswith("DeepSpeed"):
        pytest.importorskip("deepspeed")
    for answers, untouched, rest in worlds(2).run(step_and_attach, which):
        for message in answers:
            assert PARTS[which][1] in message
            assert ADVICE in message
        assert untouched
        assert rest == ["accepted", "accepted"]  # parts in the model that another optimizer steps


@pytest.mark.distributed
@pytest.mark.parametrize("which", WHOLE)
def test_marks_of_whole_parameters(worlds, which):
    if which.startswith("DeepSpeed"):
        pytest.importorskip("deepspeed")
    for (first, *others), _, rest in worlds(2).run(step_and_attach, which):
        # Only the module knows over how many ranks Megatron or Transformer Engine cut a weight that they marked.
        assert first == "accepted" or ("over 1" in which and "tensor_model_parallel" in first)
        assert others == ["accepted", "accepted"]
        assert rest == ["accepted", "accepted"]


def with_megatrons_state(size):
    state = SimpleNamespace(
        model_parallel_is_initialized=lambda: True, get_tensor_model_parallel_world_size=lambda: size
    )
    with mock.patch.dict(sys.modules, {"megatron.core.parallel_state": state}):
        return answer(step, hf_tam.AdaTAMW(megatron(size, None).parameters(), lr=0.1))


@pytest.mark.distributed
def test_megatron_knows_over_how_many_ranks_it_cuts(worlds):
    assert worlds(2).run(with_megatrons_state, 1) == ["accepted"] * 2
    for message in worlds(2).run(with_megatrons_state, 2):
        assert "it is marked tensor_model_parallel=True" in message


@pytest.mark.parametrize("which", [name for name in PARTS if not name.startswith(("DeepSpeed", "Megatron over"))])
def test_in_one_process_every_parameter_is_whole(which):
    make, _ = PARTS[which]
    for cls in (torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM):
        net = make()
        optimizer = cls(net.parameters(), lr=0.1)
        if cls is not torch.optim.AdamW:
            optimizer.attach(net)
        before = net.layer.weight.detach().clone()
        step(optimizer)
        assert not torch.equal(net.layer.weight, before)
