"""Lets Accelerate and the Trainer use FSDP on the CPU, inside a `World`: accelerate turns it on for accelerators only.

For tests: without it, FSDP on the CPU silently becomes DDP, so whoever uses this must assert what the parameters are.
"""

import contextlib
import dataclasses
import functools
import os
from unittest import mock

import torch
from torch.distributed.fsdp import FullyShardedDataParallel


@contextlib.contextmanager
def fsdp_on_cpu():
    """In its body a new Accelerator, and so a new Trainer, shards as its FSDP plugin says."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()

    reset()
    with (
        mock.patch.dict(os.environ, _environment()),
        mock.patch.object(AcceleratorState, "__init__", _with_fsdp(AcceleratorState.__init__)),
        mock.patch.object(FullyShardedDataParallel, "__init__", _on_cpu(FullyShardedDataParallel.__init__)),
        mock.patch.object(FullyShardedDataParallel, "state_dict_type", _without_offload),
    ):
        yield
    reset()


def _environment():
    """What a launcher sets; the process group is the world's own."""
    rank, size = (str(number) for number in (torch.distributed.get_rank(), torch.distributed.get_world_size()))
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **ranks}


def _with_fsdp(original):
    @functools.wraps(original)
    def initialise(self, *args, fsdp_plugin=None, **kwargs):
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    return initialise


_state_dict_type = FullyShardedDataParallel.state_dict_type


def _without_offload(module, kind, config=None, optimizer_config=None):
    """FSDP1 hands out views of memory that it frees or reuses, and trusts that offloading has copied them elsewhere.

    On the CPU nothing is copied: the second moment is saved as the first one too, and the process may crash (torch
    2.13, fsdp/_optim_utils.py, _allgather_orig_param_states; fsdp/_state_dict_utils.py, _full_post_state_dict_hook).
    """
    if config is not None:
        config = dataclasses.replace(config, offload_to_cpu=False)
    if optimizer_config is not None:
        optimizer_config = dataclasses.replace(optimizer_config, offload_to_cpu=False)
    return _state_dict_type(module, kind, config, optimizer_config)


def _on_cpu(original):
    @functools.wraps(original)
    def initialise(self, *args, **kwargs):
        # accelerate passes a device with an index, which FSDP1 takes for an accelerator's
        original(self, *args, **{**kwargs, "device_id": torch.device("cpu")})

    return initialise
