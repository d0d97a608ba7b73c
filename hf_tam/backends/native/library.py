"""`kernels.c` and what it includes, compiled for this CPU at first use and kept in the user's cache.

Compiled with the C compiler that is there (`$CC`, else cc, gcc or clang: what Triton and torch.compile need too), for
the instruction set that torch has found, which is part of the file's name: a home folder may be shared by machines.
Where there is no compiler, or it fails, the caller does without.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["SWITCH", "load", "why_not"]

SWITCH = "HF_TAM_NATIVE"
"""Set it to 0 to use torch's kernels."""

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
# Those of torch.backends.cpu.get_cpu_capability(), spelt out: compilers before gcc 11 and clang 12 do not know
# x86-64-v3 and v4, zig has other names for them, and they stand for instructions that torch does not look for.
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_BFLOAT16 = ("-mavx512bf16",)
_TIMEOUT = 120.0
"""Seconds for the compiler, which takes less than one."""


class _Unavailable(Exception):
    pass


def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had; `why_not` then says why."""
    return _load()[0]


def why_not() -> str:
    """One line on why there is no library; empty if there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get(SWITCH) == "0":
        return None, f"switched off by {SWITCH}=0"
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (_Unavailable, OSError) as error:
        return None, str(error)
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.hf_tam_sums.argtypes = [address, count, count, address]
    library.hf_tam_step.argtypes = [address, count, count, address, address, address]
    for update in (library.hf_tam_adam, library.hf_tam_sgd):
        update.argtypes = [address, count, count, address, ctypes.c_double]
    return library, ""


def _compiled() -> Path:
    """The shared library, compiled if it is not in the cache."""
    if os.name != "posix":
        raise _Unavailable(f"not built on {platform.system()}")
    compiler = _compiler()
    *better, last = _instruction_sets()
    for instruction_set in better:
        with contextlib.suppress(_Unavailable):
            return _compiled_with(compiler, instruction_set)
    return _compiled_with(compiler, last)


def _compiled_with(compiler: list[str], instruction_set: tuple[str, ...]) -> Path:
    flags = [*_FLAGS, *instruction_set]
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    ingredients = [*sources, platform.system(), platform.machine(), *compiler, *flags]
    folder = _cache_folder()
    path = folder / f"kernels-{hashlib.sha256(chr(0).join(ingredients).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        # Several ranks may do this at once: each writes a file of its own, and the last to finish replaces it.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            _run([*compiler, *flags, str(SOURCE), "-o", str(built), "-lm"])
            os.replace(built, path)
    return path


def _compiler() -> list[str]:
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise _Unavailable("no C compiler was found (cc, gcc, clang, or CC)")


def _instruction_sets() -> list[tuple[str, ...]]:
    """Flags, those that are tried first in front: the compiler, or its assembler, may be older than the CPU."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return [()]
    name = torch.backends.cpu.get_cpu_capability()
    if name == "AVX512":
        return [*([_AVX512 + _BFLOAT16] if _has_bfloat16() else []), _AVX512, _AVX2]
    return [_AVX2 if name == "AVX2" else ()]


def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for bf16; False with a torch that does not say."""
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))


def _cache_folder() -> Path:
    """Where the library is kept: a folder of the user's own, since what lies there is executed."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path("~/.cache").expanduser()) / "hf_tam"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a home that does not exist, or cannot be found
        pass
    temporary = tempfile.mkdtemp(prefix="hf_tam-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]} could not be run: {error}") from error
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), f"status {result.returncode}")
        raise _Unavailable(f"{command[0]} failed: {reason.strip()}")
