"""What `torque_stats` reports, and the names it knows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_tam import AdaTAMW
from tests.reference import ReferenceOptimizer
from tests.test_equivalence import Dispatched
from tests.test_properties import EVERY_BACKEND, SCOPES, fresh_parameters, make
from tests.test_torch_contract import NAMES, set_gradients, walk

VECTORS = ("cosine", "torque", "damping")


@EVERY_BACKEND
def test_before_the_first_step(name, backend):
    stats = make(name, fresh_parameters(), backend).torque_stats()
    assert torch.equal(stats["torque"], torch.zeros(3))
    assert torch.equal(stats["cosine"], torch.zeros(3))
    assert torch.equal(stats["damping"], torch.full((3,), 0.5))
    assert int(stats["skipped"]) == 0


@EVERY_BACKEND
@SCOPES
def test_values(name, backend, scope):
    """The reference's, in param_groups order over all groups; tolerance 2e-6, fp32."""
    first, second = fresh_parameters(), fresh_parameters(((5, 2), (3,)), seed=4)
    groups = [{"params": first}, {"params": second, "gamma": 0.5}]
    optimizer = make(name, groups, backend, scope=scope, weight_decay=0.1)
    reference = ReferenceOptimizer(
        name,
        [{**group, "params": [parameter.detach().clone() for parameter in group["params"]]} for group in groups],
        scope=scope,
        weight_decay=0.1,
    )
    parameters = [*first, *second]
    for seed in range(7):
        set_gradients(parameters, seed)
        parameters[1].grad = None  # never has one
        if seed == 6:
            parameters[0].grad = None  # has none in the last step
        optimizer.step()
        reference.step([parameter.grad for parameter in parameters])
    stats = optimizer.torque_stats()
    for key in VECTORS:
        assert stats[key].shape == (5,)
        assert stats[key].dtype == torch.float32
        assert not stats[key].requires_grad
    for key in ("grad_norm", "skipped"):
        assert stats[key].shape == ()
    torques = torch.tensor([state.torque for state in reference.states])
    torch.testing.assert_close(stats["torque"], torques, rtol=0, atol=2e-6)
    torch.testing.assert_close(stats["damping"], (1 + torques) / 2, rtol=0, atol=2e-6)
    cosines = torch.tensor([state.cosine for state in reference.states])
    torch.testing.assert_close(stats["cosine"][2:], cosines[2:], rtol=0, atol=2e-6)
    assert float(stats["torque"][1]) == 0
    assert float(stats["cosine"][1]) == 0
    assert float(stats["grad_norm"]) == pytest.approx(reference.grad_norm, rel=1e-6)


@EVERY_BACKEND
@pytest.mark.parametrize("maximize", [False, True])
def test_grad_norm_is_of_the_raw_gradients(name, backend, maximize):
    """No weight decay in it, all dtypes in it, and the mean of a complex one is its modulus."""
    parameters = [
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(2, dtype=torch.complex64)),
        nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    ]
    optimizer = make(name, parameters, backend, weight_decay=0.5, maximize=maximize)
    for _ in range(2):
        parameters[0].grad = torch.tensor([1.0, 2.0, 2.0])
        parameters[1].grad = torch.tensor([3 + 4j, 0j])
        parameters[2].grad = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
        optimizer.step()
    assert float(optimizer.torque_stats()["grad_norm"]) == pytest.approx(math.sqrt(9 + 25 + 2), rel=1e-6)


@EVERY_BACKEND
def test_what_was_returned_does_not_change(name, backend):
    """A logger may keep it for later."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend)
    walk(optimizer, parameters, range(3))
    stats = optimizer.torque_stats()
    kept = {key: stats[key].clone() for key in (*VECTORS, "grad_norm", "skipped")}
    walk(optimizer, parameters, range(3, 6))
    assert all(torch.equal(stats[key], value) for key, value in kept.items())
    assert not torch.equal(optimizer.torque_stats()["torque"], kept["torque"])


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM"])
def test_asking_reads_no_number(name):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, "capturable")
    walk(optimizer, parameters, range(2))
    with Dispatched() as dispatched:
        optimizer.torque_stats()
    assert dispatched.count("aten._local_scalar_dense") == 0
    assert len(dispatched.names) > 0


@EVERY_BACKEND
def test_fsdp_style_parameter_without_elements(name, backend):
    parameters = [nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(2))]
    optimizer = make(name, parameters, backend)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    stats = optimizer.torque_stats()
    assert float(stats["cosine"][0]) == 0
    assert float(stats["torque"][0]) == 0
    assert float(stats["torque"][1]) == pytest.approx(0.19, abs=1e-6)


# --- names ---------------------------------------------------------------------------------------------------------


def _model():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


ALL_NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


@NAMES
def test_names_from_named_parameters(name):
    assert make(name, _model().named_parameters()).torque_stats()["names"] == ALL_NAMES


@NAMES
def test_names_from_attach(name):
    """Before it they are unknown; again it changes nothing."""
    model = _model()
    optimizer = make(name, [{"params": model[1].parameters()}, {"params": model[0].parameters()}])
    unknown = optimizer.torque_stats()["names"]
    assert len(unknown) == 4
    assert not any(entry in ALL_NAMES for entry in unknown)
    for _ in range(2):
        optimizer.attach(model)
        assert optimizer.torque_stats()["names"] == ["1.weight", "1.bias", "0.weight", "0.bias"]
    walk(optimizer, list(model.parameters()), range(2))


@NAMES
def test_attach_changes_no_number(name):
    model, other = _model(), _model()
    other.load_state_dict(model.state_dict())
    optimizer, twin = make(name, model.parameters()), make(name, other.parameters())
    walk(optimizer, list(model.parameters()), range(2))
    walk(twin, list(other.parameters()), range(2))
    optimizer.attach(model)
    walk(optimizer, list(model.parameters()), range(2, 4))
    walk(twin, list(other.parameters()), range(2, 4))
    assert all(torch.equal(mine, their) for mine, their in zip(model.parameters(), other.parameters(), strict=True))


@NAMES
def test_attach_of_a_strange_module(name):
    optimizer = make(name, _model().parameters())
    with pytest.raises(ValueError, match="attach"):
        optimizer.attach(_model())


def test_parameter_that_moves_to_another_group_is_owned_once():
    """As LoRA+ moves the B matrices; DeepSpeed's partitions are told apart by the order in which they are owned."""
    first, second = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    optimizer = AdaTAMW([first, second])
    optimizer.param_groups[0]["params"] = [second]
    optimizer.add_param_group({"params": [first], "lr": 0.1})
    owned = optimizer.logical._owned.in_order({id(first): first, id(second): second})
    assert owned[0] is second
    assert owned[1] is first
