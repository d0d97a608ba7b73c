"""The tables of docs/speed.md, from the bench-*.json files in this folder: `python -m recipes.results.speed`.

The ratios are taken again from the raw times of the files, which `hf-tam bench` wrote; what no file holds is said to
be not measured yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hf_tam.lab.bench.statistics import pair_ratio

FOLDER = Path(__file__).parent


class Bar(NamedTuple):
    """A line of the table: what is compared, under which settings, and what it should be.

    Attributes:
        what: The two that are compared.
        bar: For the ratio.
        where: Facts of a run that it must have.
        optimizer: Of the row.
        baseline: Of the row.
        times: Which ones of the row: those from idle to idle, or the device's alone.
    """

    what: str
    bar: str
    where: dict[str, Any]
    optimizer: str = "adatamw"
    baseline: str = "adamw"
    times: str = "seconds"


_CPU = {"device": "cpu", "processes": 1, "clip": False}
_CUDA = {**_CPU, "device": "cuda"}
_STEP = "step / `AdamW(fused=True)`"
_CLIPPED = "step that clips / `clip_grad_norm_` and `AdamW(fused=True)`"
BARS = (
    Bar(f"CPU: {_STEP}", "<= 1.6", {**_CPU, "workload": "lora-7b"}),
    Bar(f"CPU: {_STEP}", "<= 1.35", {**_CPU, "workload": "full-100m"}),
    Bar(f"CPU: {_STEP}", "<= 1.3", {**_CPU, "workload": "many-groups"}),
    Bar(f"CPU: {_CLIPPED}", "<= 1.1", {**_CPU, "workload": "lora-7b", "clip": True}),
    Bar(f"CPU: {_CLIPPED}", "<= 1.1", {**_CPU, "workload": "full-100m", "clip": True}),
    Bar("CPU: `pytorch_optimizer.AdaTAM` / step", ">= 10", {**_CPU, "workload": "lora-7b"},
        "pytorch_optimizer.AdaTAM", "adatamw"),
    Bar("CPU: `pytorch_optimizer.AdaTAM` / step", ">= 10", {**_CPU, "workload": "full-100m"},
        "pytorch_optimizer.AdaTAM", "adatamw"),
    Bar(f"CPU, FSDP2 over 2 processes: {_STEP}", "<= 1.5", {**_CPU, "workload": "lora-7b", "processes": 2}),
    *(
        Bar(f"{where}: {what}", bar, {**_CUDA, "workload": workload, "clip": what is _CLIPPED}, times=times)
        for where, times in (("GPU, host and device", "seconds"), ("GPU, device alone", "device_seconds"))
        for what, workload, bar in (
            (_STEP, "lora-7b", "<= 1.10"), (_STEP, "full-1b", "<= 1.35"),
            (_CLIPPED, "lora-7b", "<= 1.0"), (_CLIPPED, "full-1b", "<= 1.0"),
        )
    ),
)  # fmt: skip


def table(folder: Path = FOLDER) -> str:
    """One line for each bar: the median ratio, between what it lies, and the load of the machine meanwhile.

    Args:
        folder: Where the files are.

    Returns:
        A Markdown table.
    """
    runs = list(_runs(folder))
    lines = ["| measured | workload | bar | fp32 | bf16 | load average |", "|---|---|---|---|---|---|"]
    for bar in BARS:
        found = {dtype: _find(runs, bar, dtype) for dtype in ("float32", "bfloat16")}
        loads = [run["load_average_after"][0] for run, _ in filter(None, found.values()) if run["load_average_after"]]
        load = " to ".join(dict.fromkeys(f"{value:.1f}" for value in (min(loads), max(loads)))) if loads else ""
        cells = [_cell(pair, bar) for pair in found.values()]
        lines.append(f"| {bar.what} | {bar.where['workload']} | {bar.bar} | {' | '.join(cells)} | {load} |")
    return "\n".join(lines)


def growth(folder: Path = FOLDER) -> str:
    """How a sharded step grows with the number of tensors (16 x 1024 each): the `many-N` runs over 2 processes.

    Args:
        folder: Where the files are.

    Returns:
        A Markdown table; empty if nothing was measured.
    """
    runs = [run for run in _runs(folder) if run["workload"].startswith("many-") and run["processes"] == 2]
    lines = ["| tensors | ms a step, `AdamW(fused=True)` | ms a step, AdaTAMW | ratio |", "|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: run["tensors"]):
        for row in run["rows"]:
            times = [f"{1e3 * median(row[name]):.1f}" for name in ("baseline_seconds", "seconds")]
            lines.append(f"| {run['tensors']:,} | {' | '.join(times)} | {_ratio(row)} |")
    return "\n".join(lines) if runs else ""


def inside_the_trainer(folder: Path = FOLDER) -> str:
    """Tokens per second inside the Trainer, from `recipes.results.trainer_speed`.

    Args:
        folder: Where its bench-trainer.json and bench-trainer-gpu.json are.

    Returns:
        A Markdown table; says where nothing was measured.
    """
    lines = [
        "| Trainer, LoRA by `sft.py` | bar | tokens per second, `adatamw` / `adamw_torch_fused` |",
        "|---|---|---|",
    ]
    for where, name in (("CPU", "bench-trainer.json"), ("GPU", "bench-trainer-gpu.json")):
        path = folder / name
        if not path.is_file():
            lines.append(f"| {where} | >= 0.99 | not measured yet |")
            continue
        run = json.loads(path.read_text(encoding="utf-8"))
        rates = run["tokens_per_second"]
        ratio = pair_ratio(rates["adatamw"], rates["adamw_torch_fused"])
        pairs = f"{len(rates['adatamw'])} pairs of steps"
        what = f"{where}: {run['model']}; {run['tensors']} tensors, {run['elements'] / 1e6:.2f}M elements"
        lines.append(f"| {what} | >= 0.99 | {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}, {pairs}) |")
    return "\n".join(lines)


def _runs(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("bench-*.json")):
        yield from json.loads(path.read_text(encoding="utf-8")).get("runs", ())


def _find(runs: list[dict[str, Any]], bar: Bar, dtype: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The run and its row; the first, so that a second file for the same bar cannot be picked for its number."""
    for run in runs:
        if run["dtype"] == dtype and all(run[name] == value for name, value in bar.where.items()):
            for row in run["rows"]:
                if (row["optimizer"], row["baseline"]) == (bar.optimizer, bar.baseline):
                    return run, row
    return None


def _cell(found: tuple[dict[str, Any], dict[str, Any]] | None, bar: Bar) -> str:
    if found is None:
        return f"not measured yet{' (no GPU at hand)' if bar.where['device'] == 'cuda' else ''}"
    return _ratio(found[1], bar.times)


def _ratio(row: dict[str, Any], times: str = "seconds") -> str:
    """The ratio and how sure it is: over the processes where there are several, else over the pairs of the one."""
    if "process_ratios" in row and times == "seconds":
        found = row["process_ratios"]
        return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f}, {len(found)} processes)"
    mine = row[times]
    ratio = pair_ratio(mine, row[f"baseline_{times}"])
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}, {len(mine)} pairs)"


if __name__ == "__main__":
    print(table(), growth(), inside_the_trainer(), sep="\n\n")
