"""Follows what DeepSpeed does to our optimizers, and refuses what would train with another one, or with other angles.

What is relied on: the arguments `model`, `optimizer`, `mpu` and `config_class` of `DeepSpeedEngine.__init__`, the
dictionary in `_param_dict` of the latter, the engine's attribute `optimizer`, its methods `load_checkpoint` and
`load_universal_checkpoint`, what a universal checkpoint has in `zero/optimizer_state.pt`, and `num_stages` of a
PipelineModule (deepspeed 0.19).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_tam.integrations.deepspeed.config import refuse_swap_in_config, zero_stage
from hf_tam.integrations.transformers.checkpoint import refuse_our_state
from hf_tam.integrations.wrapped import find_ours

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

ACCEPTED_RANGE = ">=0.19,<0.20"

logger = logging.getLogger("hf_tam")

patched: list[str] = []


def register(module: ModuleType) -> None:
    """Patch `deepspeed.runtime.engine`, freshly imported or not.

    Raises:
        ImportError: If it lacks a name that is relied on; says which, and the range of versions that was tested.
    """
    engine = getattr(module, "DeepSpeedEngine", None)
    if engine is None or not {"model", "optimizer", "mpu", "config_class"} <= set(
        inspect.signature(engine.__init__).parameters
    ):
        raise ImportError(
            f"hf_tam cannot follow deepspeed {version('deepspeed')}: DeepSpeedEngine is not as expected. It is "
            f"made for deepspeed{ACCEPTED_RANGE}: install one of those."
        )
    # On the class, which `deepspeed.initialize` calls, whether it was imported before or after hf_tam.
    engine.__init__ = _attaching(engine.__init__)
    engine.load_checkpoint = _giving_groups_back(engine.load_checkpoint)
    patched.extend(["DeepSpeedEngine.__init__", "DeepSpeedEngine.load_checkpoint"])


def _attaching(initialise: Callable[..., None]) -> Callable[..., None]:
    """Wrap `DeepSpeedEngine.__init__`, which PipelineEngine and the hybrid engine call too.

    Before the engine casts, cuts or replaces any parameter, an optimizer of ours learns which module owns its own.
    """
    signature = inspect.signature(initialise)

    @functools.wraps(initialise)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("optimizer")
        if find_ours(given) is not None:
            _check_and_attach(given, **_of_interest(bound.arguments))
        elif callable(given):  # a function that DeepSpeed calls with the parameters

            @functools.wraps(given)
            def build(parameters: Any) -> Any:
                optimizer = given(parameters)
                _check_and_attach(optimizer, **_of_interest(bound.arguments))
                return optimizer

            bound.arguments["optimizer"] = build
        initialise(*bound.args, **bound.kwargs)
        optimizer = find_ours(self.optimizer)
        if optimizer is not None:
            refuse_split_model_scope(self.optimizer, optimizer)

    return wrapped


def _of_interest(arguments: Mapping[str, Any]) -> dict[str, Any]:
    config = arguments["config_class"]._param_dict
    return {"model": arguments["model"], "config": config, "mpu": arguments.get("mpu")}


def _check_and_attach(item: Any, *, model: Any, config: Mapping[str, Any], mpu: Any) -> None:
    optimizer = find_ours(item)
    if optimizer is None:
        return
    block = config.get("optimizer")
    if block is not None:  # an optimizer that DeepSpeed is given goes before one that is described
        logger.warning(
            'The "optimizer" block of the DeepSpeed configuration (%s) has no effect: %s was passed to DeepSpeed.',
            block.get("type", "unnamed"),
            type(optimizer).__name__,
        )
    refuse_swap_in_config({key: value for key, value in config.items() if key != "optimizer"})
    if any(kind.__name__ == "PipelineModule" for kind in type(model).__mro__) and model.num_stages > 1:
        _refuse_stages(optimizer, zero_stage=zero_stage(config))
    size = _tensor_parallel_size(mpu)
    if size > 1:
        raise ValueError(
            f"The mpu that DeepSpeed is given cuts tensors over {size} tensor-parallel ranks, and hf_tam cannot see "
            "the parts on the others: use accelerate's tp_size, or another optimizer."
        )
    optimizer.attach(model)


_TENSOR_PARALLEL_SIZE = (
    "get_tensor_model_parallel_world_size", "get_slice_parallel_world_size", "get_model_parallel_world_size",
)  # fmt: skip
"""What a model-parallel unit may call it, in the order in which DeepSpeed asks (deepspeed/utils/bwc.py)."""


def _tensor_parallel_size(mpu: Any) -> int:
    """Over how many ranks a model-parallel unit says that tensors are cut."""
    ask = next((getattr(mpu, name) for name in _TENSOR_PARALLEL_SIZE if hasattr(mpu, name)), None)
    # DeepSpeed's unit of sequence parallelism (Ulysses) calls the ranks of one sequence model-parallel too.
    is_sequence = ask is not None and ask == getattr(mpu, "get_sequence_parallel_world_size", None)
    return 1 if ask is None or is_sequence else int(ask())


def _refuse_stages(optimizer: TorqueAware, *, zero_stage: int) -> None:
    """With pipeline stages each rank's optimizer has whole tensors, but not all: scope "tensor" is exact there."""
    if zero_stage > 0:
        raise ValueError(
            f"ZeRO-{zero_stage} under DeepSpeed's pipeline cuts the tensors of a stage over some of the ranks only, "
            'which hf_tam does not follow: use "zero_optimization": {"stage": 0} with it.'
        )
    for group in optimizer.param_groups:
        asked = "scope='model'" if group["scope"] == "model" else f"max_grad_norm={group['max_grad_norm']}"
        if group["scope"] == "model" or group["max_grad_norm"] is not None:
            raise ValueError(
                f"{asked} would be taken over the "
                "parameters of one pipeline stage instead of the model's: use scope='tensor', and gradient_clipping "
                "in the DeepSpeed configuration."
            )


def _giving_groups_back(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DeepSpeedEngine.load_checkpoint`: of a universal checkpoint each param group gets what was its own.

    ZeRO-3 gives all of them the hyperparameters of the first; ZeRO-1 and 2 pass over groups that the checkpoint has
    not, moments and all (deepspeed 0.19.8, runtime/zero/stage3.py and runtime/base_optimizer.py). And what one of ours
    has saved is not left to another optimizer, which would misread it.
    """
    signature = inspect.signature(load_checkpoint)

    @functools.wraps(load_checkpoint)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = find_ours(self.optimizer)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        groups = None
        if optimizer is not None and self.load_universal_checkpoint():
            groups = _universal_groups(optimizer, bound.arguments)
        result = load_checkpoint(self, *args, **kwargs)
        if optimizer is not None and groups is not None:
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                # In place: schedulers, the user's and DeepSpeed's, move these very dictionaries.
                params = group["params"]
                group.clear()
                group.update({**saved, "params": params})
        refuse_our_state(self.optimizer, bound.arguments["load_dir"])
        return result

    return wrapped


def _universal_groups(optimizer: TorqueAware, given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The param groups of a universal checkpoint in `optimizer`'s own form; None where DeepSpeed loads none.

    Args:
        optimizer: The one that is to load it.
        given: The arguments of `load_checkpoint`.

    Raises:
        ValueError: There are more or fewer than the optimizer has, or they are another optimizer's.
    """
    import torch

    from hf_tam.checkpoint import adapt_groups

    folder, tag = Path(given["load_dir"]), given["tag"]
    if tag is None and (folder / "latest_universal").is_file():
        tag = (folder / "latest_universal").read_text(encoding="utf-8").strip()
    path = folder / (tag or "") / "zero" / "optimizer_state.pt"
    if given["load_module_only"] or not given["load_optimizer_states"] or not path.is_file():
        return None  # DeepSpeed says what is missing
    # A pickle that DeepSpeed itself loads in the next moment; ZeRO-3's has the moments of a rank in it, left on disk.
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"{path} was saved with {len(saved)} param group(s), and the optimizer has {len(optimizer.param_groups)} "
            "here, of which DeepSpeed would leave some without their state: build the same param groups"
        )
    return adapt_groups(optimizer, saved)


def refuse_split_model_scope(zero_optimizer: Any, optimizer: Any) -> None:
    """Refuse scope "model" where DeepSpeed would call step() several times, each time with a part of the model.

    Args:
        zero_optimizer: DeepSpeed's own optimizer.
        optimizer: The one of hf_tam inside it.

    Raises:
        ValueError: With what to change.
    """
    # ZeRO-3 has its sub-groups in fp16_groups, ZeRO-1 and 2 their param groups in bit16_groups; each is a call of
    # step().
    parts = len(getattr(zero_optimizer, "fp16_groups", None) or getattr(zero_optimizer, "bit16_groups", None) or [])
    if parts > 1 and any(group["scope"] == "model" for group in optimizer.param_groups):
        raise ValueError(
            f"scope='model' takes one angle over all parameters, but DeepSpeed hands them over in {parts} parts, one "
            "at a time (a param group under ZeRO-1 and 2, a sub-group under ZeRO-3): use scope='tensor', or one param "
            "group and a sub_group_size larger than the model"
        )
