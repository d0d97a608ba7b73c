"""`hf-tam bench`: the time and memory of an optimizer step beside torch's AdamW, measured here."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hf_tam.lab.bench.measuring import Settings
    from hf_tam.lab.bench.workloads import Workload

_DTYPES = ("float32", "bfloat16")
# torch is not imported to print a help text: these are hf_tam.lab.bench's own lists, which a test compares.
_OPTIMIZERS = (
    "adamw", "adamw-foreach", "adamw-loop", "adatamw", "adatamw-fused", "adatamw-foreach", "adatamw-single",
    "adatamw-bits16", "adatamw-bits16-state32", "adatam", "sgd", "tam",
    "pytorch_optimizer.AdaTAM", "bitsandbytes.AdamW8bit",
)  # fmt: skip
_WORKLOADS = ("lora-7b", "full-100m", "full-1b", "many-N", "many-groups")
_EPILOG = f"""\
workloads:   {", ".join(_WORKLOADS)}
             lora-7b: the LoRA tensors (r=16, all seven linear layers) of Llama-2-7B; full-100m: a Llama of 12 blocks
             of width 768; full-1b: Llama-3.2-1B; many-N: N tensors of 16 x 1024; many-groups: 465 param groups of one
             64 x 64 tensor each, with learning rates of their own (many-groups-28: 28)
optimizers:  {", ".join(_OPTIMIZERS[:7])},
             {", ".join(_OPTIMIZERS[7:])}
             (the last two where their packages are installed)

Every optimizer is timed in turns with its baseline: torch.optim.AdamW(fused=True), for tam torch.optim.SGD. A ratio is
the median of the ratios of the single pairs; its interval lies between two order statistics.
"""


class BenchError(Exception):
    """What was asked for cannot be measured here."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="time and memory of a step beside torch's AdamW",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", nargs="+", default=["lora-7b"], metavar="NAME", help="default: lora-7b")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=_DTYPES, help="of parameters and gradients")
    parser.add_argument("--device", help="cpu, cuda, ...; default: the accelerator if there is one")
    parser.add_argument("--threads", type=int, help="for each process; default: the cores, shared by the processes")
    parser.add_argument("--processes", type=int, default=1, help="shard by FSDP2 over so many; default: no sharding")
    parser.add_argument(
        "--processes-fresh",
        type=int,
        default=1,
        metavar="N",
        help="measure in N new processes, one after the other: one keeps the luck that it has with its memory",
    )
    parser.add_argument("--rounds", type=int, default=25, help="timed pairs for each optimizer; default: 25")
    parser.add_argument("--clip", action="store_true", help="clip gradients, inside the step or by clip_grad_norm_")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="default: all but bitsandbytes'")
    parser.add_argument("--against", metavar="NAME", help="compare all with this optimizer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw times included")
    parser.set_defaults(command=bench)


def bench(parsed: argparse.Namespace) -> int:
    """Measure, print a table for each workload and dtype, and write the file.

    Returns:
        1 if something failed while it ran, 2 if what was asked for cannot be measured here, else 0.
    """
    from hf_tam.lab.bench.machine import describe_machine, load_average
    from hf_tam.lab.bench.printing import describe_run, table
    from hf_tam.lab.bench.processes import run_workload

    try:
        settings, plan = _plan(parsed)
    except BenchError as error:
        print(f"hf-tam bench: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"command": _command(parsed, settings), "machine": describe_machine(), "runs": []}
    load = load_average()
    if load is not None and load[0] > 0.5 * (os.cpu_count() or 1):
        print(
            f"hf-tam bench: other jobs are running (load average {load[0]}): take the ratios as rough", file=sys.stderr
        )
    for workload, dtype in plan:
        facts: dict[str, Any] = {
            "workload": workload.name,
            "tensors": len(workload.shapes),
            "elements": workload.num_elements,
            "dtype": str(dtype).removeprefix("torch."),
            "device": settings.device,
            "threads": settings.threads,
            "processes": settings.processes,
            "rounds": settings.rounds,
            "clip": settings.clip,
            "fresh": settings.fresh,
        }
        print(describe_run(facts), flush=True)
        try:
            facts |= {"load_average_before": load_average(), **run_workload(workload, dtype, settings)}
        except RuntimeError as error:
            print(f"hf-tam bench: {workload.name}: {error}", file=sys.stderr)
            return 1
        report["runs"].append({**facts, "load_average_after": load_average()})
        print(f"{table(facts)}\n", flush=True)
        if parsed.json is not None:  # after each run: what follows may take long, or fail
            parsed.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _plan(parsed: argparse.Namespace) -> tuple[Settings, list[tuple[Workload, torch.dtype]]]:
    """Check everything before anything is measured.

    Raises:
        BenchError: It cannot be measured; says why and what to do.
    """
    import torch

    from hf_tam.lab.bench.measuring import Settings
    from hf_tam.lab.bench.workloads import find_workload

    for name in ("threads", "processes", "rounds", "processes_fresh"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            raise BenchError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    device = _device(parsed.device, parsed.processes)
    optimizers, against = _optimizers(parsed.optimizers, parsed.against)
    threads = parsed.threads or max(1, (os.cpu_count() or 1) // parsed.processes)
    settings = Settings(
        optimizers, against, device, threads, parsed.processes, parsed.rounds, parsed.clip, parsed.processes_fresh
    )
    try:
        workloads = [find_workload(name) for name in parsed.workload]
    except LookupError as error:
        raise BenchError(str(error.args[0])) from None
    plan = [(workload, getattr(torch, dtype)) for workload in workloads for dtype in parsed.dtype]
    for workload, dtype in plan:
        _require_memory(workload, dtype, settings)
    if parsed.json is not None and not (parsed.json.parent.is_dir() and os.access(parsed.json.parent, os.W_OK)):
        raise BenchError(f"--json {parsed.json}: {parsed.json.parent} is not a folder that can be written to")
    return settings, plan


def _device(name: str | None, num_processes: int) -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name in (None, "cpu"):
        return "cpu" if name or accelerator is None else accelerator.type
    if accelerator is None or accelerator.type != name:
        there = "cpu" if accelerator is None else f"cpu and {accelerator.type}"
        raise BenchError(f"--device {name}: torch {torch.__version__} finds no such device here; there is {there}")
    if num_processes > torch.accelerator.device_count():
        raise BenchError(
            f"--processes {num_processes}: each needs a device, and there are {torch.accelerator.device_count()}"
        )
    return str(name)


def _optimizers(names: list[str] | None, against: str | None) -> tuple[tuple[str, ...], str | None]:
    from hf_tam.lab.bench.contenders import CONTENDERS, is_installed

    for name in [*(names or ()), *([against] if against else ())]:
        if name not in CONTENDERS:
            raise BenchError(f"no optimizer {name!r}: there are {', '.join(CONTENDERS)}")
        if not is_installed(CONTENDERS[name]):
            raise BenchError(f"{name} needs {CONTENDERS[name].package}: pip install {CONTENDERS[name].package}")
    chosen = names or [
        name for name in CONTENDERS if not name.startswith("bitsandbytes") and is_installed(CONTENDERS[name])
    ]
    return tuple(dict.fromkeys(chosen)), against


def _require_memory(workload: Workload, dtype: torch.dtype, settings: Settings) -> None:
    import torch

    from hf_tam.lab.bench.machine import available_memory
    from hf_tam.lab.bench.measuring import needed_memory

    available = available_memory(torch.device(settings.device))
    needed = needed_memory(workload, dtype, settings)
    if settings.device != "cpu":
        needed //= settings.processes
    if available is not None and needed > available:
        raise BenchError(
            f"{workload.name} in {str(dtype).removeprefix('torch.')} needs {needed / 2**30:.1f} GiB of memory for "
            f"these optimizers, and {available / 2**30:.1f} GiB are free: name fewer --optimizers, or take bfloat16 "
            "or a smaller workload"
        )


def _command(parsed: argparse.Namespace, settings: Settings) -> str:
    """The command that does the same again, with what was left to us written out."""
    words = ["hf-tam", "bench", "--workload", *parsed.workload, "--dtype", *parsed.dtype, "--device", settings.device]
    for name in ("threads", "processes", "rounds"):
        words += [f"--{name}", str(getattr(settings, name))]
    words += ["--clip"] if settings.clip else []
    words += ["--processes-fresh", str(settings.fresh)] if settings.fresh > 1 else []
    words += ["--optimizers", *settings.optimizers]
    words += ["--against", settings.against] if settings.against else []
    words += ["--json", str(parsed.json)] if parsed.json else []
    return shlex.join(words)
