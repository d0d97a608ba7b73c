"""The compiled CPU kernels: that they are had, what becomes of a step where they are not, and what is theirs alone.

That they compute the right step is tested where every backend is: "default" there.
"""

import multiprocessing
import os
import platform
import re
import stat
import subprocess
import sys

import pytest
import torch

import hf_tam
from hf_tam.backends import native, select_backend, torch_fused
from hf_tam.backends.native import library
from hf_tam.sharding import LocalReducer

pytestmark = pytest.mark.skipif(not native.is_available(), reason=f"the kernels are not there: {native.why_not()}")
SHAPES = [(257, 129), (2200, 1003), (3, 5), (), (0,), (70_001,), (8192,), (2100, 1001), (16384, 16)]
"""Two of them so large that all threads share them."""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the kernels yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    library._load.cache_clear()
    yield tmp_path / "cache" / "hf_tam"
    library._load.cache_clear()


@pytest.fixture(params=["all there are", "AVX512", "AVX2", "none"])
def instruction_set(request, monkeypatch, tmp_path_factory):
    """The kernels as an older CPU would have them."""
    has = {"AVX512": ["AVX512"], "AVX2": ["AVX2", "AVX512"]}.get(request.param)
    if has is not None and torch.backends.cpu.get_cpu_capability() not in has:
        pytest.skip(f"the CPU has no {request.param}")
    if request.param != "all there are":
        flags = {"AVX512": library._AVX512, "AVX2": library._AVX2, "none": ()}[request.param]
        monkeypatch.setattr(library, "_instruction_sets", lambda: [flags])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "instruction_sets"))
    library._load.cache_clear()
    try:
        assert native.is_available(), native.why_not()
        yield
    finally:
        library._load.cache_clear()


def as_an_older_cpu(test):
    """Once for each instruction set; in one worker, which compiles them once."""
    return pytest.mark.xdist_group("instruction sets")(pytest.mark.usefixtures("instruction_set")(test))


def chosen():
    return select_backend(torch.device("cpu"), foreach=None, fused=None, on_host=True)


def trained(*, dtype=torch.float32, cls=hf_tam.AdaTAMW, spoilt=None, **options):
    """Three steps on tensors of very different sizes; in the second one the gradient of tensor `spoilt` has a NaN."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = cls(parameters, lr=1e-2, **options)
    for step in range(3):
        for at, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            if step == 1 and at == spoilt:
                parameter.grad[-1, -1] = torch.nan
        optimizer.step()
    return [*parameters, *(value for parameter in parameters for value in optimizer.state[parameter].values())]


FAILING = f"{sys.executable} -c 'import sys; sys.exit(\"fatal error: no such header\")'"


# --- how they are had ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_compiled_once_and_found_again(fresh, monkeypatch):
    assert chosen() is native
    (path,) = fresh.iterdir()
    assert path.suffix == ".so"
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    library._load.cache_clear()
    monkeypatch.setattr(library, "_run", lambda *_, **__: pytest.fail("compiled again"))
    assert chosen() is native
    assert library.why_not() == ""


@pytest.mark.launch
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"CC": "/nowhere/cc"}, "/nowhere/cc could not be run: ", id="missing"),
        pytest.param({"CC": FAILING}, "no such header", id="failing", marks=pytest.mark.slow),
        pytest.param(
            {"CC": "true"}, "true reported success, and wrote no library", id="nothing", marks=pytest.mark.slow
        ),
        pytest.param({"PATH": "/nowhere"}, "no C compiler was found", id="none"),
        pytest.param({library.SWITCH: "0"}, "switched off by HF_TAM_NATIVE=0", id="switched off"),
    ],
)
def test_without_them_torchs_kernels_take_the_same_step(fresh, environment, reason, monkeypatch):
    expected = trained()
    library._load.cache_clear()
    for path in fresh.iterdir():
        path.unlink()
    for variable in ("CC", "PATH"):
        if variable in environment:
            monkeypatch.setenv(variable, environment[variable])
    if library.SWITCH in environment:
        monkeypatch.setenv(library.SWITCH, environment[library.SWITCH])
    assert chosen() is torch_fused
    assert library.load() is None
    assert re.search(reason, library.why_not())
    for actual, wanted in zip(trained(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.long
def test_a_compiler_older_than_the_instructions(fresh, monkeypatch):
    """Does what it can."""
    monkeypatch.setattr(library, "_instruction_sets", lambda: [("-mno-such-instructions",), ()])
    assert chosen() is native


_BF16, _AVX512, _AVX2 = "-mavx512bf16", "-mavx512f", "-mavx2"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize(
    ("capability", "says", "tried"),
    [
        ("AVX512", {"avx512_bf16": True}, [{_BF16, _AVX512, _AVX2}, {_AVX512, _AVX2}, {_AVX2}]),
        ("AVX512", {"avx512_bf16": False}, [{_AVX512, _AVX2}, {_AVX2}]),
        ("AVX512", None, [{_AVX512, _AVX2}, {_AVX2}]),
        ("AVX2", {"avx512_bf16": True}, [{_AVX2}]),  # as ATEN_CPU_CAPABILITY=avx2 asks
        ("DEFAULT", {}, [set()]),
    ],
)
def test_compiled_for_what_torch_says_of_the_cpu(capability, says, tried, monkeypatch):
    """None: a torch that has no such function. No -march, which names more than torch looks for."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: says, raising=False)
    if says is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    sets = library._instruction_sets()
    assert [{_BF16, _AVX512, _AVX2}.intersection(flags) for flags in sets] == tried
    assert not [flag for flags in sets for flag in flags if flag.startswith("-march")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written(fresh):
    fresh.parent.mkdir()
    fresh.parent.chmod(0o500)
    assert chosen() is native


@pytest.mark.long
def test_home_that_does_not_exist(fresh, monkeypatch):
    blocked = fresh.parent.with_name("file")
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert chosen() is native


@pytest.mark.launch
def test_ranks_that_compile_at_once(fresh):
    """Each ends with a library that works, and one file is left."""
    script = "from hf_tam.backends import native; assert native.is_available()"
    ranks = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    assert len(list(fresh.iterdir())) == 1


# --- what is theirs alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "model"}, {"cls": hf_tam.TAM}, {"spoilt": 1}],
    ids=["in one call", "in two", "TAM", "a shared tensor left out"],
)
@pytest.mark.parametrize("threads", [2, 3, 300])
@pytest.mark.filterwarnings("ignore:1 update:RuntimeWarning")
def test_threads_change_no_bit(threads, dtype, options, monkeypatch):
    expected = trained(dtype=dtype, **options)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for one, many in zip(expected, trained(dtype=dtype, **options), strict=True):
        assert torch.equal(one, many)


def _step_in_a_child(queue):
    queue.put([tensor.detach().numpy() for tensor in trained()])


@pytest.mark.launch
def test_forked_child_steps_too(monkeypatch):
    """No thread outlives a step, so a fork loses none; torch's own, which would be lost, are kept out of it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = trained()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_a_child, args=(queue,))
    child.start()
    try:
        found = queue.get(timeout=60)
    finally:
        child.join(timeout=10)
        child.kill()
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(actual), wanted)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_states_that_were_moved_are_found(key):
    """`.data` puts other memory under a tensor; what it had before may be given away, and must not be touched."""
    parameter = torch.nn.Parameter(torch.randn(300))
    optimizer = hf_tam.AdaTAMW([parameter], lr=1e-2)
    parameter.grad = torch.randn(300)
    optimizer.step()
    state = optimizer.state[parameter][key]
    before = state.detach().clone()
    old = state.detach()  # shares the memory that is left
    state.data = before.clone()
    parameter.grad = torch.randn(300)
    optimizer.step()
    assert torch.equal(old, before)
    assert not torch.equal(optimizer.state[parameter][key], before)


def test_a_thousand_tensors_of_mixed_sizes_take_one_call(monkeypatch):
    """And the step of the readable backend."""
    sizes = [(7 * number**2) % 3001 for number in range(1000)]
    assert min(sizes) == 0
    calls, call = [], native._call
    monkeypatch.setattr(native, "_call", lambda name, *numbers: (calls.append(name), call(name, *numbers)))
    results = []
    for options in ({}, {"foreach": False, "fused": False}):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
        optimizer = hf_tam.AdaTAMW(parameters, lr=1e-2, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(torch.cat([parameter.detach() for parameter in parameters]))
    assert calls == ["hf_tam_step"] * 2
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)


@pytest.mark.long
@as_an_older_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sums_are_those_of_fp64(dtype, wanted, decay):
    """Within 1e-6 of the terms, by the float sums of 32 each; and far from 1, where float would be 0 or infinite."""
    parameter = torch.nn.Parameter(torch.randn(300_007).to(dtype))
    optimizer = hf_tam.AdaTAM([parameter], weight_decay=decay)
    for scale in (1.0, 1e-25, 1e25, 0.0):
        parameter.grad = (torch.randn(300_007) * scale).to(dtype)
        optimizer.step()
        (batch,) = optimizer._pipeline._gatherer.batches(
            optimizer.param_groups, optimizer.state, LocalReducer(), name=str
        )
        held = (parameter.grad, optimizer.state[parameter]["exp_avg"], parameter.detach())
        grad, first, param = (tensor.double() for tensor in held)
        seen = grad + decay * param if wanted else grad
        expected = [(first * seen).sum(), first.square().sum(), seen.square().sum(), grad.square().sum()]
        if not wanted:
            expected[:2] = [0.0, 0.0]
        terms = (first * seen).abs().sum()
        actual = native.partial_sums(batch.tensors, with_dot=[wanted])[0]
        assert abs(actual[0] - expected[0]) <= 1e-6 * terms
        torch.testing.assert_close(actual[1:], torch.tensor(expected[1:]).double(), rtol=1e-6, atol=0.0)


@as_an_older_cpu
def test_bf16_is_rounded_to_nearest_even():
    """Every bf16 number, NaN and infinities among them, less a number that makes it round: as torch rounds."""
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for subtrahend in (0.0, 1.0, 0.011, -3.7e-39, 1e38):
        parameter = torch.nn.Parameter(everything.clone())
        optimizer = hf_tam.TAM([parameter], lr=1.0, momentum=0.0, gamma=1.0, damping_eps=0.0, nonfinite="propagate")
        parameter.grad = torch.full_like(everything, subtrahend)
        optimizer.step()
        expected = (everything.float() - parameter.grad.float()).to(torch.bfloat16)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0.0, atol=0.0, equal_nan=True)


@as_an_older_cpu
@pytest.mark.parametrize("weight_decay", [0.25, 0.375, 0.4375])  # what is left has few digits: fp32 holds it
def test_adam_rounds_bf16_to_nearest_even(weight_decay):
    """Every bf16 number less its decay, as torch rounds it; what is below 2**-126 may become 0."""
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    everything = everything[~everything.isinf()]
    parameter = torch.nn.Parameter(everything.clone())
    parameter.grad = torch.zeros_like(everything)
    hf_tam.AdaTAMW([parameter], lr=1.0, weight_decay=weight_decay, nonfinite="propagate").step()
    exact = everything.float() * torch.tensor(1 - weight_decay)
    is_zero = (parameter.detach() == 0) & (exact.abs() < 2**-126)
    expected = exact.to(torch.bfloat16).masked_fill(is_zero, 0.0)
    torch.testing.assert_close(parameter.detach(), expected, rtol=0.0, atol=0.0, equal_nan=True)


@as_an_older_cpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 30.0}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("cls", [hf_tam.AdaTAMW, hf_tam.AdaTAM])
def test_bf16_of_any_size_is_updated_as_torch_would(cls, options):
    """The vector path takes 32 numbers at a time: zeros, numbers whose squares vanish or overflow and NaN beside usual
    ones give what plain torch operations give, to a unit of bf16, or 2**-126, below which there may be no numbers."""
    sizes = [0.0, 1e-38, 1e-30, 1e-24, 1e-20, 1e-15, 1e-8, 1e-3, 1.0, 1e3, 1e10, 1e18, 1e19, 3e38]
    generator = torch.Generator().manual_seed(0)
    count = 32 * 300 + 5
    runs = []
    scales = torch.tensor(sizes)[torch.randint(len(sizes), (3, count), generator=generator)]
    usual = torch.rand(3, count // 32 + 1, generator=generator) < 0.5  # whole stretches, that they are not all unusual
    scales = torch.where(usual.repeat_interleave(32, dim=1)[:, :count], torch.tensor(1e-2), scales)
    steps = (scales * torch.randn(3, count, generator=generator)).clamp(-3e38, 3e38).to(torch.bfloat16)
    if "max_grad_norm" in options:  # one NaN, or a norm that overflows, would be the only thing to be seen
        steps = steps.clamp(-1e3, 1e3)
    else:
        steps[2, ::97] = torch.nan
    for plain in (False, True):
        parameter = torch.nn.Parameter(torch.randn(count, generator=generator.manual_seed(1)).to(torch.bfloat16))
        choice = {"foreach": False, "fused": False} if plain else {}
        optimizer = cls([parameter], lr=1e-2, nonfinite="propagate", **options, **choice)
        for grad in steps:
            parameter.grad = grad.clone()
            optimizer.step()
        runs.append(
            [parameter.detach(), optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]]
        )
    # A parameter that is near 0 by now keeps a rounding of where it was, at 1e-2 steps of it.
    assert runs[0][0].isfinite().float().mean() > 0.9
    for actual, expected, atol in zip(*runs, (2**-9, 2**-126, 2**-126), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=atol, equal_nan=True)


@as_an_older_cpu
@pytest.mark.parametrize("maximize", [False, True])
def test_coupled_decay_of_bf16_is_computed_in_fp32(maximize):
    """The step of fp32 twins, rounded."""
    count = 32 * 300 + 5
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, count, generator=generator).to(torch.bfloat16)
    runs = []
    for dtype, choice in ((torch.bfloat16, {}), (torch.float32, {"foreach": False, "fused": False})):
        parameter = torch.nn.Parameter(numbers[0].to(dtype, copy=True))
        optimizer = hf_tam.AdaTAM([parameter], lr=1e-2, weight_decay=0.5, maximize=maximize, **choice)
        parameter.grad = numbers[1].to(dtype)
        optimizer.step()
        state = optimizer.state[parameter]
        runs.append(
            [value.to(torch.bfloat16) for value in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])]
        )
    for actual, expected in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-8, atol=0.0)
