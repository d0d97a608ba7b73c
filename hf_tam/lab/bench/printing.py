"""The table of a run on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

__all__ = ["describe_run", "table"]

_HEADER = (
    "optimizer",
    "ms",
    "beside",
    "ratio",
    "95% interval",
    "state MiB",
    "more B/tensor",
    "temp. MiB",
    "of a copy",
)


def describe_run(run: dict[str, Any]) -> str:
    """What was measured, in one line."""
    parts = [
        f"{run['workload']} ({run['tensors']} tensors, {run['elements'] / 1e6:.2f}M elements)",
        run["dtype"],
        run["device"],
        f"{run['threads']} thread{'s' * (run['threads'] > 1)}",
    ]
    if run["processes"] > 1:
        parts.append(f"FSDP2 over {run['processes']} processes")
    if run["clip"]:
        parts.append("with clipping")
    if run.get("fresh", 1) > 1:
        parts.append(f"{run['fresh']} fresh processes")
    return ", ".join(parts)


def table(run: dict[str, Any]) -> str:
    """One line for each optimizer, in plain columns; below it what was left out and why."""
    on_device = any("device_ratio" in row for row in run["rows"])
    header = (*_HEADER, "device ms", "ratio", "95% interval") if on_device else _HEADER
    several = any("process_ratios" in row for row in run["rows"])
    header = (*header, "over processes") if several else header
    lines = _columns(
        [
            header,
            *(
                _cells(row) + (_device_cells(row) if on_device else ()) + (_process_cells(row) if several else ())
                for row in run["rows"]
            ),
        ]
    )
    lines += [f"{name}: left out: {reason}" for name, reason in run["left_out"].items()]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = row["ratio"]
    interval = f"{ratio['low']:.2f} .. {ratio['high']:.2f}"
    if ratio["coverage"] < 0.95:
        interval += f" ({100 * ratio['coverage']:.0f}%)"
    share = row["share_of_copy"]
    temporary = row.get("largest_temporary_bytes")
    return (
        row["optimizer"],
        f"{1e3 * median(row['seconds']):.2f}",
        row["baseline"],
        f"{ratio['median']:.2f}",
        interval,
        f"{row['state_bytes'] / 2**20:.1f}",
        f"{row['extra_bytes_per_tensor']:+,.0f}",
        "-" if temporary is None else f"{temporary / 2**20:.2f}",
        "-" if share is None else f"{100 * share:.0f}%",
    )


def _device_cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = row["device_ratio"]
    interval = f"{ratio['low']:.2f} .. {ratio['high']:.2f}"
    return f"{1e3 * median(row['device_seconds']):.3f}", f"{ratio['median']:.2f}", interval


def _process_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The median of the processes' ratios, the least and the largest."""
    ratios = row["process_ratios"]
    return (f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
