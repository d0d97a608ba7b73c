"""The Triton backend: compiled where there is a GPU, otherwise in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

import hf_tam
from hf_tam import backends
from hf_tam.backends import Entry, select_backend
from hf_tam.backends import triton as backend
from hf_tam.backends.triton import chunks, launch, table
from hf_tam.update import AdamCoefficients
from tests import interpreting, running
from tests.cases import CASES
from tests.test_equivalence import Dispatched

# The interpreter computes with numpy, which says what overflows; the kernels then take fp64.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore::RuntimeWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IN_GATE = {
    "AdaTAMW-tensor-layouts", "AdaTAMW-tensor-bfloat16", "AdaTAMW-tensor-huge", "AdaTAMW-tensor-tiny",
    "AdaTAM-tensor-empty", "AdaTAM-model-complex-maximize", "AdaTAMW-nothing-kept", "TAM-tensor-mixed-dtypes",
    "AdaTAM-tensor-tensor-lr",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    interpreting.prepare()


@pytest.fixture
def only_triton(monkeypatch):
    """Optimizers run on the Triton kernels wherever their tensors are."""
    monkeypatch.setattr("hf_tam.gathering.select_backend", lambda device, **_: backend)


def moved(tensor):
    """The same values and strides on `DEVICE`."""
    if tensor is None or DEVICE.type == "cpu":
        return tensor
    if 0 in tensor.stride():
        return tensor[:1].to(DEVICE).expand_as(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


# --- equivalence --------------------------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch, only_triton):
    """`run_case` on `DEVICE`, without reading a number on the host."""
    build, snapshot = running.build, running._snapshot

    def built(case, name):
        optimizer, parameters = build(case, name)
        for group in optimizer.param_groups:
            group["capturable"] = True
            if isinstance(group["lr"], torch.Tensor):
                group["lr"] = group["lr"].to(DEVICE)
        for parameter in parameters:
            parameter.data = moved(parameter.data)
        return optimizer, parameters

    def on_host(optimizer, parameter):
        taken = vars(snapshot(optimizer, parameter))
        return running.Snapshot(
            **{key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in taken.items()}
        )

    monkeypatch.setattr(running, "build", built)
    monkeypatch.setattr(running, "_snapshot", on_host)


class _Moving:
    """A case whose gradients come on `DEVICE`."""

    def __init__(self, case):
        self._case = case

    def __getattr__(self, name):
        return getattr(self._case, name)

    def gradients(self):
        return ([moved(gradient) for gradient in gradients] for gradients in self._case.gradients())


def _agrees(case):
    running.assert_same(case, running.run_case(_Moving(case), "default"), running.run_reference_case(case))


@pytest.mark.parametrize("name", sorted(IN_GATE))
def test_agrees_with_the_reference(on_device, name):
    _agrees(dataclasses.replace(running.CASES_BY_NAME[name], steps=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(case) for case in CASES])
def test_every_case_agrees_with_the_reference(on_device, name):
    _agrees(running.CASES_BY_NAME[name])


def make_entries(tensors, *, decay=0.0, maximize=False, seed=0):
    """Entries in mid-training: moments that are not zero, gradients at random."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype).as_strided(
            tensor.shape, torch.empty_strided(tensor.shape, tensor.stride()).stride()
        ) if tensor.is_contiguous() else torch.empty_like(tensor).copy_(
            torch.randn(tensor.shape, generator=generator)
        )  # fmt: skip

    return [
        Entry(
            index=index, owner=tensor, param=tensor, raw_grad=moved(like(tensor)), state={},
            first=moved(like(tensor)), second=moved(like(tensor).square()), coupled_decay=decay, maximize=maximize,
        )
        for index, tensor in enumerate(moved(tensor) for tensor in tensors)
    ]  # fmt: skip


shapes = st.sampled_from([(), (0,), (1,), (7,), (33, 65), (3, 0, 2), (2049,), (1, 8195)])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])


@given(
    leaves=st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings().max_examples // 2)
def test_sums_and_update_of_random_shapes(leaves, decay, maximize, seed):
    """As the readable backend's, to the rounding of each dtype."""
    from hf_tam.backends import single

    tensors = [torch.randn(shape).to(dtype) for shape, dtype in leaves]
    entries = make_entries(tensors, decay=decay, maximize=maximize, seed=seed)
    twins = make_entries([tensor.clone() for tensor in tensors], decay=decay, maximize=maximize, seed=seed)
    for twin in twins:  # coupled decay is added in the gradient's dtype there, and in fp32 here
        if twin.param.dtype in (torch.bfloat16, torch.float16):
            twin.raw_grad = twin.raw_grad.float()
    sums = backend.partial_sums(entries, with_dot=[True] * len(entries))
    expected = single.partial_sums(twins, with_dot=[True] * len(twins))
    scale = torch.stack([expected[:, 1:3].prod(1).sqrt(), *expected[:, 1:].unbind(1)], 1)
    assert bool(((sums - expected).abs() <= 1e-6 * scale + 1e-30).all())
    coefficients = _coefficients(len(entries))
    backend.update(entries, coefficients)
    for position, twin in enumerate(twins):
        single.adam_tensor(twin, twin.grad(), {k: v[position] for k, v in coefficients._asdict().items()})
    for mine, theirs in zip(entries, twins, strict=True):
        for key in ("param", "first", "second"):
            torch.testing.assert_close(getattr(mine, key), getattr(theirs, key))


def _coefficients(count):
    numbers = {"decay": 0.99, "first_weight": 0.3, "second_decay": 0.9, "second_weight": 0.1, "step_size": 0.01}
    base = torch.ones(count, dtype=torch.float64, device=DEVICE)
    return AdamCoefficients(**{key: base * value for key, value in numbers.items()}, eps=base * 1e-3)


def test_sums_are_right_beyond_the_range_of_fp32_squares():
    """A span that overflows, one that vanishes, one with a NaN: each goes by itself."""
    entries = make_entries([torch.zeros(9000) for _ in range(4)])
    for entry, scale in zip(entries, (1e30, 1e-30, 1.0, 0.0), strict=True):
        entry.raw_grad.mul_(scale)
        entry.first.mul_(scale)
    entries[2].raw_grad[8999] = math.nan
    sums = backend.partial_sums(entries, with_dot=[True] * 4).cpu()
    for position in (0, 1):
        grad, first = entries[position].raw_grad.double().cpu(), entries[position].first.double().cpu()
        expected = torch.stack([first @ grad, first @ first, grad @ grad, grad @ grad])
        torch.testing.assert_close(sums[position], expected, rtol=1e-6, atol=0)
    assert sums[2].isnan().tolist() == [True, False, True, True]
    assert not sums[3].any()


def test_what_is_skipped_is_not_touched():
    entries = make_entries([torch.randn(5000), torch.randn(70)])
    entries[0].raw_grad.fill_(math.nan)
    before = [entries[0].param.clone(), entries[0].first.clone(), entries[0].second.clone()]
    other = entries[1].param.clone()
    backend.update(entries, _coefficients(2), torch.tensor([False, True], device=DEVICE))
    after = [entries[0].param, entries[0].first, entries[0].second]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert not torch.equal(entries[1].param, other)


def test_runs_are_bitwise_identical():
    runs = []
    for _ in range(2):
        entries = make_entries([torch.ones(20_001), torch.ones(3)])
        sums = backend.partial_sums(entries, with_dot=[True, True])
        backend.update(entries, _coefficients(2))
        runs.append([sums, *(entry.param for entry in entries)])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_gradients_of_another_dtype():
    for param_dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        entries = make_entries([torch.randn(300).to(param_dtype)])
        entries[0].raw_grad = entries[0].raw_grad.to(grad_dtype)
        sums = backend.partial_sums(entries, with_dot=[True])[0]
        grad, first = entries[0].raw_grad.double(), entries[0].first.double()
        expected = torch.stack([first @ grad, first @ first, grad @ grad, grad @ grad])
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-4)
        before = entries[0].first.double()
        backend.update(entries, _coefficients(1))
        torch.testing.assert_close(entries[0].first, torch.lerp(before, grad, 0.3).to(param_dtype))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched so far."""
    kind = type(backend.update_kernel)
    run, names = kind.run, []

    def counted(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return names


@pytest.mark.slow
def test_a_thousand_tensors_take_three_launches(launches):
    sizes = [1 + (37 * number) % 301 for number in range(1000)]
    entries = make_entries([torch.randn(size) for size in sizes])
    sums = backend.partial_sums(entries, with_dot=[True] * 1000)
    expected = torch.stack([entry.raw_grad.double().square().sum() for entry in entries])
    torch.testing.assert_close(sums[:, 3], expected, rtol=1e-6, atol=0)
    before = [entry.param.clone() for entry in entries]
    backend.update(entries, _coefficients(1000))
    assert all(not torch.equal(entry.param, old) for entry, old in zip(entries, before, strict=True))
    assert launches == ["sums_kernel", "combine_kernel", "update_kernel"]


@pytest.mark.parametrize("name", ["AdaTAMW", "TAM"])
def test_clips_as_clip_grad_norm(only_triton, name):
    inside, before = ([torch.nn.Parameter(moved(torch.ones(size))) for size in (9000, 40)] for _ in range(2))
    optimizers = []
    for parameters, limit in ((inside, 0.5), (before, None)):
        optimizers.append(getattr(hf_tam, name)(parameters, lr=0.1, max_grad_norm=limit))
        optimizers[-1].param_groups[0]["capturable"] = True
    for step in range(3):
        for index, (mine, other) in enumerate(zip(inside, before, strict=True)):
            noise = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2 * step + index))
            mine.grad, other.grad = moved(noise), moved(noise.clone())
        norm = torch.nn.utils.clip_grad_norm_(before, 0.5)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(optimizers[0].torque_stats()["grad_norm"], norm)
    for mine, other in zip(inside, before, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("options", "kernels"), [
    ({}, ["sums_kernel", "adam_step_kernel"]),
    ({"max_grad_norm": 1.0}, ["sums_kernel", "combine_kernel", "update_kernel"]),
    ({"scope": "model"}, ["sums_kernel", "combine_kernel", "update_kernel"]),
    ({"nonfinite": "raise"}, ["sums_kernel", "combine_kernel", "update_kernel"]),
])  # fmt: skip
def test_launches_of_a_step(only_triton, launches, options, kernels):
    """Two where nothing global is needed, and only there."""
    parameters = [torch.nn.Parameter(moved(torch.ones(50))) for _ in range(3)]
    optimizer = hf_tam.AdaTAMW(parameters, **options)
    optimizer.param_groups[0]["capturable"] = True
    for parameter in parameters:
        parameter.grad = moved(torch.randn(50))
    optimizer.step()
    assert launches == kernels


# --- the whole step -----------------------------------------------------------------------------------------------

PLAIN_STEP = backend.AdamStep(1e-3, (0.9, 0.999), 1e-8, 0.0, 0.9, 1e-8, None, False, True)
STEP_SHAPES = ((9000,), (40, 5), (), (0,), (300,))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdaTAMW", {"torque_steps": 2, "betas": (0.9, 0.99)}),
        ("AdaTAMW", {"step_size": "paper", "lr": 1e-3, "betas": (0.0, 0.9)}),
        ("AdaTAM", {"weight_decay": 0.1, "maximize": True, "nonfinite": "propagate"}),
        ("TAM", {"weight_decay": 0.1, "torque_steps": 2}),
        ("TAM", {"step_size": "paper"}),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_whole_steps_are_the_general_path(name, options, tensor_lr):
    """States, parameters and statistics after each step, with a NaN on the way."""
    parameters = [torch.nn.Parameter(moved(torch.randn(shape))) for shape in STEP_SHAPES]
    single = {"foreach": False} if name == "TAM" else {"foreach": False, "fused": False}
    optimizer = getattr(hf_tam, name)(parameters, **options, **single)
    group = optimizer.param_groups[0]
    group["capturable"] = True
    ours = [parameter.detach().clone() for parameter in parameters]
    moments = [[torch.zeros_like(tensor) for tensor in ours] for _ in optimizer.moments]
    scalars = torch.zeros(len(optimizer.scalar_states), len(ours), device=DEVICE)
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for step in range(3):
        for index, parameter in enumerate(parameters):
            parameter.grad = moved(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7 * index)))
            parameter.grad += 0.3 * moved(torch.randn(parameter.shape))
        if step == 1 and group["nonfinite"] == "skip":
            parameters[1].grad[0, 0] = math.inf
        entries = [
            Entry(
                index=index, owner=tensor, param=tensor, raw_grad=parameters[index].grad, state={},
                first=moments[0][index], second=moments[1][index] if len(moments) > 1 else None,
                coupled_decay=group["weight_decay"] if optimizer.coupled else 0.0, maximize=group["maximize"],
            )
            for index, tensor in enumerate(ours)
        ]  # fmt: skip
        bound = backend.bind(entries)
        assert [chunks.size for chunks in bound.table.parts.values()] == [6]
        report = _whole_step(optimizer, bound, scalars, skipped, tensor_lr)
        optimizer.step()
        stats = optimizer.torque_stats()
        torch.testing.assert_close(report.cosine.float(), stats["cosine"], rtol=0, atol=2e-6)
        torch.testing.assert_close(report.damping.float(), stats["damping"], rtol=0, atol=2e-6)
        torch.testing.assert_close(report.sums[:, 3].sum().sqrt().float(), stats["grad_norm"])
        for index, (parameter, tensor) in enumerate(zip(parameters, ours, strict=True)):
            torch.testing.assert_close(tensor, parameter.detach(), rtol=1e-5, atol=1e-6)
            state = optimizer.state[parameter]
            for key, moment in zip(optimizer.moments, moments, strict=True):
                torch.testing.assert_close(moment[index], state[key], rtol=1e-5, atol=1e-6)
            for key, row in zip(optimizer.scalar_states, scalars, strict=True):
                torch.testing.assert_close(row[index], state[key], rtol=1e-5, atol=2e-6)
        assert int(skipped) == int(stats["skipped"]) == (1 if step and group["nonfinite"] == "skip" else 0)


def test_a_whole_step_takes_two_launches(launches):
    entries = make_entries([torch.randn(size) for size in (50, 50, 500, 1)])
    scalars = torch.zeros(3, 4, device=DEVICE)
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    backend.whole_adam(backend.bind(entries), scalars, PLAIN_STEP, skipped=skipped)
    assert launches == ["sums_kernel", "adam_step_kernel"]


def _whole_step(optimizer, bound, scalars, skipped, tensor_lr):
    group = optimizer.param_groups[0]
    lr = torch.tensor(group["lr"], dtype=torch.float64, device=DEVICE) if tensor_lr else group["lr"]
    shared = {
        "lr": lr, "gamma": group["gamma"], "damping_eps": group["damping_eps"],
        "torque_steps": group["torque_steps"], "literal": group["step_size"] == "paper",
        "skip_nonfinite": group["nonfinite"] == "skip",
    }  # fmt: skip
    if "momentum" in group:
        return backend.whole_sgd(
            bound, scalars, backend.SgdStep(momentum=group["momentum"], **shared), skipped=skipped
        )
    decay = 0.0 if optimizer.coupled else group["weight_decay"]
    step = backend.AdamStep(betas=group["betas"], eps=group["eps"], weight_decay=decay, **shared)
    return backend.whole_adam(bound, scalars, step, skipped=skipped)


# --- tables -------------------------------------------------------------------------------------------------------


@given(numel=st.one_of(st.integers(0, 10**6), st.integers(2**31 - 10, 2**36)))
@settings(max_examples=200)
def test_chunks_cover_a_tensor_once(numel):
    length, count = table.chunk_length(numel), table.num_chunks(numel)
    assert length % chunks.SPAN == 0
    assert 1 <= count <= chunks.MAX_CHUNKS
    assert (count - 1) * length < max(numel, 1) <= count * length


@triton.jit
def _where(tensors, owners, found, first: tl.int64):
    _, _, start, length = chunks.locate(tensors, owners, first + tl.program_id(0))
    tl.store(found, start)
    tl.store(found + 1, length)


def test_offsets_are_64_bits_wide():
    """The last chunk of a tensor of 3 * 2^31 elements; in 32 bits it would begin before the tensor."""
    numel = 3 * 2**31 + 5
    length, count = table.chunk_length(numel), table.num_chunks(numel)
    rows = torch.tensor([[0, 0, 0, numel, length, 0, count]], dtype=torch.int64, device=DEVICE)
    owners = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    found = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    _where[(1,)](rows, owners, found, count - 1)
    assert found.tolist() == [(count - 1) * length, numel - (count - 1) * length]
    assert found[0] > 2**31


def test_update_beyond_32_bits(monkeypatch):
    """The last chunk of a tensor of 2^32 elements of which only that chunk exists: addresses are moved back."""
    tail = 700
    numel = 2**32 + tail
    entry = make_entries([torch.randn(tail)])[0]
    bound = backend.bind([entry])
    whole, count = table.chunk_length(numel), table.num_chunks(numel)
    start = (count - 1) * whole
    shift = 4 * start
    addresses = [tensor.data_ptr() - shift for tensor in (entry.param, entry.first, entry.second)]
    row = torch.tensor([[*addresses, start + tail, whole, 0, count]], dtype=torch.int64, device=DEVICE)
    owners = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    grads = torch.tensor([entry.raw_grad.data_ptr() - shift], dtype=torch.int64, device=DEVICE)
    expected = make_entries([entry.param.clone().cpu()])
    backend.update(expected, _coefficients(1))
    kind = next(iter(bound.table.parts))
    constants = launch.compiled_for(kind, block=chunks.UPDATE_BLOCK)
    backend.update_kernel[(1,)](
        row, grads, owners, torch.stack(list(_coefficients(1))), None, None, count - 1, 1, 0.0, ADAM=True, **constants
    )
    assert start > 2**31
    assert torch.equal(entry.param, expected[0].param)


def test_tables_are_kept_until_something_moves():
    entries = make_entries([torch.randn(40), torch.randn(7)])
    kept = backend.bind(entries).table
    column = kept.grads
    assert backend.bind(entries).table is kept
    assert kept.grads is column
    entries[0].raw_grad = entries[0].raw_grad.clone()
    assert backend.bind(entries).table is kept
    assert kept.grads.tolist() == [entry.raw_grad.data_ptr() for entry in entries]
    assert column.tolist() != kept.grads.tolist()  # the old column is left as a graph may know it
    for change in (
        lambda entry: setattr(entry, "first", entry.first.clone()),
        lambda entry: setattr(entry, "raw_grad", entry.raw_grad.double()),
        lambda entry: setattr(entry, "raw_grad", torch.empty(41, device=DEVICE)[1:].copy_(entry.raw_grad)),
        lambda entry: setattr(entry, "coupled_decay", 0.1),
    ):
        before = backend.bind(entries).table
        change(entries[0])
        assert backend.bind(entries).table is not before


def test_nothing_is_read_by_the_host(only_triton):
    """The host dispatches no read; where the interpreter runs, that is all that can be seen."""
    parameters = [torch.nn.Parameter(moved(torch.randn(9)))]
    optimizer = hf_tam.AdaTAMW(parameters, capturable=True)
    for step in range(2):
        parameters[0].grad = torch.full_like(parameters[0], math.nan if step else 1.0)
        with Dispatched() as dispatched:
            optimizer.step()
        assert dispatched.count("aten._local_scalar_dense") == 0
    assert float(optimizer.state[parameters[0]]["step"]) == 1.0


# --- which backend ------------------------------------------------------------------------------------------------


def test_it_is_the_choice_on_accelerators():
    cuda = torch.device("cuda")
    assert select_backend(cuda, foreach=None, fused=None, on_host=False) is backend
    assert select_backend(cuda, foreach=None, fused=True, on_host=False) is backend
    assert select_backend(cuda, foreach=True, fused=None, on_host=False) is not backend
    assert select_backend(cuda, foreach=False, fused=False, on_host=False) is not backend
    assert select_backend(torch.device("cpu"), foreach=None, fused=None, on_host=False) is not backend


def test_without_triton_foreach_is_used(monkeypatch):
    from hf_tam.backends import foreach

    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    backends._warn_of_missing_triton.cache_clear()
    assert select_backend(torch.device("cuda"), foreach=True, fused=None, on_host=False) is foreach  # says nothing
    with pytest.warns(RuntimeWarning, match="triton is not installed: on cuda"):
        assert select_backend(torch.device("cuda"), foreach=None, fused=None, on_host=False) is foreach
    assert select_backend(torch.device("cuda"), foreach=None, fused=None, on_host=False) is foreach  # once is enough
    with pytest.raises(RuntimeError, match="pip install triton"):
        select_backend(torch.device("cuda"), foreach=None, fused=True, on_host=False)


# --- compiled -----------------------------------------------------------------------------------------------------

COMPILE = """
import re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_tam.backends.triton import chunks, step_kernels, sums_kernels, update_kernels

POINTERS = {"owners": "*i32", "keeps": "*u8", "scalars": "*fp32", "before": "*fp32", "skipped": "*i64", "keep": "*i1",
            "tensors": "*i64", "grads": "*i64"}
base = {"ALIGNED": True, "COUPLED": False, "MAXIMIZE": False}
whole = {"LITERAL": False, "SKIP": True, "lr_pointer": None}
for dtype in (tl.float32, tl.bfloat16):
    for kernel, block, streams, options in (
        (sums_kernels.sums_kernel, chunks.SUMS_BLOCK, 2, {"NUM_SCALARS": 3}),
        (update_kernels.update_kernel, chunks.UPDATE_BLOCK, 4, {"ADAM": True}),
        (step_kernels.adam_step_kernel, chunks.UPDATE_BLOCK, 4, whole),
        (step_kernels.sgd_step_kernel, chunks.UPDATE_BLOCK, 3, whole),
    ):
        constants = {"DTYPE": dtype, "GRAD_DTYPE": dtype, "BLOCK": block, **base, **options}
        signature = {
            p.name: "constexpr" if p.name in constants else p.annotation_type or POINTERS.get(p.name, "*fp64")
            for p in kernel.params
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        for target in (GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)):
            options = {"num_warps": chunks.NUM_WARPS, "enable_fp_fusion": True}
            assembly = triton.compile(source, target=target, options=options).asm
            if "ptx" in assembly:
                wide = len(re.findall(r"ld\\.global\\.v4\\.b32", assembly["ptx"]))
                print(kernel.__name__, dtype, wide, streams * block * dtype.primitive_bitwidth // 8 // 128 // 16)
"""


@pytest.mark.slow
def test_kernels_compile_and_load_16_bytes_at_a_time():
    """For sm_80 and gfx942, without either; every element outside of the masked tail comes by a 16-byte load."""
    import os

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert int(line[-2]) == int(line[-1]), line


# --- what only a GPU can show -------------------------------------------------------------------------------------


def _gpu_training(**options):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((300, 70), (9,), (20_000,))]
    return parameters, hf_tam.AdaTAMW(parameters, capturable=True, **options)


def _set_gradients(parameters, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for parameter in parameters:
        fresh = torch.randn(parameter.shape, generator=generator, device="cuda")
        parameter.grad = fresh if parameter.grad is None else parameter.grad.copy_(fresh)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("renewed", [False, True])
def test_step_never_waits(renewed):
    parameters, optimizer = _gpu_training()
    for step in range(4):
        _set_gradients(parameters, step)
        torch.cuda.synchronize()
        if step:  # the first one compiles and pins memory
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if renewed:
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("moved_in_capture", [False, True])
def test_graph_replays_as_eager_steps(moved_in_capture):
    """Bitwise, also when gradients are allocated within the capture, and when an eager step comes in between."""
    runs = []
    for captured in (False, True):
        parameters, optimizer = _gpu_training(lr=torch.tensor(1e-3, device="cuda"))
        static = [torch.zeros_like(parameter) for parameter in parameters]

        def take(parameters=parameters, optimizer=optimizer, static=static):
            for parameter, gradient in zip(parameters, static, strict=True):
                parameter.grad = gradient + 0.0 if moved_in_capture else gradient
            optimizer.step()

        def fill(seed, static=static):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            for gradient in static:
                gradient.copy_(torch.randn(gradient.shape, generator=generator, device="cuda"))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                fill(step)
                take()
        torch.cuda.current_stream().wait_stream(stream)
        replay = take
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                take()
            replay = graph.replay
        for step in range(3, 8):
            fill(step)
            take() if step == 5 else replay()
        runs.append(parameters)
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_whole_step_takes_two_launches_on_the_device():
    entries = make_entries([torch.randn(size) for size in (1000, 1000, 5000)])
    scalars = torch.zeros(3, 3, device="cuda")
    skipped = torch.zeros((), dtype=torch.int64, device="cuda")
    backend.whole_adam(backend.bind(entries), scalars, PLAIN_STEP, skipped=skipped)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        backend.whole_adam(backend.bind(entries), scalars, PLAIN_STEP, skipped=skipped)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "kernel" in event.name]
    assert ["sums_kernel" in names[0], "adam_step_kernel" in names[1]] == [True, True]
    assert len(names) == 2, names


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    numel = 2**31 + 999
    fields = [torch.ones(numel, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    entry = Entry(
        index=0, owner=fields[0], param=fields[0], raw_grad=fields[1], state={}, first=fields[2], second=fields[3],
        coupled_decay=0.0, maximize=False,
    )  # fmt: skip
    assert backend.partial_sums([entry], with_dot=[True])[0].tolist() == [numel] * 4
    backend.update([entry], _coefficients(1))
    assert fields[0][0] == fields[0][-1] != 1.0
