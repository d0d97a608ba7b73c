"""What only the compiler can show, and what only a GPU can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import hf_tam
from tests.handed import hand
from tests.triton_backend.support import DEVICE, backend, coefficients, make_tensors

COMPILE = """
import re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_tam.backends.triton import chunks, step_kernels, sums_kernels, update_kernels

POINTERS = {"chunk_places": "*i32", "keeps": "*u8", "scalars": "*fp32", "before": "*fp32", "skipped": "*i64",
            "keep": "*i1", "tensors": "*i64", "grads": "*i64"}
base = {"ALIGNED": True, "COUPLED": False, "MAXIMIZE": False}
whole = {"SKIP": True, "lrs": None}
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
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert int(line[-2]) == int(line[-1]), line


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
    tensors = make_tensors([torch.randn(size) for size in (1000, 1000, 5000)])
    scalars = torch.zeros(3, 3, device="cuda")
    skipped = torch.zeros((), dtype=torch.int64, device="cuda")
    backend.one_pass(tensors, scalars, skip_nonfinite=True, skipped=skipped)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        backend.one_pass(tensors, scalars, skip_nonfinite=True, skipped=skipped)
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
    tensors = hand(*([field] for field in fields))
    assert backend.partial_sums(tensors, with_dot=[True])[0].tolist() == [numel] * 4
    backend.update(tensors, coefficients(1))
    assert fields[0][0] == fields[0][-1] != 1.0
