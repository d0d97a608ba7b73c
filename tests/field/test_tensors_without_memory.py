"""Tensors that have no memory, or that torch lets nobody write to. A kernel that walks an address would crash."""

import pytest
import torch

import hf_tam
from tests.field.test_resized_parameters import options  # noqa: F401 - a fixture: the backends

OURS = [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


def stepped(cls, **given):
    parameters = [torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.arange(6.0))]
    optimizer = cls(parameters, lr=0.1, **given)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, parameters


def test_gradients_that_are_zeros_without_memory(options):  # noqa: F811
    """As forward-mode derivatives make them."""
    results = []
    for cls, given in ((torch.optim.AdamW, {}), (hf_tam.AdaTAMW, {"gamma": 1, "damping_eps": 0, **options})):
        optimizer, parameters = stepped(cls, **given)
        parameters[1].grad = torch._efficientzerotensor((6,))
        optimizer.step()
        results.append(parameters)
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["values", "gradient", "first moment"])
@pytest.mark.parametrize("cls", OURS)
def test_storages_that_were_freed(cls, which):
    """By `untyped_storage().resize_(0)`, as sharding does it. AdamW reads address 0."""
    optimizer, parameters = stepped(cls)
    tensors = {
        "values": parameters[1],
        "gradient": parameters[1].grad,
        "first moment": optimizer.state[parameters[1]][optimizer.moments[0]],
    }
    tensors[which].untyped_storage().resize_(0)
    before = parameters[0].detach().clone()
    with pytest.raises(ValueError, match=rf"the {which} of parameter number 1 \(shape \(6,\)\) has no memory"):
        optimizer.step()
    assert before.equal(parameters[0])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, *OURS])
def test_a_model_that_was_made_in_inference_mode(cls):
    with torch.inference_mode():
        parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        cls([parameter], lr=0.1).step()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, *OURS])
def test_values_that_were_made_in_inference_mode(cls):
    """`p.data = ...` of a parameter that is none: torch takes that."""
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        parameter.data = torch.full((3,), 2.0)
        gradient = torch.ones(3)
    parameter.grad = gradient
    cls([parameter], lr=0.1).step()
    assert (parameter < 2).all()


@pytest.mark.parametrize("cls", OURS)
def test_moments_that_are_zeros_without_memory(cls):
    """They are to be written to, which torch refuses too."""
    optimizer, parameters = stepped(cls)
    optimizer.state[parameters[1]][optimizer.moments[0]] = torch._efficientzerotensor((6,))
    before = parameters[0].detach().clone()
    with pytest.raises(ValueError, match="has no memory"):
        optimizer.step()
    assert before.equal(parameters[0])
