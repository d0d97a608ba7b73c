"""Interleaved rounds of optimizer steps on one stand: the parameters and gradients that all contenders share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_tam.lab.bench.contenders import CONTENDERS, MAX_GRAD_NORM, Contender, layerwise
from hf_tam.lab.bench.statistics import pair_ratio
from hf_tam.lab.bench.workloads import Workload

__all__ = ["Ranks", "Settings", "Stand", "local", "measure", "needed_memory", "state_bytes"]

_WARM_UP_STEPS = 3
_POOL_SLACK = 4096
_COPY_BYTES = 1 << 28
"""Of the tensor whose copy tells what the memory gives: far larger than any cache."""
_FASTEST_COPY_S = 5e-5
"""No memory copies `_COPY_BYTES` in less (10 TB/s, read and written)."""


@dataclass(frozen=True)
class Settings:
    """What is common to all workloads of a run.

    Attributes:
        optimizers: Names of contenders.
        against: Name of the contender that all are compared with; None: each one's own baseline.
        device: As torch writes it.
        threads: For torch's operations on the CPU, in each process.
        processes: Over which parameters are sharded; 1: no sharding.
        rounds: Timed pairs for each contender.
        clip: Whether gradients are clipped, by the optimizer or by torch before it.
        fresh: In how many processes, started one after the other, everything is measured again.
    """

    optimizers: tuple[str, ...]
    against: str | None
    device: str
    threads: int
    processes: int
    rounds: int
    clip: bool
    fresh: int = 1

    def pairs(self) -> list[tuple[str, str]]:
        """Contenders with their baselines."""
        pairs = [(name, self.against or CONTENDERS[name].baseline) for name in self.optimizers]
        return [(name, baseline) for name, baseline in pairs if name != baseline] or pairs


def needed_memory(workload: Workload, dtype: torch.dtype, settings: Settings) -> int:
    """Bytes that all processes of a run allocate together, in parameters, gradients and states."""
    names = {name for pair in settings.pairs() for name in pair}
    copies = 2 + sum(CONTENDERS[name].moments for name in names)
    # the pool that gradients are filled from, and what a step may allocate for a while
    largest = 3 * workload.largest * settings.processes
    return (workload.num_elements * copies + largest) * dtype.itemsize + 2 * _COPY_BYTES * settings.processes


class Ranks(Protocol):
    """What measuring needs of the processes that step together."""

    def meet(self) -> None:
        """Return when all are here."""

    def slowest(self, seconds: list[float]) -> list[float]:
        """Each time that of the slowest process: a step is over when all are done."""


class Stand:
    """Parameters and their gradients.

    Args:
        params: With `.grad` allocated; all of one dtype and on one device. DTensors are stepped as they are.
        device: Where they are.
        ranks: The processes that step together; None: this one alone.
    """

    def __init__(self, params: list[Tensor], device: torch.device, ranks: Ranks | None = None) -> None:
        """Allocate a pool of random numbers that is a little longer than the largest gradient."""
        self.params = params
        self.device = device
        self.ranks = ranks
        grads = [param.grad for param in params if param.grad is not None]
        self._grads = [local(grad) for grad in grads]
        size = max(grad.numel() for grad in self._grads) + _POOL_SLACK
        self._pool = torch.randn(size, dtype=params[0].dtype, device=device)
        self._num_fills = 0

    def fill(self) -> None:
        """Write gradients that differ from those of the last step, as a backward pass would."""
        self._num_fills += 1
        for index, grad in enumerate(self._grads):
            start = (97 * index + 1009 * self._num_fills) % _POOL_SLACK
            grad.copy_(self._pool[start : start + grad.numel()].view_as(grad))

    def time_step(self, optimizer: Optimizer, *, clip: bool) -> float:
        """Seconds of one step, from idle device to idle device; filling the gradients is left out.

        Args:
            optimizer: Steps the parameters.
            clip: Whether torch clips before.
        """
        self.fill()
        self.wait()
        if self.ranks is not None:
            self.ranks.meet()
        start = time.perf_counter()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        optimizer.step()
        self.wait()
        return time.perf_counter() - start

    def time_on_device(self, optimizer: Optimizer, *, clip: bool, host_seconds: float) -> float:
        """Seconds that an accelerator works on one step: what a training loop waits for whose host runs ahead.

        Args:
            optimizer: Steps the parameters.
            clip: Whether torch clips before.
            host_seconds: About as long as the host takes to launch the step. The device is kept busy for longer.
        """
        self.fill()
        source = torch.empty(_COPY_BYTES // 4, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        for _ in range(1 + int(2 * host_seconds / _FASTEST_COPY_S)):
            target.copy_(source)
        start.record()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        optimizer.step()
        end.record()
        self.wait()
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        """Wait for the accelerator, if there is one."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def time_copy(self) -> float:
        """Bytes a second, read and written, of a plain copy."""
        source = torch.empty(_COPY_BYTES // 4, dtype=torch.float32, device=self.device).fill_(1.0)
        target = torch.empty_like(source)
        times = []
        for _ in range(7):
            self.wait()
            start = time.perf_counter()
            target.copy_(source)
            self.wait()
            times.append(time.perf_counter() - start)
        # Without the first copy, for which the system has yet to find the pages of the target.
        return 2 * _COPY_BYTES / median(times[1:])


@dataclass
class _Runner:
    """A contender that is ready to step."""

    contender: Contender
    optimizer: Optimizer
    clip: bool
    temporaries: dict[str, int]

    @classmethod
    def warm_up(cls, stand: Stand, contender: Contender, *, clip: bool, grouped: bool) -> _Runner:
        """Build it, create its states, and look at what a step allocates."""
        inside = clip and contender.clips
        options = {"max_grad_norm": MAX_GRAD_NORM} if inside else {}
        optimizer = contender.make(layerwise(stand.params) if grouped else stand.params, **options)
        runner = cls(contender, optimizer, clip and not inside, {})
        for _ in range(_WARM_UP_STEPS):
            runner.time(stand)
        runner.temporaries = _temporaries(lambda: runner.time(stand), stand.device)
        return runner

    def time(self, stand: Stand) -> float:
        return stand.time_step(self.optimizer, clip=self.clip)

    def time_on_device(self, stand: Stand, host_seconds: float) -> float:
        return stand.time_on_device(self.optimizer, clip=self.clip, host_seconds=host_seconds)


def measure(stand: Stand, workload: Workload, settings: Settings) -> dict[str, Any]:
    """Time every contender beside its baseline.

    In each round each pair steps once, baseline and contender one right after the other and in alternating order, so
    that whatever else the machine does, and however it drifts, meets both alike.

    On an accelerator there are two times: `seconds` from idle device to idle device, launching by the host included,
    and `device_seconds`, that of the device alone.

    Returns:
        Plain data for the JSON file: `copy_bytes_per_second`, `rows` and `left_out`.
    """
    runners, left_out = _prepare(stand, settings, grouped=workload.grouped)
    pairs = [(name, baseline) for name, baseline in settings.pairs() if {name, baseline} <= runners.keys()]
    copies = [stand.time_copy()]
    seconds = _in_turns(pairs, settings.rounds, lambda name: runners[name].time(stand))
    on_device: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    if stand.device.type != "cpu":
        host = {name: max(times) for pair in pairs for name, times in zip(pair, seconds[pair], strict=True)}
        on_device = _in_turns(pairs, settings.rounds, lambda name: runners[name].time_on_device(stand, host[name]))
    copies.append(stand.time_copy())
    if stand.ranks is not None:
        slowest = stand.ranks.slowest
        seconds, on_device = (
            {pair: (slowest(mine), slowest(theirs)) for pair, (mine, theirs) in times.items()}
            for times in (seconds, on_device)
        )
    copy_rate = sum(copies) / len(copies)
    rows = [
        _row(pair, [runners[name] for name in pair], seconds[pair], workload, copy_rate * settings.processes, settings)
        for pair in pairs
    ]
    for row, times in zip(rows, on_device.values(), strict=False):
        row["device_seconds"], row["baseline_device_seconds"] = times
        row["device_ratio"] = pair_ratio(*times)._asdict()
    return {"copy_bytes_per_second": copy_rate, "rows": rows, "left_out": left_out}


def _in_turns(
    pairs: Sequence[tuple[str, str]], rounds: int, time_of: Callable[[str], float]
) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Times of both of each pair, round by round."""
    seconds: dict[tuple[str, str], tuple[list[float], list[float]]] = {pair: ([], []) for pair in pairs}
    for number in range(rounds):
        for name, baseline in pairs:
            mine, theirs = seconds[name, baseline]
            order = [(theirs, baseline), (mine, name)]
            for times, runner in order if number % 2 == 0 else reversed(order):
                times.append(time_of(runner))
    return seconds


def _prepare(stand: Stand, settings: Settings, *, grouped: bool) -> tuple[dict[str, _Runner], dict[str, str]]:
    runners, left_out = {}, {}
    for name in dict.fromkeys(name for pair in settings.pairs() for name in reversed(pair)):
        try:
            runners[name] = _Runner.warm_up(stand, CONTENDERS[name], clip=settings.clip, grouped=grouped)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            # Not every backend exists for every device; whoever is left out is printed with the reason.
            left_out[name] = next(iter(str(error).splitlines()), "") or type(error).__name__
    return runners, left_out


def _row(
    pair: tuple[str, str],
    runners: Sequence[_Runner],
    seconds: tuple[list[float], list[float]],
    workload: Workload,
    copy_rate: float,
    settings: Settings,
) -> dict[str, Any]:
    contender = runners[0].contender
    mine, theirs = (state_bytes(runner.optimizer) for runner in runners)
    itemsize = next(iter(runners[0].optimizer.param_groups[0]["params"])).dtype.itemsize
    accesses = contender.accesses_with(clip=settings.clip)
    moved = None if accesses is None else accesses * workload.num_elements * itemsize
    return {
        "optimizer": pair[0],
        "baseline": pair[1],
        "seconds": seconds[0],
        "baseline_seconds": seconds[1],
        "ratio": pair_ratio(*seconds)._asdict(),
        "state_bytes": mine,
        "baseline_state_bytes": theirs,
        "extra_bytes_per_tensor": (mine - theirs) / len(workload.shapes),
        **{f"{name}_bytes": size for name, size in runners[0].temporaries.items()},
        **{f"baseline_{name}_bytes": size for name, size in runners[1].temporaries.items()},
        "moved_bytes": moved,
        "share_of_copy": None if moved is None else moved / median(seconds[0]) / copy_rate,
    }


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that an optimizer keeps between steps, those of this process; a storage that is shared counts once."""
    storages = {}
    for tensor in _tensors(optimizer.state.values()):
        storage = local(tensor).untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _temporaries(step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """The largest single allocation of a step, inside the operations too, and the most that is alive at one time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines for each use
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        step()
    found = _memory_events(profiler)
    if found is None:
        return {}
    events = [event for event in found if event[1] == device.type]
    alive = peak = 0
    for _, _, size in sorted(events):
        alive += size
        peak = max(peak, alive)
    return {"largest_temporary": max((size for *_, size in events), default=0), "peak_temporary": peak}


def _memory_events(profiler: Any) -> list[tuple[int, str, int]] | None:
    """Time, device and size (negative where memory is given back) of every allocation that a profiler saw."""
    try:  # private to torch, and the only place where single allocations are told apart
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return [
            (event.start_ns(), str(event.device_type()).rpartition(".")[2].lower(), event.nbytes()) for event in events
        ]
    except AttributeError:
        return None


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
