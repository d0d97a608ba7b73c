"""Whether there are other processes."""

from __future__ import annotations

import torch


def several_processes() -> bool:
    """Whether this process trains together with others. No communication."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
