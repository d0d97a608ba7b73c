"""Training with a real DeepSpeed engine on the CPU."""

import logging
import os

import torch

from tests.sharding.trained import CLIP, Trained, loss_of, make_optimizer, schedule

DTYPES = (torch.float32, torch.bfloat16)


def import_deepspeed():
    """DeepSpeed for the CPU, without its banner and its shared-memory collectives, which it would compile first."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def configuration(stage, *, dtype=torch.float32, grad_accum_dtype=None, load_universal=False, **zero):
    return {
        "checkpoint": {"load_universal": load_universal},
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": grad_accum_dtype},
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def starting(stage, **options):
    def start(model, name, optimizer_options, num_groups, **more):
        optimizer = make_optimizer(name, model, optimizer_options, num_groups=num_groups)
        return with_engine(model, optimizer, stage, **options, **more)

    return start


def with_engine(model, optimizer, stage, **options):
    """A model and its optimizer, whichever it is, under DeepSpeed."""
    config = configuration(stage, **options)
    engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
    assert engine.zero_optimization_stage() == stage
    assert engine.optimizer.optimizer is optimizer
    return TrainedByDeepSpeed(model, optimizer, engine, dtype=options.get("dtype", torch.float32))


class TrainedByDeepSpeed(Trained):
    """The engine scales the loss, sums, clips and steps by itself."""

    def __init__(self, module, optimizer, engine, *, dtype):
        super().__init__(module, optimizer)
        self.engine, self.dtype = engine, dtype

    def step(self, batches, step, *, use):
        """As in `Trained`; returns the gradients before clipping, by name."""
        from deepspeed.utils import safe_get_full_grad

        schedule(self.optimizer, step)
        for batch in batches:
            batch = batch.to(self.dtype)
            self.engine.backward(loss_of(self.engine(batch, use), batch))
            if self.engine.is_gradient_accumulation_boundary():
                gradients = {
                    name: safe_get_full_grad(value).float() if value.requires_grad else None
                    for name, value in self.module.named_parameters()
                }
            self.engine.step()
        return gradients

    def stepped(self):
        """The flat buffers that the optimizer steps."""
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
            if hasattr(self.engine.optimizer, name):
                return getattr(self.engine.optimizer, name)
        raise AssertionError(type(self.engine.optimizer))

    def whole_parameters(self):
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(value) if value.requires_grad else None
            for name, value in self.module.named_parameters()
        }


def num_calls(trained):
    """How often the engine calls step() in a global step: once a buffer; the BF16 optimizer once for all."""
    return 1 if type(trained.engine.optimizer).__name__ == "BF16_Optimizer" else len(trained.stepped())
