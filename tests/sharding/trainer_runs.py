"""The Trainer under real FSDP1, FSDP2 and DDP: runs inside a `World`, called by tests."""

import os

from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor

from hf_tam.integrations.accelerate.checkpoint import exactly_loading
from tests.integrations.test_trainer import make_trainer
from tests.integrations.untouched import tiny_llama
from tests.sharding import checkpoints
from tests.sharding.cpu_fsdp import fsdp_on_cpu

SAVED_AT = 10
"""Steps before the checkpoint that is resumed."""
STOPPED_AT = 14
RANKS = 2
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def make(folder, plugin, *, lora=False, **changes):
    """A Trainer; `plugin` is the version of FSDP and its state_dict_type, or None for DDP. Inside `fsdp_on_cpu`."""
    options = {"max_steps": STOPPED_AT, "save_strategy": "steps", "save_steps": SAVED_AT, "optim_args": None}
    if plugin is not None:
        version, state_dict_type = plugin
        config = {
            "version": version,
            "state_dict_type": state_dict_type,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        }
        if version == 1:  # its modules broadcast on accelerators only
            config |= {"use_orig_params": True, "sync_module_states": False}
        options |= {"fsdp": True, "fsdp_config": config}
    model = tiny_llama()
    if lora:  # two rows: a shard of one on each rank
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return make_trainer(folder, model=model, **(options | changes))


def train(folder, plugin, resume, changes):
    """Train from the start, or from a checkpoint; what every rank holds in the end."""
    with fsdp_on_cpu():
        trainer = make(folder, plugin, **changes)
        trainer.train(resume_from_checkpoint=resume)
        optimizer = trainer.optimizer.optimizer
        tensors = checkpoints.snapshot(trainer.model_wrapped, optimizer)
        return {
            "tensors": {name: tensor.tolist() for name, tensor in tensors.items()},
            "kind": parameter_kind(optimizer),
            "optimizer": type(optimizer).__name__,
            "steps": trainer.state.global_step,
            "rate": trainer.lr_scheduler.get_last_lr(),
            "ranks disagree": checkpoints.disagreements(optimizer) if hasattr(optimizer, "scalar_states") else [],
        }


def resume_without_states(folder, plugin):
    """Resume with an accelerate that loads nothing."""
    from transformers import trainer

    real = trainer.load_fsdp_optimizer
    trainer.load_fsdp_optimizer = exactly_loading(lambda *args, **kwargs: None)
    try:
        train(folder, plugin, checkpoint(folder), {})
    finally:
        trainer.load_fsdp_optimizer = real


def parameter_kind(optimizer):
    """How the first parameter is kept."""
    parameter = optimizer.param_groups[0]["params"][0]
    if isinstance(parameter, DTensor):
        return 2
    return 1 if getattr(parameter, "_fsdp_flattened", False) else None


def checkpoint(folder, step=SAVED_AT):
    return os.path.join(folder, f"checkpoint-{step}")
