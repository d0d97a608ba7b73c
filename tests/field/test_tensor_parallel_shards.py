"""Tensor-parallel models as transformers 5.2 to 5.15 makes them: each rank's part of a weight is a plain tensor."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import hf_tam
from hf_tam.integrations.transformers.tensor_parallel import refuse_plain_shards
from tests.integrations.test_trainer import make_trainer
from tests.integrations.untouched import tiny_llama

REFUSED = r"is tensor-parallel over 2 ranks, and {} \(here \({}\)\) is .* Use transformers>=5\.16"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3, bias=False)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ParameterDict({"down_proj": nn.Parameter(torch.ones(2, 4, 3))})


class Model(nn.Module):
    """What such a model says of itself after `from_pretrained(tp_plan="auto")` on two ranks.

    Seen in 5.2.0, 5.10.4 and 5.15.1: `_tp_size` and `_device_mesh` on the model, `_hf_tp_plan` on every planned
    module; from 5.10 on `_hf_device_mesh` too. Parameters that are in the plan by their own name leave no other trace.
    """

    def __init__(self, plan, *, size=2):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.tp_plan = plan
        self._tp_size = size
        self._device_mesh = SimpleNamespace(mesh=torch.arange(2), ndim=1, mesh_dim_names=None)
        for name, module in self.named_modules():
            if name.replace("0", "*") in plan:
                module._hf_tp_plan = plan[name.replace("0", "*")]


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("plan", "name", "shape"),
    [
        ({"layers.*.proj": "colwise"}, "layers.0.proj.weight", "3, 4"),
        ({"layers.*.proj": "rowwise_split_input"}, "layers.0.proj.weight", "3, 4"),
        ({"layers.*.experts.down_proj": "grouped_gemm"}, "layers.0.experts.down_proj", "2, 4, 3"),
        ({"layers.*.norm": "sequence_parallel", "layers.*.proj": "packed_colwise"}, "layers.0.proj.weight", "3, 4"),
    ],
)
def test_plain_parts_are_refused(plan, name, shape):
    with pytest.raises(ValueError, match=REFUSED.format(name, shape)):
        refuse_plain_shards(nn.ModuleDict({"wrapped": Model(plan)}))


def test_plain_parts_with_adapters_are_refused():
    model = Model({"layers.*.proj": "colwise"})
    layer = model.layers[0]
    layer.proj = nn.ModuleDict({"base_layer": layer.proj, "lora_A": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=REFUSED.format(r"layers\.0\.proj\.base_layer\.weight", "3, 4")):
        refuse_plain_shards(model)


@pytest.mark.parametrize(
    "model",
    [
        Model({"layers.*.proj": "colwise"}, size=1),
        Model({"layers.*.proj": "colwise"}, size=None),
        Model({"layers.*.norm": "replicated_with_grad_allreduce", "layers.*.proj": "all_reduce"}),
        Model({}),
        nn.Linear(2, 2),
    ],
)
def test_whole_tensors_are_not(model):
    refuse_plain_shards(model)


def cut(model, mesh):
    whole = model.layers[0].proj.weight
    model.layers[0].proj.weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))


def test_dtensors_are_not(one_rank):
    model = Model({"layers.*.proj": "colwise", "layers.*.norm": "sequence_parallel"})
    cut(model, init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)))
    refuse_plain_shards(model)


def test_parts_that_fsdp2_has_cut_once_more_are_refused(one_rank):
    """Its DTensors know of the data-parallel ranks alone."""
    model = Model({"layers.*.proj": "colwise"})
    cut(model, init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",)))
    assert isinstance(model.layers[0].proj.weight, DTensor)
    with pytest.raises(ValueError, match=REFUSED.format(r"layers\.0\.proj\.weight", "3, 4")):
        refuse_plain_shards(model)


def test_prepare_refuses_them():
    """Control: accelerate prepares them for AdamW."""
    accelerator = Accelerator(cpu=True)
    model = Model({"layers.*.proj": "colwise"})
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=REFUSED.format("layers.0.proj.weight", "3, 4")):
        accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters()))
    with pytest.raises(ValueError, match=REFUSED.format("layers.0.proj.weight", "3, 4")):
        accelerator.prepare(hf_tam.AdaTAMW(model.parameters()))  # after its model


def test_attach_refuses_them():
    model = Model({"layers.*.proj": "colwise"})
    with pytest.raises(ValueError, match=REFUSED.format("layers.0.proj.weight", "3, 4")):
        hf_tam.AdaTAMW(model.parameters()).attach(model)


def test_the_trainer_refuses_them_before_training(tmp_path):
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model=model)
    model._tp_size = 2  # later than the Trainer looks, which would ask for two processes
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is tensor-parallel over 2 ranks, and model\."):
        trainer.train()
    assert trainer.optimizer is None
