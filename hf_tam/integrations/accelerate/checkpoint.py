"""Makes what `Accelerator.save_state` writes and `load_state` reads exact for our optimizers, and complete or refused.

What is relied on: the methods and the function that are wrapped here, `Accelerator`'s list `_optimizers` of what was
prepared, and `optimizer` of the AcceleratedOptimizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_tam.integrations.checkpoint_files import (
    COMPLETE_FILE,
    Strategy,
    first_deviation,
    first_harm,
    forget_completion,
    mark_complete,
    mark_incomplete,
    read_metadata,
    saved_by_ours,
)
from hf_tam.integrations.deepspeed import checkpoint as deepspeed_checkpoint
from hf_tam.integrations.transformers.checkpoint import refuse_our_state
from hf_tam.integrations.wrapped import find_ours

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware


def last_complete_state(folder: str | Path) -> Path | None:
    """Find the newest folder in `folder` that `Accelerator.save_state` wrote to its end, in all processes.

    Folders that it wrote without hf_tam, or for other optimizers, are passed over.

    Args:
        folder: Where the folders of `save_state` are. Need not exist.
    """
    marks = [mark for mark in Path(folder).glob(f"*/{COMPLETE_FILE}") if first_deviation(mark.parent) is None]
    newest = max(marks, key=lambda mark: mark.stat().st_mtime_ns, default=None)
    return None if newest is None else newest.parent


def marking_complete(save_state: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Accelerator.save_state` so that it is known of a folder whether all processes wrote it to its end."""

    @functools.wraps(save_state)
    def wrapped(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        ours = _our_optimizers(self)
        # Where folders are numbered each is new, and accelerate makes it.
        numbered = self.project_configuration.automatic_checkpoint_naming
        rewritten = output_dir is not None and not numbered and self.is_main_process
        if not ours:
            if rewritten:
                forget_completion(Path(output_dir))  # type: ignore[arg-type]
            return save_state(self, output_dir, *args, **kwargs)
        _refuse_one_ranks_shards(self, ours)
        if rewritten:
            mark_incomplete(Path(output_dir))  # type: ignore[arg-type]
        location = save_state(self, output_dir, *args, **kwargs)
        # The sizes that are noted are of files that other processes write.
        self.wait_for_everyone()
        if self.is_main_process:
            mark_complete(Path(location), _strategy(self))
        return location

    return wrapped


def checking_files(load_state: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Accelerator.load_state` so that a file that is missing or cut off is named before anything is loaded."""

    @functools.wraps(load_state)
    def wrapped(self: Any, input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        ours = _our_optimizers(self)
        if ours:
            _refuse_one_ranks_shards(self, ours)
            folder = _folder_to_load(self, input_dir)
            if folder is not None and folder.is_dir():  # otherwise accelerate says what is wrong
                _require_unharmed(self, folder)
        result = load_state(self, input_dir, *args, **kwargs)
        for optimizer in self._optimizers:
            refuse_our_state(optimizer, input_dir or self.project_dir)
        return result

    return wrapped


def _folder_to_load(accelerator: Any, input_dir: str | None) -> Path | None:
    """The folder that `load_state` will take: the given one, or that of the highest number."""
    if input_dir is not None:
        return Path(input_dir).expanduser()
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return None
    numbered = {
        int(match[1]): path
        for path in Path(accelerator.project_dir, "checkpoints").glob("checkpoint_*")
        if (match := re.fullmatch(r"checkpoint_(\d+)", path.name))
    }
    return numbered[max(numbered)] if numbered else None


def _our_optimizers(accelerator: Any) -> list[TorqueAware]:
    return [found for item in accelerator._optimizers if (found := find_ours(item)) is not None]


def _refuse_one_ranks_shards(accelerator: Any, optimizers: list[TorqueAware]) -> None:
    """Without FSDP or DeepSpeed accelerate saves what the first rank holds, and every rank loads it as its own."""
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        return
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    if any(not placement.is_replicate() for param in params for placement in getattr(param, "placements", ())):
        raise RuntimeError(
            "Accelerator.save_state keeps the shards of the first rank only, and load_state gives them to every rank, "
            "where parameters are sharded by tensor parallelism alone: use torch.distributed.checkpoint with "
            "get_model_state_dict and get_optimizer_state_dict instead"
        )


def _strategy(accelerator: Any) -> Strategy:
    if accelerator.distributed_type.value == "DEEPSPEED":
        return "deepspeed"
    if accelerator.distributed_type.value != "FSDP":
        return "prepared"
    full = accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT"
    return "fsdp_full" if full else "fsdp_sharded"


_FIRST_OPTIMIZER: dict[Strategy, str] = {
    "prepared": "optimizer.bin",
    "fsdp_full": "optimizer.bin",
    "fsdp_sharded": "optimizer_0",
    "deepspeed": "",  # in folders of its own
}


def _require_unharmed(accelerator: Any, folder: Path) -> None:
    strategy = _strategy(accelerator)
    harm = first_harm(folder, strategy)
    if harm is None and saved_by_ours(folder / _FIRST_OPTIMIZER[strategy]) is not False:
        harm = first_deviation(folder)  # what is noted is of another save where the optimizer is none of ours
    if harm is not None:
        harm = f"{harm}. This checkpoint was not written to its end, or was damaged since"
    elif accelerator.distributed_type.value == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        harm = deepspeed_checkpoint.first_harm(folder, world_size=accelerator.num_processes, config=config)
    if harm is None:
        return
    earlier = last_complete_state(folder.parent)
    remedy = "There is no other complete one beside it." if earlier is None else f"Load {earlier} instead."
    raise ValueError(f"{harm}. {remedy}")


def exactly_loading(load_fsdp_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap accelerate's `load_fsdp_optimizer` so that our optimizers load what was saved, all of it.

    Raises, when called, RuntimeError where nothing was loaded of states that were saved.
    """

    @functools.wraps(load_fsdp_optimizer)
    def wrapped(
        fsdp_plugin: Any,
        accelerator: Any,
        optimizer: Any,
        model: Any,
        input_dir: str | Path,
        optimizer_index: int = 0,
        **kwargs: Any,
    ) -> Any:
        load = functools.partial(
            load_fsdp_optimizer, fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, **kwargs
        )
        inner = find_ours(optimizer)
        if inner is None:
            return load()
        shards = Path(input_dir) / f"optimizer_{optimizer_index}"
        if not shards.is_dir():
            result = load()
            if fsdp_plugin.fsdp_version == 2:
                _require_states(inner, Path(input_dir))
            return result
        if fsdp_plugin.fsdp_version == 1:
            _make_states(inner)
            load = functools.partial(_with_small_tensors, load)
        saved = read_metadata(shards)
        names = set() if saved is None else set(saved.state_dict_metadata)
        handle = inner.register_state_dict_post_hook(functools.partial(_ask_for, names=names), prepend=True)
        try:
            result = load()
        finally:
            handle.remove()
        if fsdp_plugin.fsdp_version == 2 and any(name.startswith("optimizer.state.") for name in names):
            _require_states(inner, shards)
        return result

    return wrapped


def _require_states(optimizer: TorqueAware, source: Path) -> None:
    """Refuse to go on as if from the beginning: accelerate 1.12 loads nothing under FSDP2, without a word.

    Not under FSDP1, where a rank may hold nothing of what is trained.
    """
    if not any(optimizer.state.values()):
        raise RuntimeError(
            f"accelerate {metadata.version('accelerate')} has loaded none of the optimizer's states in {source}, and "
            "training would go on with new ones; install accelerate>=1.13, which loads them"
        )


def _make_states(optimizer: TorqueAware) -> None:
    """Give every parameter a state to be loaded into.

    accelerate 1.15 asks a fresh FSDP1 optimizer what there is to load, and so loads nothing, without a word.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad and not optimizer.state.get(param):
                optimizer.family.complete(optimizer.state[param], param, group)


def _with_small_tensors(load: Callable[[], Any]) -> Any:
    """Load FSDP1's shards also where a tensor has fewer rows than there are ranks.

    A rank that holds nothing of one takes the checkpoint for one of torch 2.3 and fails (torch 2.13,
    checkpoint/default_planner.py, create_local_plan), unless it leaves out a flattening that is for FSDP1 on top of
    tensor parallelism.
    """
    from torch.distributed.checkpoint import default_planner, state_dict_loader

    planner = default_planner.DefaultLoadPlanner
    # accelerate 1.15 makes the planner itself; up to 1.14 it leaves that to torch.
    for module in (default_planner, state_dict_loader):
        module.DefaultLoadPlanner = functools.partial(planner, flatten_sharded_tensors=False)  # type: ignore[attr-defined]
    try:
        return load()
    finally:
        for module in (default_planner, state_dict_loader):
            module.DefaultLoadPlanner = planner  # type: ignore[attr-defined]


def _ask_for(optimizer: Any, state_dict: dict[str, Any], *, names: set[str]) -> None:
    """A state_dict hook: have torch.distributed.checkpoint asked for what the checkpoint has, no more and no less.

    torch.optim's counterparts have fewer states, and other hyperparameters, which tell a variant that is refused.

    Args:
        optimizer: One of ours.
        state_dict: Its state_dict; changed in place.
        names: What the checkpoint holds.
    """
    absent = [key for key in optimizer.scalar_states if not any(name.endswith(f".{key}") for name in names)]
    if "torque" not in absent:
        return
    for key, state in state_dict["state"].items():
        state_dict["state"][key] = {name: value for name, value in state.items() if name not in absent}
    for position, group in enumerate(state_dict["param_groups"]):
        prefix = f"optimizer.param_groups.{position}."
        saved = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        state_dict["param_groups"][position] = {key: group.get(key) for key in saved | {"params"}}
