"""Where a workload's parameters lie: in this process, or sharded by FSDP2 over processes that are started for it."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_tam.lab.bench.measuring import Settings, Stand, local, measure
from hf_tam.lab.bench.workloads import Workload

__all__ = ["run_workload"]

_COLLECTIVE_TIMEOUT_S = 120
_WORLD_TIMEOUT_S = 3600
"""For all processes together: a measurement that takes longer is not one."""


def run_workload(workload: Workload, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    """Measure a workload.

    Communication: with settings.processes > 1 that of the steps, in processes that are started and reaped here. With
    settings.fresh > 1 everything is measured in so many new processes, for one keeps to its end the luck that it has
    with the places of its memory.

    Returns:
        Plain data for the JSON file; see `measure`.

    Raises:
        RuntimeError: A process failed, or they took too long.
    """
    if settings.fresh > 1:
        return _over_processes([_run_processes(workload, dtype, settings) for _ in range(settings.fresh)])
    if settings.processes > 1:
        return _run_processes(workload, dtype, settings)
    return _run_here(workload, dtype, settings)


def _over_processes(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for each pair, that of the process with the median ratio, which has the ratios of all processes."""
    first = results[0]
    rows = []
    for place in range(len(first["rows"])):
        found = sorted((result["rows"][place] for result in results), key=lambda row: row["ratio"]["median"])
        ratios = [row["ratio"]["median"] for row in found]
        rows.append({**found[(len(found) - 1) // 2], "process_ratios": ratios})
    return {**first, "rows": rows}


def _run_here(workload: Workload, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    params = [nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype)) for shape in workload.shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return measure(Stand(list(params), device), workload, settings)


def _run_processes(workload: Workload, dtype: torch.dtype, settings: Settings) -> dict[str, Any]:
    # Spawned: a forked child could use neither an accelerator nor torch's thread pool.
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_serve, args=(rank, folder, workload, dtype, settings), daemon=True)
            for rank in range(settings.processes)
        ]
        try:
            for process in processes:
                process.start()
            _wait_for(processes, Path(folder))
            result: dict[str, Any] = torch.load(Path(folder, "result"), weights_only=True)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
    return result


def _wait_for(processes: list[Any], folder: Path) -> None:
    """Return when all have ended well; raise as soon as one has not, since the others may wait for it."""
    deadline = time.monotonic() + _WORLD_TIMEOUT_S
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the processes were not done after {_WORLD_TIMEOUT_S} s; try fewer --rounds")
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.exitcode:
            message = folder / f"error-{rank}"
            text = message.read_text() if message.exists() else f"it ended with status {process.exitcode}"
            raise RuntimeError(f"process {rank} failed: {text}")


def _serve(rank: int, folder: str, workload: Workload, dtype: torch.dtype, settings: Settings) -> None:
    """One rank, from start to end; the first one leaves the result."""
    try:
        run = _run_here(workload, dtype, settings) if settings.processes == 1 else None
        result = run or _measure_sharded(rank, folder, workload, dtype, settings)
        if rank == 0:
            torch.save(result, Path(folder, "result"))
    except BaseException as error:
        traceback.print_exc()
        Path(folder, f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        # At once: destroying the group, or its threads, could wait for the other ranks.
        os._exit(1)


def _measure_sharded(
    rank: int, folder: str, workload: Workload, dtype: torch.dtype, settings: Settings
) -> dict[str, Any]:
    from torch import distributed

    torch.set_num_threads(settings.threads)
    is_cpu = settings.device == "cpu"
    device = torch.device("cpu") if is_cpu else torch.device(settings.device, rank)
    if not is_cpu:
        torch.accelerator.set_device_index(rank)
    distributed.init_process_group(
        "gloo" if is_cpu else "nccl",
        store=distributed.FileStore(str(Path(folder, "store")), settings.processes),  # type: ignore[attr-defined]
        rank=rank,
        world_size=settings.processes,
        timeout=datetime.timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
    )
    try:
        params = _sharded_parameters(workload, dtype, device, settings.processes)
        return measure(Stand(params, device, _World(device)), workload, settings)
    finally:
        distributed.destroy_process_group()


def _sharded_parameters(workload: Workload, dtype: torch.dtype, device: torch.device, size: int) -> list[Tensor]:
    """Parameters as FSDP2 leaves them, with gradients that are cut as they are."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh  # type: ignore[attr-defined]

    mesh = init_device_mesh(device.type, (size,))
    # So that no process ever holds more than its part.
    with torch.device("meta"):
        module = nn.ParameterList(nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in workload.shapes)
    fully_shard(module, mesh=mesh)
    module.to_empty(device=device)
    params: list[Tensor] = list(module.parameters())
    for param in params:
        assert isinstance(param, DTensor)
        part = local(param).detach()
        part.normal_().mul_(0.02)
        grad = DTensor.from_local(
            torch.zeros_like(part), mesh, param.placements, shape=param.shape, stride=param.stride()
        )
        param.grad = grad
    return params


class _World:
    """All processes, over the default group."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def meet(self) -> None:
        torch.distributed.barrier()

    def slowest(self, seconds: list[float]) -> list[float]:
        times = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
        found: list[float] = times.tolist()
        return found
