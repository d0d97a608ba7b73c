"""The logical tensors of an optimizer: which they are, what they are called, and what makes their sums whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tam.integrations import torch_private
from hf_tam.integrations.deepspeed.partitions import is_partitioned
from hf_tam.integrations.transformers.tensor_parallel import refuse_plain_shards
from hf_tam.sharding.company import several_processes
from hf_tam.sharding.ownership import OwnedParameters, is_frozen, shape_of
from hf_tam.sharding.reducer import Reducer
from hf_tam.sharding.select import refuse_parts, select_reducer

# By the names of the classes and of their bases: DeepSpeed is not to be imported for this, and has engines that are
# derived from that one.
_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"})
"""Classes that hold the user's model as `module`, a name that a user's own part may have as well."""


class _Selected(NamedTuple):
    """A reducer, and what it was chosen by, attribute by attribute: it is asked of thousands of tensors at every step.

    Attributes:
        reducer: The reducer.
        ids: The identities of the tensors in param_groups.
        kinds: Their types.
        specs: Where and how each is cut and how large it is, where there are DTensors.
        plain: How many elements each has, and whether FSDP1 keeps slices of it, where there are others.
        frozen: The positions of those that are not trained, which may be anything.
        repeats: Whether one stands there more than once.
    """

    reducer: Reducer
    ids: tuple[int, ...]
    kinds: list[type[Tensor]]
    specs: list[Any] | None
    plain: tuple[list[int], list[bool]] | None
    frozen: list[int]
    repeats: bool

    @classmethod
    def of(cls, reducer: Reducer, params: Sequence[Tensor]) -> _Selected:
        specs = torch_private.specs(params)
        return cls(
            reducer,
            ids=tuple(map(id, params)),
            kinds=list(map(type, params)),
            specs=specs if any(spec is not None for spec in specs) else None,
            plain=_plain(params) if any(spec is None for spec in specs) else None,
            frozen=[position for position, param in enumerate(params) if is_frozen(param)],
            repeats=len(set(map(id, params))) < len(params),
        )

    def still_serves(self, params: Sequence[Tensor]) -> bool:
        """Whether these tensors, of its ids and types, are cut as they were. In one process nothing is."""
        return not several_processes() or (
            (self.specs is None or torch_private.specs(params) == self.specs)
            and (self.plain is None or _plain(params) == self.plain)
            and all(is_frozen(params[position]) for position in self.frozen)
        )


class _Attached(NamedTuple):
    """A module that was attached, and the ids of its parameters that were in param_groups when last seen there."""

    reference: weakref.ref[nn.Module]
    trained: frozenset[int]

    @classmethod
    def of(cls, module: nn.Module, ids: Iterable[int]) -> _Attached:
        return cls(weakref.ref(module), frozenset(map(id, module.parameters())).intersection(ids))


class LogicalTensors:
    """Follows what wrappers do to an optimizer's parameters.

    Usually each parameter in `param_groups` stands for one logical tensor. Under DeepSpeed ZeRO the parameters that
    the optimizer was built with do, and `param_groups` hold flat buffers; DeepSpeed steps one buffer at a time, so
    there is a reducer for each set of tensors that has been stepped.

    No tensor is referred to: what is needed of one is looked up in `param_groups`, `state` and the attached modules.

    Attributes:
        repeats: Whether a parameter stands in `param_groups` more than once, as of the last selection.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._owned = OwnedParameters()
        self._attached: list[_Attached] = []
        self._selected: dict[tuple[int, ...], _Selected] = {}
        self._stepped: tuple[int, ...] = ()
        self.repeats = False

    def add_group(self, group: dict[str, Any]) -> None:
        """Remember the parameters of a param group, and their names where it has them."""
        self._owned.add(group["params"], group.get("param_names", ()))

    def attach(self, module: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
        """See `TorqueAware.attach`; `groups` are the `param_groups`."""
        refuse_plain_shards(module)
        named = _named_parameters(module)
        params = _all(groups)
        held = set(map(id, params))
        called = {id(param): name for name, param in named.items()}
        names = [called.get(id(param)) or self._owned.name(param) for param in params]
        refuse_parts(params, names=names, modules=[module, *self._modules()])
        if not any(id(param) in held or self._owned.was_handed(param) for param in named.values()):
            raise self._foreign(module, named)
        others = [_Attached.of(other, held) for other in self._modules() if other is not module]
        self._attached = [*others, _Attached.of(module, held)]
        self._owned.learn(named)
        if not self.is_partitioned(groups):
            self._owned.set_order(params)
            # An engine that is gone has left its buffers' ids. Nothing else: to select anew communicates, and this may
            # be the only rank that attaches.
            self._selected = {key: made for key, made in self._selected.items() if held.issuperset(key)}

    def _foreign(self, module: nn.Module, named: Mapping[str, Tensor]) -> Exception:
        """The error for a module that owns none of what the optimizer was handed."""
        flat = [param for param in named.values() if torch_private.is_flat(param)]
        flattened = {shape for param in flat for shape in torch_private.flat_shapes(param)}
        if flat and flattened.issuperset(self._owned.shapes_in_order()):
            return RuntimeError(
                f"attach: FSDP1 has put the parameters of {type(module).__name__} into flat parameters since the "
                "optimizer was built with them, so it would train nothing; wrap the model with use_orig_params=True "
                "(fsdp_use_orig_params: true)"
            )
        return ValueError(
            f"attach: {type(module).__name__} owns none of this optimizer's parameters; pass the module whose "
            "parameters the optimizer was built with"
        )

    def select(self, params: list[Tensor], groups: Sequence[dict[str, Any]]) -> Reducer:
        """The reducer for `params`, all that stand in `groups`; found anew when they are others than before."""
        # Only where this step would do nothing at all: a part of the parameters without a gradient is usual.
        if self._attached and all(param.grad is None for param in params):
            self._refuse_replaced(params)
        self._stepped = tuple(map(id, params))
        known = self._selected.get(self._stepped)
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if known is not None and known.kinds == list(map(type, params)):
            if not is_distributed or known.still_serves(params):
                self.repeats = known.repeats
                return known.reducer
        modules = self._modules()
        for module in modules:  # FSDP2 puts other parameters in the module's place
            self._owned.learn(_named_parameters(module))
        owned = {id(param): param for module in modules for param in module.parameters()}
        partitioned = self.is_partitioned(groups)
        logical = self._owned.in_order(owned) if partitioned else []
        reducer = select_reducer(params, self._owned, names=self.names(groups), logical=logical, modules=modules)
        selected = _Selected.of(reducer, params)
        if not partitioned:
            self._selected.clear()
            self._owned.settle(params, owned)
            self._attached = [_Attached.of(module, selected.ids) for module in modules]
        self._selected[selected.ids] = selected
        self.repeats = selected.repeats
        return reducer

    def _refuse_replaced(self, params: Sequence[Tensor]) -> None:
        """Refuse to step parameters that a module has had replaced, which nothing will ever give a gradient.

        What stays in param_groups then is not the module's: fully_shard, load_state_dict(assign=True) and
        `module.to()` with torch.__future__.set_overwrite_module_params_on_conversion(True) leave it behind.
        """
        held = set(map(id, params))
        for module, trained in self._attached:
            owner = module()
            if owner is None or not trained & held or any(id(param) in held for param in owner.parameters()):
                continue
            raise RuntimeError(
                f"no parameter of this optimizer has a gradient, and none is {type(owner).__name__}'s any more: it "
                "was given new ones after the optimizer was built (by fully_shard, or load_state_dict(assign=True)), "
                "so this step would train nothing. Build the optimizer after that"
            )

    def moved_since_the_step(self, groups: Sequence[dict[str, Any]]) -> dict[int, int] | None:
        """Where each parameter stands now, by its position in the last step; None where all stand where they stood."""
        now = tuple(map(id, _all(groups)))
        if now == self._stepped or self.is_partitioned(groups):
            return None
        places = {key: place for place, key in reversed(list(enumerate(now)))}
        return {place: places[key] for place, key in enumerate(self._stepped) if key in places}

    def names(self, groups: Sequence[dict[str, Any]]) -> list[str | None]:
        """The names of the logical tensors, in order; None where unknown."""
        if self.is_partitioned(groups):
            return self._owned.names_in_order()
        names: list[str | None] = []
        for group in groups:
            given = group.get("param_names", [])
            if len(given) != len(group["params"]):  # a wrapper replaced the parameters
                given = [None] * len(group["params"])
            names += [name or self._owned.name(param) for name, param in zip(given, group["params"], strict=True)]
        return names

    def buffers(self, states: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
        """Every flat buffer that has a state, with the positions of its logical tensors.

        Args:
            states: The keys of `optimizer.state`.
        """
        tensors = {id(tensor): tensor for tensor in states}
        for selected in self._selected.values():
            for buffer in [tensors[key] for key in selected.ids if key in tensors]:
                spans = selected.reducer.spans(buffer)
                if spans is not None:
                    yield buffer, [span.position for span in spans]

    def is_partitioned(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether DeepSpeed ZeRO has taken the parameters over, and put its buffers into `groups` in their place."""
        # First what stands in the groups: an engine of DeepSpeed's that is gone leaves its marks on parameters that
        # are whole.
        if any(self._owned.recalls(param) for group in groups for param in group["params"]):
            return False
        parameters = chain.from_iterable(module.parameters() for module in self._modules())
        return is_partitioned(param for param in parameters if self._owned.was_handed(param))

    def _modules(self) -> list[nn.Module]:
        """The attached modules that are still there."""
        return [module for attached in self._attached if (module := attached.reference()) is not None]


def _all(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _plain(params: Sequence[Tensor]) -> tuple[list[int], list[bool]]:
    try:
        sizes = list(map(Tensor.numel, params))
    except ValueError:  # a lazy module has not given its parameters a shape yet
        sizes = [0 if shape_of(param) is None else param.numel() for param in params]
    return sizes, list(map(hasattr, params, repeat(torch_private.FSDP1_MARK)))


def _named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by the names that the user's own model gives them, whatever is wrapped around it, or within."""
    named: dict[str, Tensor] = {}
    names, hidden, seen = {"": ""}, set(), set()
    for path, part in module.named_modules():
        parent, _, own = path.rpartition(".")
        if path:
            skipped = own in torch_private.WRAPPER_PARTS or path in hidden
            names[path] = names[parent] if skipped else f"{names[parent]}.{own}".lstrip(".")
        if any(kind.__name__ in _WRAPPERS for kind in type(part).__mro__):
            hidden.add(f"{path}.module".lstrip("."))
        for leaf, param in torch_private.own_parameters(part).items():
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                named[f"{names[path]}.{leaf}".lstrip(".")] = param
    return named
