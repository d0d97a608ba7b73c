"""Tells our optimizers which module owns their parameters, after `Accelerator.prepare` has wrapped it.

Wrappers put other parameters in the place of the user's (FSDP2) or keep slices of them (FSDP1); only the prepared
module knows. What is relied on: `Accelerator.prepare`, its list `_models` of what was prepared before, and `optimizer`
of the AcceleratedOptimizer it returns.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from types import ModuleType
from typing import Any

TESTED_RANGE = ">=1.12,<2"

patched: list[str] = []


def register(module: ModuleType) -> None:
    """Patch `accelerate.accelerator`, freshly imported.

    Raises:
        ImportError: If it lacks a name that is relied on; says which, and the range of versions that was tested.
    """
    accelerator = getattr(module, "Accelerator", None)
    if not hasattr(accelerator, "prepare"):
        raise ImportError(
            f"hf_tam cannot follow Accelerator.prepare: accelerate {version('accelerate')} has none. It was tested "
            f"with accelerate{TESTED_RANGE}: install one of those."
        )
    original = accelerator.prepare  # type: ignore[union-attr]

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, *args, **kwargs)
        objects = prepared if isinstance(prepared, tuple) else (prepared,)
        for item in objects:
            _attach(getattr(item, "optimizer", item), self._models)
        return prepared

    accelerator.prepare = prepare  # type: ignore[union-attr]
    patched.append("Accelerator.prepare")


def _attach(optimizer: Any, models: list[Any]) -> None:
    """Attach the models that own parameters of `optimizer`, if it is one of ours."""
    from torch.nn.parallel import DistributedDataParallel

    from hf_tam.torque_aware import TorqueAware

    if not isinstance(optimizer, TorqueAware):
        return
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for model in models:
        if any(id(param) in held for param in model.parameters()):
            # DDP keeps the user's module as it is, and with it the names the user knows.
            optimizer.attach(model.module if isinstance(model, DistributedDataParallel) else model)
