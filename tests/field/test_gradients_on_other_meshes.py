"""Gradients whose mesh is not the parameter's: each rank may hold another shard of them. AdamW refuses those."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import hf_tam

OPTIMIZERS = [torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


def messages(gradient_of):
    mesh = DeviceMesh("cpu", [0, 1])
    torch.manual_seed(0)
    whole, gradient = torch.randn(4, 4), torch.randn(4, 4)
    found = []
    for cls in OPTIMIZERS:
        parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        before = parameter.to_local().detach().clone()
        parameter.grad = gradient_of(gradient)
        optimizer = cls([parameter], lr=0.05)
        try:
            optimizer.step()
        except (RuntimeError, IndexError) as error:
            found.append(str(error))
        else:
            found.append(None)
        if found[-1] is not None and cls is not torch.optim.AdamW:  # whose decay comes first
            assert before.equal(parameter.to_local())
    return found


def turned(gradient):
    """The same ranks in another order."""
    mesh = DeviceMesh("cpu", [1, 0])
    return DTensor.from_local(gradient.chunk(2)[mesh.get_coordinate()[0]].clone(), mesh, [Shard(0)])


def of_more_dimensions(gradient):
    mesh = DeviceMesh("cpu", [[0, 1]])
    return DTensor.from_local(gradient.chunk(2)[mesh.get_coordinate()[1]].clone(), mesh, [Shard(0), Shard(0)])


@pytest.mark.distributed
@pytest.mark.parametrize("gradient_of", [turned, of_more_dimensions])
def test_refused(worlds, gradient_of):
    for theirs, *ours in worlds(2).run(messages, gradient_of):
        assert theirs is not None
        assert all("and its gradient on" in message for message in ours), ours


@pytest.mark.distributed
def test_another_mesh_of_the_same_ranks_is_no_other(worlds):
    for found in worlds(2).run(messages, alike):
        assert found == [None] * len(OPTIMIZERS)


def alike(gradient):
    return distribute_tensor(gradient, DeviceMesh("cpu", [0, 1]), [Shard(0)])
