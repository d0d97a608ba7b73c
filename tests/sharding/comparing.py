"""Trains a sharded model and its unsharded twin, and measures how far apart they end."""

import contextlib

import torch

from hf_tam.sharding import Reduced
from hf_tam.sharding.groups import ShardGroups
from tests.sharding import strategies
from tests.sharding.trained import Model, Trained, batches_of_steps, make_optimizer

CUT_STEPS = 8
"""Steps without the reduction: enough to miss by far."""


def compare(name, optimizer_name, options, lora):
    """Train twin and sharded model side by side, with and without the reduction; how far apart they end.

    Args:
        name: A key of `strategies.SHARDINGS`.
        optimizer_name: A class of hf_tam.
        options: Arguments of the optimizer; with `max_grad_norm` (`CLIP`) it clips by itself, and the twin, which has
            not got it, is clipped by torch.
        lora: Whether all but two small adapters is frozen.
    """
    sharding = strategies.SHARDINGS[name]
    twin, sharded, calls = _train_both(sharding, optimizer_name, options, lora)
    result = {
        "kinds": {type(tensor).__name__ for tensor in _stepped(sharded)},
        "calls": calls[1:],  # the first step also checks that the ranks agree
        "reduces": sharding.groups if isinstance(sharding.groups, int) else sharding.groups(sharded),
        "damping": twin.optimizer.torque_stats()["damping"].tolist(),
        **_distance(sharded, twin),
    }
    if result["reduces"]:
        twin, naive, _ = _train_both(sharding, optimizer_name, options, lora, cut=True)
        result["cut"] = _distance(naive, twin)
    return result


def _train_both(sharding, optimizer_name, options, lora, *, cut=False):
    """Twin and sharded model after their steps, and for each step the collectives that the optimizer asked for."""
    model = Model(lora).to(sharding.stored)
    if sharding.is_zero:  # its fp32 copy is one of the parameters it has rounded
        for parameter in model.parameters():
            parameter.data = parameter.data.to(sharding.dtype).float()
    inside = "max_grad_norm" in options
    plain = {name: value for name, value in options.items() if name != "max_grad_norm"}
    optimizer = make_optimizer(optimizer_name, model, plain, num_groups=sharding.num_groups)
    # torch's wrappers hand on the gradients that they have clipped, DeepSpeed those before.
    clip = inside or (sharding.clip and (sharding.dtype == torch.float32 or sharding.is_zero))
    twin = Trained(model, optimizer, flat=sharding.flat, clip=clip)
    sharded = sharding.start(Model(lora), optimizer_name, options, sharding.num_groups)
    sharded.clip = sharded.clip and not inside
    calls = []
    for step, batches in enumerate(batches_of_steps()[: CUT_STEPS if cut else None]):
        use = 0 if sharding.steady else step
        calls.append([])
        with counted(calls[-1], sharded.optimizer, cut=cut):
            gradients = sharded.step(batches, step, use=use)
        # A weight that differs in its last fp32 bit now and then rounds to another bf16, and the difference grows: in
        # bf16 the twin is given the gradients that the engine computed, and must do the same with them.
        twin.step(batches, step, use=use, gradients=gradients if sharding.dtype == torch.bfloat16 else None)
    return twin, sharded, calls


def _stepped(trained):
    return trained.stepped() if hasattr(trained, "stepped") else trained.optimizer.param_groups[0]["params"]


def _distance(sharded, twin):
    stats, expected = sharded.optimizer.torque_stats(), twin.optimizer.torque_stats()
    parameters = twin.whole_parameters()
    # Reported is the norm before clipping where the step clips, and that of the clipped gradients where torch has.
    inside = sharded.optimizer.param_groups[0]["max_grad_norm"] is not None
    norm = twin.norm if inside else expected["grad_norm"]
    return {
        "torque": (stats["torque"] - expected["torque"]).abs().max().item(),
        "same_order": len(stats["torque"]) == len(expected["torque"]) and stats["names"] == expected["names"],
        "grad_norm": (stats["grad_norm"] / norm - 1).abs().item(),
        "parameters": max(
            ((value.reshape(-1) - parameters[name].reshape(-1)).abs().max() / parameters[name].abs().max()).item()
            for name, value in sharded.whole_parameters().items()
            if value is not None
        ),
    }


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier",
               "reduce_scatter_tensor", "all_to_all_single")  # fmt: skip


@contextlib.contextmanager
def counted(calls, optimizer, *, cut=False):
    """Note name and bytes of each collective that is called inside optimizer.step(); leave it out if `cut`."""
    stepping = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: stepping.append(True)),
        optimizer.register_step_post_hook(lambda *_: stepping.clear()),
    ]
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    reduce = ShardGroups.reduce

    def noting(name):
        def collective(*args, **kwargs):
            if stepping:
                calls.append((name, args[0].nbytes if isinstance(args[0], torch.Tensor) else 0))
            return originals[name](*args, **kwargs)

        return collective

    for name in COLLECTIVES:
        setattr(torch.distributed, name, noting(name))
    if cut:
        ShardGroups.reduce = lambda self, sums, rows, *, present: Reduced(sums)
    try:
        yield
    finally:
        ShardGroups.reduce = reduce
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
        for hook in hooks:
            hook.remove()
