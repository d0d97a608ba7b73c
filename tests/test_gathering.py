"""What is remembered of tensors from step to step must not outlive what it was true of."""

import copy
import gc
import weakref

import pytest
import torch

import hf_tam

SHAPES = [(40, 7), (7,), (), (0,), (30, 40)]


def training(*, dtype=torch.float32, cls=hf_tam.AdaTAM, **options):
    """Parameters and an optimizer that has taken two steps."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = cls(parameters, lr=1e-2, weight_decay=0.1, **options)
    for _ in range(2):
        give_gradients(parameters, generator)
        optimizer.step()
    return parameters, optimizer


def give_gradients(parameters, generator):
    for parameter in parameters:
        fresh = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.grad = fresh.to(parameter.dtype)


def rebuilt(optimizer):
    """A copy that remembers nothing, as every deep copy does."""
    twin = copy.deepcopy(optimizer)
    grads = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
    for parameter, grad in zip(twin.param_groups[0]["params"], grads, strict=True):
        parameter.grad = grad  # deepcopy does not keep its strides
    return twin


def _option(name, value):
    return lambda parameters, optimizer: optimizer.param_groups[0].__setitem__(name, value)


def _data(change):
    def apply(parameters, optimizer):
        parameters[0].data = change(parameters[0].data)
        parameters[0].grad = change(parameters[0].grad).contiguous()
        state = optimizer.state[parameters[0]]
        for key in optimizer.moments:
            state[key] = change(state[key]).contiguous()

    return apply


def _state(change):
    def apply(parameters, optimizer):
        optimizer.state[parameters[0]].update(change(optimizer, optimizer.state[parameters[0]]))

    return apply


def _no_gradient(*places):
    def apply(parameters, optimizer):
        for place in places:
            parameters[place].grad = None

    return apply


def _other_gradient(change):
    def apply(parameters, optimizer):
        parameters[0].grad = change(parameters[0].grad)

    return apply


CHANGES = {
    "nothing": lambda parameters, optimizer: None,
    "weight decay": _option("weight_decay", 0.3),
    "maximize": _option("maximize", True),
    "learning rate": _option("lr", 0.5),
    "foreach": _option("foreach", True),
    "capturable": _option("capturable", True),
    "parameter moved": _data(torch.clone),
    "parameter cut": _data(lambda tensor: tensor[:11]),
    "parameter turned": _data(torch.t),
    "parameter in fp64": _data(torch.Tensor.double),
    "moments replaced": _state(lambda optimizer, state: {key: state[key] * 0.5 for key in optimizer.moments}),
    "torque replaced": _state(lambda optimizer, state: {"torque": torch.tensor(0.5)}),
    "state emptied": lambda parameters, optimizer: optimizer.state[parameters[0]].clear(),
    "state deleted": lambda parameters, optimizer: optimizer.state.pop(parameters[0]),
    "all states deleted": lambda parameters, optimizer: optimizer.state.clear(),
    "a gradient missing": _no_gradient(1),
    "all gradients missing": _no_gradient(*range(len(SHAPES))),
    "gradient turned": _other_gradient(lambda grad: grad.t().contiguous().t()),
    "gradient expanded": _other_gradient(lambda grad: grad[:1].expand_as(grad)),
    "gradient in a buffer": _other_gradient(lambda grad: torch.cat([grad[0], grad.flatten()])[7:].view(40, 7)),
    "gradient negated lazily": _other_gradient(lambda grad: torch._neg_view(grad)),
    "a parameter more": lambda parameters, optimizer: _another(parameters, optimizer),
}  # fmt: skip


def _another(parameters, optimizer):
    parameters.append(torch.nn.Parameter(torch.ones(9)))
    parameters[-1].grad = torch.ones(9)
    optimizer.param_groups[0]["params"].append(parameters[-1])
    optimizer.logical.add_group({"params": parameters[-1:]})


@pytest.mark.parametrize("backend", ["default", "fused", "foreach"])
@pytest.mark.parametrize("cls", [hf_tam.AdaTAM, hf_tam.TAM])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_after_a_change_is_that_of_a_fresh_optimizer(change, cls, backend):
    """Bit for bit, for the step that follows the change and the one after."""
    parameters, optimizer = training(cls=cls, **({"foreach": True} if backend == "foreach" else {}))
    give_gradients(parameters, torch.Generator().manual_seed(1))
    CHANGES[change](parameters, optimizer)
    for _ in range(2):
        twin = rebuilt(optimizer)
        optimizer.step()
        twin.step()
        for parameter, other in zip(parameters, twin.param_groups[0]["params"], strict=True):
            assert torch.equal(parameter, other)
            assert optimizer.state[parameter].keys() == twin.state[other].keys()
            for key, value in optimizer.state[parameter].items():
                assert torch.equal(value, twin.state[other][key]), key


def test_a_sparse_gradient_is_refused_at_any_step():
    parameters, optimizer = training()
    parameters[0].grad = parameters[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"scope": "model"}, {"foreach": True}], ids=str)
def test_gradients_are_free_after_the_step(options):
    """`zero_grad` before the next forward pass gives their memory back, as with torch's optimizers."""
    parameters, optimizer = training(cls=hf_tam.AdaTAMW, **options)
    give_gradients(parameters, torch.Generator().manual_seed(1))
    gone = [weakref.ref(parameter.grad) for parameter in parameters]
    memory = [weakref.ref(parameter.grad.untyped_storage()) for parameter in parameters]
    optimizer.step()
    optimizer.torque_stats()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert [reference() for reference in (*gone, *memory)] == [None] * 2 * len(SHAPES)


def test_what_is_known_of_tensors_is_kept():
    """Otherwise the tests above would test nothing."""
    parameters, optimizer = training()

    def known():
        (batch,) = optimizer._pipeline._gatherer._known.values()
        return batch.memory, batch.addresses, batch.memory.kept.get("native")

    before = known()
    give_gradients(parameters, torch.Generator().manual_seed(1))
    optimizer.step()
    assert all(new is old for new, old in zip(known()[::2], before[::2], strict=True))
    assert known()[1] == before[1]
    optimizer.state[parameters[0]]["exp_avg"] = optimizer.state[parameters[0]]["exp_avg"].clone()
    optimizer.step()
    assert known()[0] is not before[0]
