"""`kernels.c` and what it includes, compiled for this CPU at first use and kept in the user's cache.

Compiled with the C compiler that is there (`$CC`, else cc, gcc or clang: what Triton and torch.compile need too), for
the instruction set that torch has found, which is part of the file's name: a home folder may be shared by machines.
Where there is no compiler, or it fails, the caller does without.

What lies in the cache is executed. So it is taken from there only if nobody else can have written it, and if it is
what was written: its digest is part of the name too. Otherwise it is compiled anew, in a temporary folder where the
cache cannot be used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from hf_tam.backends.native import private
from hf_tam.update import Numbers

__all__ = ["SWITCH", "load", "why_not", "why_not_kept"]

SWITCH = "HF_TAM_NATIVE"
"""Set it to 0 to use torch's kernels."""

SOURCE = Path(__file__).with_name("kernels.c")
_NUMBERS = f"-DNUMBERS={','.join(Numbers._fields)}"
# c11 and not gnu11: with it gcc does not contract products and sums, whose bits would then depend on the instruction
# set. Without errno a root is one instruction, without traps a branch becomes a mask. Not -ffast-math: it takes NaN
# and Inf for impossible, by which gradients are judged here.
_FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread", _NUMBERS)
# Those of torch.backends.cpu.get_cpu_capability(), spelt out: compilers before gcc 11 and clang 12 do not know
# x86-64-v3 and v4, zig has other names for them, and they stand for instructions that torch does not look for.
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_BFLOAT16 = ("-mavx512bf16",)
_TIMEOUT = 300.0
"""Seconds for the compiler, which takes about one; a hundred on a machine that is overloaded."""
_ROOM = 1 << 20
"""Bytes; what it writes, with its own temporary files, is half of that."""


class _UnavailableError(Exception):
    """There is no use in trying again."""


class _CompilerError(Exception):
    """The compiler has refused these flags, or anything."""


class _Outcome(NamedTuple):
    library: ctypes.CDLL | None
    why_not: str = ""
    why_not_kept: str = ""


def load() -> ctypes.CDLL | None:
    """The library, or None where it cannot be had; `why_not` then says why."""
    return _load().library


def why_not() -> str:
    """One line on why there is no library; empty if there is one."""
    return _load().why_not


def why_not_kept() -> str:
    """One line on why the library was compiled for this process alone; empty if it is in the cache."""
    return _load().why_not_kept


@functools.cache
def _load() -> _Outcome:
    if os.environ.get(SWITCH) == "0":
        return _Outcome(None, f"switched off by {SWITCH}=0")
    try:
        return _find_or_compile()
    except Exception as error:  # whatever it is: a step can do without
        return _Outcome(None, _one_line(error))


def _find_or_compile() -> _Outcome:
    if os.name != "posix":
        raise _UnavailableError(f"not built on {platform.system()}")
    compiler = _compiler()
    try:
        folder = _cache_folder()
        private.create(folder)
        return _in_folder(folder, compiler)
    except _UnavailableError:
        raise
    except Exception as error:
        reason = _one_line(error)
    # It is the folder: full, read-only, of another user, on a disk from which nothing may be executed.
    try:
        with tempfile.TemporaryDirectory(prefix="hf_tam-", ignore_cleanup_errors=True) as temporary:
            return _in_folder(Path(temporary), compiler)._replace(why_not_kept=reason)
    except _UnavailableError:
        raise
    except Exception as error:
        raise _UnavailableError(f"{reason}; in a temporary folder: {_one_line(error)}") from error


def _compiler() -> list[str]:
    if chosen := os.environ.get("CC", "").strip():
        if shutil.which(chosen):  # others take it for one path, which may have blanks and quotes in it
            return [chosen]
        try:
            return shlex.split(chosen)
        except ValueError as error:
            raise _UnavailableError(f"CC={chosen} is no command: {error}") from error
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise _UnavailableError("no C compiler was found (cc, gcc, clang, or CC)")


def _cache_folder() -> Path:
    # The specification says to ignore what is relative: it would be a folder of whatever is the working folder.
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not chosen.is_absolute():
        chosen = Path("~/.cache").expanduser()
    if not chosen.is_absolute():
        raise OSError(f"the home folder is a relative path: {chosen.parent}")
    return chosen / "hf_tam"


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


def _in_folder(folder: Path, compiler: list[str]) -> _Outcome:
    """The library from this folder, compiled if it is not there."""
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(f"{folder} is on a disk that is mounted noexec")
    with private.enter(folder) as entered:
        for instruction_set in _instruction_sets():
            try:
                return _found(entered, compiler, instruction_set) or _compiled(entered, compiler, instruction_set)
            except _CompilerError as error:
                refusal = str(error)
    raise _UnavailableError(refusal)


def _stem(compiler: list[str], instruction_set: tuple[str, ...]) -> str:
    """The beginning of the file's name: all that decides what is compiled, and whether it can be loaded."""
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    surroundings = [platform.system(), platform.machine(), *platform.libc_ver(), *compiler, *_FLAGS, *instruction_set]
    ingredients = [*sources, *map(os.fsencode, surroundings)]
    return f"kernels-{hashlib.sha256(bytes(1).join(ingredients)).hexdigest()[:16]}-"


def _found(folder: Path, compiler: list[str], instruction_set: tuple[str, ...]) -> _Outcome | None:
    stem = _stem(compiler, instruction_set)
    for path in sorted(folder.glob(f"{stem}*.so")):
        try:
            if hashlib.sha256(private.read(path)).hexdigest() == path.stem.removeprefix(stem):
                return _Outcome(_opened(path))
        except (OSError, AttributeError):  # gone again, or of no use on this machine
            pass
        path.unlink(missing_ok=True)  # or cut off, or changed
    return None


def _compiled(folder: Path, compiler: list[str], instruction_set: tuple[str, ...]) -> _Outcome:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        # The loader takes files of one name for one file, so no two are called the same.
        built = Path(scratch, f"{Path(scratch).name}.so")
        built.write_bytes(bytes(_ROOM))  # on a full disk, the compiler's failure would tell less
        built.unlink()
        _run([*compiler, *_FLAGS, *instruction_set, str(SOURCE), "-o", str(built), "-lm"], temporary=scratch)
        if not built.is_file():
            raise _CompilerError(f"{compiler[0]} reported success, and wrote no library")
        _try_out(built, compiler)
        try:
            library = _opened(built)
        except AttributeError as error:
            raise _UnavailableError(f"what {compiler[0]} wrote is not this library: {error}") from error
        try:
            _keep(built, folder, _stem(compiler, instruction_set))
        except OSError as error:
            return _Outcome(library, why_not_kept=_one_line(error))
    return _Outcome(library)


def _try_out(built: Path, compiler: list[str]) -> None:
    """Have another process load it: one that is cut off, or built with `-fsanitize=address`, would end this one."""
    harmless = shutil.which("true")
    if not harmless:
        return
    preloaded = f"{os.environ.get('LD_PRELOAD', '')} {built}"  # a path with blanks in it is passed over
    try:
        _run([harmless], temporary=str(built.parent), LD_PRELOAD=preloaded)
    except _CompilerError as error:
        raise _UnavailableError(f"what {compiler[0]} wrote ends the process that loads it: {error}") from error


def _keep(built: Path, folder: Path, stem: str) -> None:
    """Several ranks may do this at once: each has a file of its own, and the last replaces what is the same."""
    built.chmod(0o700)  # by the umask, others might be allowed to write to it
    with open(built, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
        os.fsync(file.fileno())  # or the name might reach the disk before the content
    os.replace(built, folder / f"{stem}{digest}.so")
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    # Without these ctypes passes an int as one of C's, which cuts addresses to 32 bits.
    address, count, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.hf_tam_sums.argtypes = [address, count, count, address]
    library.hf_tam_step.argtypes = [address, count, count, address, flag, flag, address, address]
    library.hf_tam_scalar_stage.argtypes = [count, address, flag, address, address, address, address]
    for update in (library.hf_tam_adam, library.hf_tam_sgd):
        update.argtypes = [address, count, count, address, ctypes.c_double]
    return library


def _run(command: list[str], *, temporary: str, **environment: str) -> None:
    """Run a command with its own temporary files in `temporary`, and its messages in English."""
    environment = {**os.environ, "TMPDIR": temporary, "LC_ALL": "C", **environment}
    # Not a pipe: what a wrapper leaves running in the background would hold it open.
    with open(Path(temporary, "messages"), "w+b") as messages:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,  # what a compiler asks for is not to be read from the program's input
                stdout=subprocess.DEVNULL,
                stderr=messages,
                env=environment,
                start_new_session=True,  # a group, which can be ended with all that it has started
            )
        except OSError as error:
            raise _UnavailableError(f"{command[0]} could not be run: {error}") from error
        with process:
            try:
                status = process.wait(_TIMEOUT)
            except BaseException as error:  # Ctrl-C too: what it has started itself must end with it
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise _UnavailableError(f"{command[0]} was stopped after {_TIMEOUT:.0f} seconds") from error
                raise
        if status != 0:
            messages.seek(0)
            lines = messages.read(1 << 16).decode(errors="backslashreplace").splitlines()
            errors = [line for line in lines if "error" in line.lower()]
            raise _CompilerError(f"{command[0]} failed: {[*errors, *reversed(lines), f'status {status}'][0]}")


def _one_line(error: Exception) -> str:
    """What can be printed anywhere, whatever bytes a path or a message has."""
    text = str(error) or type(error).__name__
    text = text.encode(errors="backslashreplace").decode()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
