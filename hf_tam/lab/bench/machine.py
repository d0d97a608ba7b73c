"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hf_tam._version import __version__

__all__ = ["available_memory", "describe_machine", "load_average"]

_PACKAGES = ("torch", "triton", "pytorch_optimizer", "bitsandbytes")


def describe_machine() -> dict[str, Any]:
    """CPU, accelerator and versions, for the JSON file."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": accelerator,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"hf-tam": __version__, **{name: found for name in _PACKAGES if (found := _version_of(name))}},
        "load_average": load_average(),
    }


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes, where the system tells: a busy machine makes noisy numbers."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where the system does not tell."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    for line in _lines_of("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _cpu_model() -> str:
    for line in _lines_of("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines_of(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:  # not Linux
        return []


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
