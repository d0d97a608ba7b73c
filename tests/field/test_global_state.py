"""What others set for the whole process or thread: a step is a step all the same, or is not taken at all.

torch.optim.AdamW is the control: what it survives is survived.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hf_tam

OPTIONS = {
    "default": {},
    "foreach": {"foreach": True},
    "single": {"foreach": False, "fused": False},
    "capturable": {"capturable": True},
    "clipping": {"max_grad_norm": 0.5},
    "one angle": {"scope": "model"},
    "a warm-up": {"torque_steps": 2},
}


def _run(around, cls=hf_tam.AdaTAMW, **options):
    """Three steps inside of what `around` gives; the states begin there."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (300, 7, 1)]
    grads = [[torch.randn(parameter.shape, generator=generator) for parameter in parameters] for _ in range(3)]
    optimizer = cls(parameters, lr=1e-2, **options)
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = grad
        with around():
            optimizer.step()
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [parameter.detach() for parameter in parameters] + states


@contextlib.contextmanager
def _set(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


class _Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SURROUNDINGS = {
    "a default device": lambda: torch.device("meta"),
    "set_default_device": lambda: _set(torch.set_default_device, "meta", None),
    "set_default_dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "set_default_dtype to bf16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic algorithms": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "warnings are errors": _warnings_are_errors,
    "a mode that counts FLOPs": lambda: FlopCounterMode(display=False),
    "a mode that sees every operator": _Passing,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients enabled": torch.enable_grad,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "no multithreading of backward": lambda: torch.autograd.set_multithreading_enabled(False),
    "denormals flushed": lambda: _set(torch.set_flush_denormal, True, False),
    "seven threads": lambda: _set(torch.set_num_threads, 7, 1),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_a_step_is_what_it_is_elsewhere(surroundings, options):
    """Bit for bit, from the first step on."""
    with contextlib.suppress(RuntimeError):  # the control; torch 2.9's does not step under a default device
        _run(SURROUNDINGS[surroundings], torch.optim.AdamW)
    expected = _run(contextlib.nullcontext, **options)
    for left, right in zip(_run(SURROUNDINGS[surroundings], **options), expected, strict=True):
        assert (left.dtype, left.device) == (right.dtype, right.device)
        assert torch.equal(left, right)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"max_grad_norm": 1.0},
                                     {"scope": "model"}, {"nonfinite": "propagate"}], ids=str)  # fmt: skip
def test_memory_is_estimated_with_fake_tensors(cls, options):
    """FakeTensorMode, as torch's memory trackers and torchtitan's estimation use it."""
    if cls is torch.optim.AdamW and not set(options) <= {"foreach", "fused"}:
        pytest.skip("not torch's")
    if cls is hf_tam.TAM and "fused" in options:
        pytest.skip("TAM has no argument `fused`")
    with FakeTensorMode():
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        optimizer = cls(model.parameters(), **options)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 8)).sum().backward()
            optimizer.step()
        shapes = [value.shape for state in optimizer.state.values() for value in state.values()]
    assert shapes.count(torch.Size([4, 8])) == (1 if cls is hf_tam.TAM else 2)


def test_the_memory_tracker_sees_our_states():
    """torch.distributed._tools.MemTracker: AdamW's states, and 8 bytes a tensor more."""
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    counted = []
    for cls in (torch.optim.AdamW, hf_tam.AdaTAMW):
        with FakeTensorMode():
            model = torch.nn.Linear(1024, 512)
            optimizer = cls(model.parameters(), foreach=True)
            memory = tracker.MemTracker()
            memory.track_external(model, optimizer)
            with memory:
                for _ in range(2):
                    model(torch.randn(2, 1024)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    memory.reset_mod_stats()
            snapshot = memory.get_tracker_snapshot("current")
        counted.append(next(iter(snapshot.values()))[tracker._MemRefType.OPT])
    assert 0 < counted[0] <= counted[1] <= counted[0] + 10_000


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_warning_that_is_an_error_leaves_no_half_taken_step(options):
    """The first NaN is warned of. Under `python -W error` that raises, when everything has been written."""
    twins = []
    for strict in (False, True):
        parameters = [torch.nn.Parameter(torch.ones(50)), torch.nn.Parameter(torch.ones(3, 2))]
        optimizer = hf_tam.AdaTAMW(parameters, lr=1e-2, **options)
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            if step == 1:
                parameters[0].grad[3] = torch.nan
            with warnings.catch_warnings():
                warnings.simplefilter("error" if strict else "ignore")
                if strict and step == 1 and not options.get("capturable"):
                    with pytest.raises(RuntimeWarning, match="skipped"):
                        optimizer.step()
                else:
                    optimizer.step()
        twins.append([*parameters, *(value for each in parameters for value in optimizer.state[each].values())])
    assert all(torch.equal(left, right) for left, right in zip(*twins, strict=True))


@pytest.mark.launch
def test_the_first_step_of_a_process_under_W_error():
    """Nothing that is imported or compiled on the way warns."""
    code = (
        "import torch, hf_tam\n"
        "p = torch.nn.Parameter(torch.ones(5)); o = hf_tam.AdaTAMW([p]); p.grad = torch.ones(5); o.step()\n"
        "assert float(o.state[p]['step']) == 1.0"
    )
    strict = "import warnings; warnings.simplefilter('error')\n"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("import torch, hf_tam\n", "import torch, hf_tam\n" + strict)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_optimizers_in_several_threads():
    """Each its own: as when models are trained side by side in one process."""
    results, errors = {}, []

    def train(number):
        try:
            generator = torch.Generator().manual_seed(number)
            parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (70_000, 5)]
            optimizer = hf_tam.AdaTAMW(parameters, lr=1e-2)
            for _ in range(5):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
            results[number] = parameters
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(number % 2,)) for number in range(4)]
    alone = {}
    for number in (0, 1):
        train(number)
        alone[number] = results.pop(number)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    for number, parameters in results.items():
        assert all(torch.equal(left, right) for left, right in zip(parameters, alone[number], strict=True))
