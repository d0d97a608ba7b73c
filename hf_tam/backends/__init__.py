"""How a step is executed. Every backend computes the same step; they differ in how many passes and launches it takes.

| module | sums | update | chosen |
|---|---|---|---|
| `single` | one tensor at a time, fp64 | one tensor at a time, plain torch operations | `foreach=False, fused=False` |
| `foreach` | as `single` | `torch._foreach_*` | `foreach=True`, and by default on accelerators without Triton |
| `native` | one call | one call, or with the sums | `fused=True`, and by default on the CPU with a C compiler |
| `torch_fused` | cached chunks | torch's vectorised fused kernels | the same, where there is no C compiler |
| `triton` | one launch | one launch, also of the whole step | `fused=True`, by default on CUDA, ROCm and XPU |

A backend is a module with the functions of the `Backend` protocol. Nothing here communicates.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch

from hf_tam.backends.protocol import Backend, Report
from hf_tam.backends.tensors import Tensors
from hf_tam.update import accumulator_dtype

__all__ = ["Backend", "Report", "Tensors", "select_backend"]


def select_backend(device: torch.device, *, foreach: bool | None, fused: bool | None, on_host: bool) -> Backend:
    """The backend for the tensors on `device`.

    Args:
        device: Where the parameters are.
        foreach: The constructor's argument; None leaves the choice to us.
        fused: The constructor's argument; None leaves the choice to us.
        on_host: Whether the step's scalars may be Python numbers (the CPU, without `capturable`).

    Raises:
        RuntimeError: `fused=True` where no fused kernel is at hand.
    """
    from hf_tam.backends import foreach as multi_tensor
    from hf_tam.backends import native, single, torch_fused

    if not on_host and (fused or (fused is None and foreach is None)) and _runs_triton(device):
        from hf_tam.backends import triton

        return triton
    if fused and not on_host:
        where = "capturable=True on the CPU" if device.type == "cpu" else f"the device {device}"
        remedy = "pip install triton, or " if device.type in _TRITON_DEVICES else ""
        raise RuntimeError(f"`fused=True` has no kernel for {where}; {remedy}leave fused=None (foreach is used)")
    if fused or (fused is None and foreach is None and on_host):
        return native if native.is_available() else torch_fused
    if foreach or (foreach is None and fused is None):
        if not foreach and device.type in _TRITON_DEVICES and not _has_triton():
            _warn_of_missing_triton(device.type)
        return multi_tensor
    return single


_TRITON_DEVICES = ("cuda", "xpu")  # torch calls ROCm's devices cuda too


def _runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels can be compiled for `device`, which must have fp64 for their sums."""
    return device.type in _TRITON_DEVICES and _has_triton() and accumulator_dtype(device) == torch.float64


@functools.cache
def _warn_of_missing_triton(device_type: str) -> None:
    warnings.warn(
        f"triton is not installed: on {device_type} the optimizer takes about 25 small operations a tensor instead of "
        'two launches in all, which is many times slower; pip install "hf-tam[triton]" (foreach=True silences this)',
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
