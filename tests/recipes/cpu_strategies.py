"""Lets accelerate shard on the CPU, in the processes of a test, and reports which strategy really ran.

accelerate turns FSDP on for accelerators only (AcceleratorState.__init__), refuses tensor parallelism without one
(ParallelismConfig._validate_accelerator), and finds no backend for DeepSpeed (PartialState.__init__), beside which
transformers wants a GPU for bf16. FSDP1 that offloads a full state dict to the CPU frees what is there already (torch
2.13, FlatParamHandle.to_cpu: a segmentation fault). Without a word a run under FSDP would be plain DDP, so each rank
writes what it saw.
"""

import json
import os
from pathlib import Path

report = {"torques": [], "accelerators": [], "replicated": False}


def install():
    """Change accelerate, and watch what trains."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FullStateDictConfig
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import training_args

    def turn_fsdp_on(state, *args, fsdp_plugin=None, **kwargs):
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    validate = ParallelismConfig._validate_accelerator

    def validate_off_the_cpu(config, accelerator):
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            validate(config, accelerator)

    wrap_constructor(AcceleratorState, after=turn_fsdp_on)
    ParallelismConfig._validate_accelerator = validate_off_the_cpu
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # It would compile an all-reduce of its own for the CPU: a minute in each new environment.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        wrap_constructor(PartialState, backend="gloo")
        training_args.is_torch_bf16_gpu_available = lambda: True
    wrap_constructor(FullStateDictConfig, offload_to_cpu=False)
    wrap_constructor(
        Accelerator, after=lambda accelerator, *args, **kwargs: report["accelerators"].append(accelerator)
    )
    wrap_constructor(DistributedDataParallel, after=note_ddp)
    register_optimizer_step_post_hook(note_step)


def note_accelerator(accelerator, *args, **kwargs):
    report["accelerators"].append(accelerator)


def note_ddp(module, *args, **kwargs):
    report["replicated"] = True


def wrap_constructor(owner, *, after=None, **fixed):
    """Have a constructor take the arguments `fixed` whatever it is given, and call `after` with its arguments."""
    initialize = owner.__init__

    def wrapped(self, *args, **kwargs):
        initialize(self, *args, **{**kwargs, **fixed})
        if after is not None:
            after(self, *args, **kwargs)

    owner.__init__ = wrapped


def note_step(optimizer, args, kwargs):
    if hasattr(optimizer, "torque_stats"):
        report["torques"].append(optimizer.torque_stats()["torque"].tolist())
        report["parameters"] = [describe(param) for group in optimizer.param_groups for param in group["params"]]


def describe(param):
    from torch.distributed.tensor import DTensor

    if isinstance(param, DTensor):
        placements = [str(placement) for placement in param.placements]
        return {"kind": "DTensor", "mesh": list(param.device_mesh.shape), "placements": placements}
    return {"kind": "FSDP1 slice" if getattr(param, "_fsdp_flattened", False) else "tensor"}


def write_report(folder):
    """Write what this process saw to folder/rank-N.json."""
    accelerator = report.pop("accelerators")[-1]
    engine = accelerator._models[-1] if accelerator._models else None
    report.update(
        world_size=accelerator.num_processes,
        strategy=accelerator.distributed_type.value,
        model=[base.__name__ for base in type(engine).__mro__],
        zero_stage=engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
    )
    Path(folder, f"rank-{accelerator.process_index}.json").write_text(json.dumps(report))
