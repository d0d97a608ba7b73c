"""torch.distributed.checkpoint's helpers step once to create state; training must be the same afterwards."""

from torch import nn

from tests.test_properties import EVERY_BACKEND, fresh_parameters, make
from tests.test_torch_contract import NAMES, assert_bitwise, set_gradients, walk


@EVERY_BACKEND
def test_asking_for_a_state_dict_changes_nothing(name, backend):
    """torch.distributed.checkpoint takes a step with zero gradients and lr = 0 to create state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    models = [nn.Linear(5, 3), nn.Linear(5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make(name, model.parameters(), backend, lr=0.1, weight_decay=0.1) for model in models]
    get_optimizer_state_dict(models[0], optimizers[0])
    parameters = [list(model.parameters()) for model in models]
    for optimizer, of_model in zip(optimizers, parameters, strict=True):
        walk(optimizer, of_model, range(4))
    assert_bitwise(optimizers[0], parameters[0], optimizers[1], parameters[1])


@NAMES
def test_a_first_step_of_the_warm_up_counts(name):
    """lr = 0 and one gradient that is not zero: AdamW counts that step."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters, lr=0.0)
    set_gradients(parameters, 0)
    for parameter in parameters[1:]:
        parameter.grad.zero_()
    optimizer.step()
    assert {optimizer.state[parameter]["step"].item() for parameter in parameters} == {1.0}
