"""Runs that are saved, converted to DeepSpeed's universal checkpoint, and resumed from it."""

import argparse
import os

import torch

from tests.integrations.test_trainer import make_trainer
from tests.sharding import framework_runs as runs

SAVED_AT, STEPS = 4, 8
DECAY = 0.5


def train(folder, name, *, universal=False):
    """In a `World`: train with the Trainer's own groups, decayed and not, or resume from the converted checkpoint.

    Returns:
        The weight decay of every group, and the trained parameters whole.
    """
    way = runs.WAYS[name]
    options = {**runs.OPTIONS, "optim": "adatamw", "max_steps": STEPS, "weight_decay": DECAY, "save_steps": SAVED_AT,
               "save_strategy": "steps", "per_device_train_batch_size": 2}  # fmt: skip
    with runs.strategy(way):
        config = runs.deepspeed_config(way) | {"checkpoint": {"load_universal": universal}}
        deepspeed = {"deepspeed": config, "use_cpu": False, "bf16": False}
        trainer = make_trainer(folder, model=runs.model_of(False), **options, **deepspeed)
        saved = os.path.join(folder, f"checkpoint-{SAVED_AT}")
        trainer.train(resume_from_checkpoint=saved if universal else None)
        if not universal:
            (tag,) = (entry for entry in os.listdir(saved) if entry.startswith("global_step"))
            convert(saved, tag)
        optimizer = runs.unwrapped_twice(trainer.optimizer)
        return {
            "kind": runs.kind_of(optimizer, way),
            "decay": [group["weight_decay"] for group in optimizer.param_groups],
            "parameters": {name: value.tolist() for name, value in runs.whole_parameters(trainer.model).items()},
        }


def resume(folder, name):
    return train(folder, name, universal=True)


def convert(folder, tag):
    """What `python -m deepspeed.checkpoint.ds_to_universal` does, by the first rank, in its own process."""
    if torch.distributed.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        paths = {"input_folder": os.path.join(folder, tag), "output_folder": os.path.join(folder, "universal")}
        ds_to_universal.main(argparse.Namespace(**paths, **options, inject_missing_state=True))
    torch.distributed.barrier()
