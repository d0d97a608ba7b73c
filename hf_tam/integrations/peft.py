"""Mends what peft does to adapters inside wrapped layers, for scripts that ask for it.

peft 0.21 goes by the names of modules. Inside a layer that FSDP1 or activation checkpointing has wrapped, these hold
the wrapper's name, and the names of weights do not. So an adapter is saved empty, and one loaded into an FSDP1 model
goes nowhere: all of it silently. What is relied on: `_get_tuner_state_dict_key_prefixes` in
`peft.tuners.tuners_utils` (0.21; earlier versions go by the names of weights), and `peft.set_peft_model_state_dict`,
which accelerate calls.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

# torch puts these into the names of modules, and takes them out of the names of weights.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

patched: list[str] = []


def find_wrapped_adapters() -> None:
    """Patch peft so that it saves and loads adapters inside wrapped layers. Idempotent."""
    import peft
    from peft.tuners import tuners_utils

    if patched:
        return
    if hasattr(tuners_utils, "_get_tuner_state_dict_key_prefixes"):
        tuners_utils._get_tuner_state_dict_key_prefixes = _without_wrappers(
            tuners_utils._get_tuner_state_dict_key_prefixes
        )
        patched.append("_get_tuner_state_dict_key_prefixes")
    peft.set_peft_model_state_dict = _into_fsdp1(peft.set_peft_model_state_dict)
    patched.append("set_peft_model_state_dict")


def _without_wrappers(find_prefixes: Callable[..., set[str]]) -> Callable[..., set[str]]:
    @functools.wraps(find_prefixes)
    def wrapped(*args: Any, **kwargs: Any) -> set[str]:
        return {_clean(prefix) for prefix in find_prefixes(*args, **kwargs)}

    return wrapped


def _into_fsdp1(set_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(set_state_dict)
    def wrapped(
        model: Any, peft_model_state_dict: dict[str, Any], adapter_name: str = "default", **kwargs: Any
    ) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not isinstance(model, FullyShardedDataParallel):
            return set_state_dict(model, peft_model_state_dict, adapter_name, **kwargs)
        trained = (_clean(name) for name, param in model.named_parameters() if param.requires_grad)
        names = {name.replace(f".{adapter_name}", ""): name for name in trained}
        state_dict = {names.get(key, key): value for key, value in peft_model_state_dict.items()}
        torch_logger = logging.getLogger("torch.distributed.fsdp._state_dict_utils")
        level = torch_logger.level
        torch_logger.setLevel(logging.ERROR)  # it warns of every frozen weight that it does not find
        try:
            return model.load_state_dict(state_dict, strict=False)
        finally:
            torch_logger.setLevel(level)

    return wrapped


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
