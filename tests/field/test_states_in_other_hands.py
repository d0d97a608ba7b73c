"""States that somebody moved, replaced, converted or shared: what stands in `optimizer.state` counts, and is true.

Tools that offload, average, share or convert states do it behind the optimizer's back. torch.optim's optimizers keep
each number in a tensor of its own and never notice.
"""

from __future__ import annotations

import copy
import multiprocessing

import pytest
import torch

import hf_tam

BACKENDS = {
    "default": {},
    "foreach": {"foreach": True},
    "single": {"foreach": False, "fused": False},
    "capturable": {"capturable": True},
    "clipping": {"max_grad_norm": 0.5},
    "one angle": {"scope": "model"},
}
SHAPES = ((40, 7), (7,), (), (30, 4))


def _training(**options):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = hf_tam.AdaTAMW(parameters, lr=1e-2, **options)
    for seed in range(2):
        _step(parameters, optimizer, seed)
    return parameters, optimizer


def _step(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def _each_state(optimizer, change):
    for state in optimizer.state.values():
        for key in list(state):
            change(state, key)


def _only(keys, change):
    return lambda state, key: change(state, key) if key in keys else None


def _data(change):
    def apply(state, key):
        state[key].data = change(state[key].data)

    return apply


def _item(change):
    def apply(state, key):
        state[key] = change(state[key])

    return apply


HANDS = {
    "all states moved by .data": _data(torch.clone),
    "all but step moved by .data, as offloading tools do": _only(
        ("exp_avg", "exp_avg_sq", "torque", "exp_avg_scale"), _data(torch.clone)
    ),
    "only torque moved by .data": _only(("torque",), _data(torch.clone)),
    "all replaced by clones": _item(torch.clone),
    "only exp_avg_scale replaced": _only(("exp_avg_scale",), _item(torch.clone)),
    "scalars in fp64": _only(("step", "torque", "exp_avg_scale"), _item(torch.Tensor.double)),
    "scalars in fp64 under the same objects": _only(
        ("step", "torque", "exp_avg_scale"), _data(torch.Tensor.double)
    ),
    "step in int64": _only(("step",), _item(torch.Tensor.long)),
    "step of shape (1,)": _only(("step",), _item(lambda step: step.reshape(1).clone())),
    "step as a number": _only(("step",), _item(lambda step: int(step))),
    "torque as a number": _only(("torque",), _item(float)),
    "scalars as numpy": _only(("step", "torque"), _item(lambda value: value.numpy().copy())),
    "set_ to other memory": _only(("torque",), lambda state, key: state[key].set_(state[key].clone())),
}  # fmt: skip


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("hand", HANDS)
def test_the_run_goes_on_as_if_nobody_had_touched_it(hand, options):
    """Bit for bit; and state_dict, torque_stats and the export say what was computed."""
    parameters, optimizer = _training(**options)
    untouched, twin = _training(**options)
    for seed in range(2, 5):
        _each_state(optimizer, HANDS[hand])
        _step(parameters, optimizer, seed)
        _step(untouched, twin, seed)
    for parameter, other in zip(parameters, untouched, strict=True):
        assert torch.equal(parameter, other)
        for key, value in twin.state[other].items():
            mine = optimizer.state[parameter][key]
            assert torch.equal(mine, value), key
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape), key
    assert torch.equal(optimizer.torque_stats()["torque"], twin.torque_stats()["torque"])
    exports = [hf_tam.export_torch_state_dict(each)["state"] for each in (optimizer, twin)]
    for left, right in zip(*(export.values() for export in exports), strict=True):
        assert all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
def test_a_run_resumed_from_moved_states_is_the_same_run(options):
    parameters, optimizer = _training(**options)
    _each_state(optimizer, HANDS["all but step moved by .data, as offloading tools do"])
    _step(parameters, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = hf_tam.AdaTAMW(others, lr=1e-2, **options)
    resumed.load_state_dict(saved)
    for seed in (3, 4):
        _step(parameters, optimizer, seed)
        _step(others, resumed, seed)
    assert all(torch.equal(left, right) for left, right in zip(parameters, others, strict=True))


def test_values_that_somebody_wrote_are_used():
    """An averaged torque, a step set back: the next step begins from them."""
    for options in BACKENDS.values():
        parameters, optimizer = _training(**options)
        for state in optimizer.state.values():
            state["torque"] = torch.tensor(0.25)
            state["step"].fill_(7.0)
        optimizer.param_groups[0]["gamma"] = 1.0  # the torque stays
        _step(parameters, optimizer, 2)
        for state in optimizer.state.values():
            assert (float(state["torque"]), float(state["step"])) == (0.25, 8.0)


def test_one_tensor_for_the_steps_of_all_parameters():
    """As some give `step` a single tensor. Each has its own after a step, as torch's foreach would count it once."""
    parameters, optimizer = _training()
    shared = torch.tensor(2.0)
    for state in optimizer.state.values():
        state["step"] = shared
    _step(parameters, optimizer, 2)
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0] * len(SHAPES)


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("loaded", [False, True])
def test_states_that_were_shared_stay_shared(options, loaded):
    """`share_memory_`, by which Hogwild's processes step the same states; also after load_state_dict."""
    parameters, optimizer = _training(**options)
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _each_state(optimizer, lambda state, key: state[key].share_memory_())
    before = {key: value for state in optimizer.state.values() for key, value in state.items()}
    for seed in (2, 3):
        _step(parameters, optimizer, seed)
        _each_state(optimizer, lambda state, key: _require(state[key].is_shared(), key))
    assert all(any(value is held for state in optimizer.state.values() for held in state.values())
               for value in before.values())  # fmt: skip
    assert [float(state["step"]) for state in optimizer.state.values()] == [4.0] * len(SHAPES)


def _require(condition, message):
    assert condition, message


def _steps_elsewhere(parameters, optimizer):
    torch.set_num_threads(1)
    _step(parameters, optimizer, 2)


@pytest.mark.launch
def test_another_process_steps_the_shared_states():
    parameters, optimizer = _training()
    untouched, twin = _training()
    for parameter in parameters:
        parameter.grad = None
        parameter.share_memory_()
    _each_state(optimizer, lambda state, key: state[key].share_memory_())
    child = multiprocessing.get_context("fork").Process(target=_steps_elsewhere, args=(parameters, optimizer))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    _step(untouched, twin, 2)
    for parameter, other in zip(parameters, untouched, strict=True):
        assert torch.equal(parameter, other)
        for key, value in twin.state[other].items():
            assert torch.equal(optimizer.state[parameter][key], value), key


def test_the_default_keeps_its_memory_while_nobody_touches_it():
    """Otherwise every step would copy all numbers."""
    parameters, optimizer = _training()
    before = [value.data_ptr() for state in optimizer.state.values() for value in state.values()]
    _step(parameters, optimizer, 2)
    assert [value.data_ptr() for state in optimizer.state.values() for value in state.values()] == before
