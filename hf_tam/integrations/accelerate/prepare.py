"""Keeps an optimizer's parameters those of its models through `Accelerator.prepare`, and looks whether they are whole.

What is relied on: that a model's parameters keep their names, but for the parts that wrappers put in.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tam.sharding.replicas import compare_replicas, is_plain

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

_WRAPPER_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What FSDP1, activation checkpointing and torch.compile put into the names of parameters."""

_differing: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
"""What was found of models that differ over the ranks, for optimizers that are prepared after them."""

logger = logging.getLogger("hf_tam")


class _Place(NamedTuple):
    """A name of a parameter, and the number of the model that has it."""

    model: int
    name: str


class _Followed(NamedTuple):
    """Of one optimizer: the places of each parameter of each group, and which of them had states."""

    optimizer: TorqueAware
    groups: list[list[list[_Place]]]
    stepped: set[int]


class FollowedParameters:
    """By which names the parameters of optimizers stand in the models of one call of `prepare`.

    accelerate finds a new parameter by the address of the old one. All that are on the meta device have the address 0
    (accelerate 1.12 to 1.15, `_prepare_fsdp2`; with cpu_ram_efficient_loading a freshly initialised head is there, on
    every process but the first), and so has every empty shard (`_prepare_tp`): the last of them then stands in the
    place of all. Names say which is which.

    Args:
        optimizers: Ours, unwrapped.
        models: Those that are prepared in this call, as they are before it.
    """

    def __init__(self, optimizers: Sequence[TorqueAware], models: Sequence[nn.Module]) -> None:
        """Note the names. Keeps no tensor, so that the memory of the whole model can be freed."""
        places: dict[int, list[_Place]] = {}
        for number, model in enumerate(models):
            for name, param in named_parameters(model):
                places.setdefault(id(param), []).append(_Place(number, name))
        self._followed = [
            _Followed(
                optimizer,
                [[places.get(id(param), []) for param in group["params"]] for group in optimizer.param_groups],
                # Under ZeRO states belong to buffers that stand in the groups during a step only.
                {id(each) for group in optimizer.param_groups for each in group["params"] if each in optimizer.state},
            )
            for optimizer in optimizers
        ]

    def owners(self, optimizer: TorqueAware, models: Sequence[nn.Module]) -> list[nn.Module]:
        """Those of `models`, what became of the followed ones, that own parameters of `optimizer`."""
        groups = next(followed.groups for followed in self._followed if followed.optimizer is optimizer)
        numbers = {place.model for group in groups for places in group for place in places}
        return [models[number] for number in sorted(numbers)]

    def put_in_place(self, models: Sequence[nn.Module]) -> None:
        """Put the parameters that the models have now into the groups of the optimizers. No communication.

        Leaves alone what DeepSpeed has put there: it steps buffers of its own.

        Args:
            models: What became of the models, in their order.

        Raises:
            ValueError: A name is gone, the names of one tensor belong to several now or those of several to one, or an
                optimizer has states of parameters that it has no longer.
        """
        named = [dict(named_parameters(model)) for model in models]
        partitioned = any(_is_engine(model) for model in models)
        for optimizer, groups, stepped in self._followed:
            if not partitioned:
                for group, positions in zip(optimizer.param_groups, groups, strict=True):
                    group["params"] = [
                        _find(places, named) if places else param
                        for places, param in zip(positions, group["params"], strict=True)
                    ]
                _require_distinct(optimizer, groups)
            _require_states_in_use(optimizer, stepped)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter, a shared one under each, as the user's own model has them."""
    # A tie that `prepare` has lost or made shows only where each name of a tensor is followed.
    for name, param in unwrap(model).named_parameters(remove_duplicate=False):
        yield ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS), param


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, torch.compile and DeepSpeed's engine, which put a part of their own before every name."""
    wraps = isinstance(model, nn.parallel.DistributedDataParallel) or _is_engine(model)
    inner = getattr(model, "module" if wraps else "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def _is_engine(model: nn.Module) -> bool:
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def _find(places: Sequence[_Place], named: Sequence[dict[str, Tensor]]) -> Tensor:
    found = [named[place.model].get(place.name) for place in places]
    for place, param in zip(places, found, strict=True):
        if param is None:
            raise ValueError(
                f"Accelerator.prepare left no parameter {place.name} in the model, and the optimizer would go on with "
                "the old one, which nobody uses: build the optimizer with the parameters of the prepared model"
            )
        if param is not found[0]:
            raise ValueError(
                f"{places[0].name} and {place.name} were one tensor before Accelerator.prepare and are two after it, "
                "of which the optimizer would train one: give the model a method tie_weights() that makes them one "
                "again, or set fsdp_cpu_ram_efficient_loading: false"
            )
    first = found[0]
    assert first is not None
    return first


def _require_distinct(optimizer: TorqueAware, groups: Sequence[Sequence[Sequence[_Place]]]) -> None:
    seen: dict[int, str] = {}
    for group, positions in zip(optimizer.param_groups, groups, strict=True):
        for places, param in zip(positions, group["params"], strict=True):
            name = places[0].name if places else "a parameter of no model in this call"
            if id(param) in seen:
                raise ValueError(
                    f"{seen[id(param)]} and {name} were two tensors before Accelerator.prepare and are one after it: "
                    "set model.config.tie_word_embeddings to what the model is before it is prepared"
                )
            seen[id(param)] = name


def _require_states_in_use(optimizer: TorqueAware, stepped: set[int]) -> None:
    """AdamW goes on from nothing, without a word, when its states belong to parameters that were replaced."""
    now = {id(param) for group in optimizer.param_groups for param in group["params"]}
    lost = next((param for param in optimizer.state if id(param) in stepped - now), None)
    if lost is not None:
        raise ValueError(
            f"{type(optimizer).__name__} had states before Accelerator.prepare (of a parameter of shape "
            f"{tuple(lost.shape)}, for one), which has put other parameters in the place of those: prepare first, and "
            "load the optimizer's states afterwards"
        )


def compare_models(models: Sequence[nn.Module], *, problem: str | None = None) -> None:
    """Look whether the parameters that train, and are no marked shards, are the same on all ranks; remember which not.

    Communication: that of `compare_replicas`, if any of the models is wrapped for several processes: accelerate's
    wrappers communicate too, so that every rank is in the same call. A frozen model is left alone, as DDP does: one
    process may prepare it for itself.

    Args:
        models: What `prepare` made of the models of one call.
        problem: Why this rank cannot go on, if it cannot.

    Raises:
        ValueError: This rank has a problem, or another one that is in the same call.
    """
    shared = [model for model in models if _is_shared(model)]
    if not shared:
        if problem is not None:
            raise ValueError(problem)
        return
    plain = {
        f"{number}.{name}": param
        for number, model in enumerate(shared)
        for name, param in named_parameters(model)
        if param.requires_grad and is_plain(param)
    }
    for key, difference in compare_replicas(plain, problem=problem).items():
        number, _, name = key.partition(".")
        _differing.setdefault(unwrap(shared[int(number)]), {})[name] = difference


def _is_shared(model: nn.Module) -> bool:
    """Whether several processes train a prepared model together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    wrappers = (nn.parallel.DistributedDataParallel, FullyShardedDataParallel)
    return (
        torch.distributed.get_world_size() > 1
        and any(param.requires_grad for param in model.parameters())
        and (
            any(isinstance(part, wrappers) or _is_engine(part) for part in model.modules())
            or any(isinstance(param, DTensor) for param in model.parameters())
        )
    )


def attach_models(optimizer: TorqueAware, models: Iterable[nn.Module]) -> None:
    """Attach the models that own parameters of an optimizer. No communication.

    Raises:
        ValueError: A model keeps them in a way that is refused, or has others than the other ranks.
    """
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for model in {id(inner): inner for inner in map(unwrap, models)}.values():
        optimizer.attach(model)
        named = dict(named_parameters(model))
        for name, difference in _differing.get(model, {}).items():
            if name in named and id(named[name]) in stepped:
                raise ValueError(
                    f"{name} of {type(model).__name__} is not marked as a part of a tensor, but is {difference}: an "
                    "angle needs the whole tensor, and the same one on every rank. Start every rank from the same "
                    "weights; if they are parts, use a strategy that says so (FSDP, or DTensors)"
                )


def warn_of_strangers(optimizer: TorqueAware, *, models: Iterable[nn.Module], optimizers: Iterable[Any]) -> None:
    """Warn where an optimizer trains tensors of no model, while tensors of a model that train are in no optimizer.

    That is how it looks when the parameters were replaced after the optimizer was built; torch's own go on with the
    old ones, without a word. No communication.

    Args:
        optimizer: Ours, which was just prepared.
        models: All that were prepared.
        optimizers: All that were prepared, of any class.
    """
    models = list(models)
    if any(map(_is_engine, models)):  # DeepSpeed's groups hold buffers of its own
        return
    owned = {id(param): name for model in models for name, param in named_parameters(model) if param.requires_grad}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    strangers = [param for param in params if id(param) not in owned and param.requires_grad]
    if not strangers:
        return
    stepped = {id(param) for item in optimizers for group in item.param_groups for param in group["params"]}
    left_out = next((name for number, name in owned.items() if number not in stepped), None)
    if left_out is not None:
        logger.warning(
            "%d of %d parameters of %s (the first has shape %s) belong to no model that was prepared, while %s, which "
            "trains, is in no optimizer. If the model's parameters were replaced after the optimizer was built (by a "
            "new embedding, load_state_dict(assign=True) or a wrapper), it trains the old ones: build it after that.",
            len(strangers),
            len(params),
            type(optimizer).__name__,
            tuple(strangers[0].shape),
            left_out,
        )
