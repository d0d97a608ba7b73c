"""Accelerator.save_state and load_state under real FSDP1, FSDP2 and DDP; new processes resume."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from tests.sharding import checkpoints, strategies
from tests.sharding.checkpoints import SAVED_AT, STOPPED_AT
from tests.sharding.cpu_fsdp import fsdp_on_cpu
from tests.sharding.trained import Model

# One worker runs them all, so that the worlds are started once.
pytestmark = pytest.mark.distributed

RANKS = 2
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
PLUGINS = [None, (1, FULL), (1, SHARDED), (2, FULL), (2, SHARDED)]
KINDS = {None: "DistributedDataParallel", 1: "FullyShardedDataParallel", 2: "FSDPModel"}
FILES = {
    None: {"optimizer.bin", "model.safetensors"},
    FULL: {"optimizer.bin", "pytorch_model_fsdp.bin"},
    SHARDED: {"optimizer_0", "pytorch_model_fsdp_0"},
}


def identify(plugin):
    return "ddp" if plugin is None else f"fsdp{plugin[0]}-{plugin[1].partition('_')[0].lower()}"


def prepare(plugin, optimizer_name):
    """A prepared model, optimizer and schedule; the caller is inside `fsdp_on_cpu`."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import FullyShardedDataParallelPlugin

    if plugin is None:
        accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    else:
        version, state_dict_type = plugin
        accelerator = Accelerator(
            fsdp_plugin=FullyShardedDataParallelPlugin(
                fsdp_version=version,
                state_dict_type=state_dict_type,
                auto_wrap_policy="SIZE_BASED_WRAP",
                min_num_params=150,  # `middle`
                **({"use_orig_params": True} if version == 1 else {}),
            )
        )
    model = Model(False)
    model.never.requires_grad_(False)  # torch's AdamW, and accelerate's DDP, cannot save what has no state
    optimizer = checkpoints.optimizer_for(model, optimizer_name)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train(model, optimizer, scheduler, first, last):
    for step in range(first, last):
        checkpoints.train(model, optimizer, step, step + 1)
        scheduler.step()


def save_and_go_on(folder, plugin, optimizer_name):
    with fsdp_on_cpu():
        accelerator, model, optimizer, scheduler = prepare(plugin, optimizer_name)
        train(model, optimizer, scheduler, 0, SAVED_AT)
        saved = checkpoints.snapshot(model, optimizer.optimizer)
        accelerator.save_state(folder)
        dist.barrier()
        files = set(os.listdir(folder))
        train(model, optimizer, scheduler, SAVED_AT, STOPPED_AT)
        stopped = checkpoints.snapshot(model, optimizer.optimizer)
        checkpoints.write_expected(folder, {"saved": saved, "stopped": stopped, "rate": scheduler.get_last_lr()})
        kinds = [base.__name__ for base in type(model).__mro__]
        return kinds, files, [value.item() for key, value in saved.items() if key.endswith(".torque")]


def resume(folder, plugin):
    with fsdp_on_cpu():
        expected = checkpoints.read_expected(folder)
        accelerator, model, optimizer, scheduler = prepare(plugin, "AdaTAMW")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.125)
        accelerator.load_state(folder)
        loaded = checkpoints.snapshot(model, optimizer.optimizer)
        train(model, optimizer, scheduler, SAVED_AT, STOPPED_AT)
        stopped = checkpoints.snapshot(model, optimizer.optimizer)
        return {
            "loaded": checkpoints.differences(loaded, expected["saved"]),
            "scalars": {key.rpartition(".")[2]: value.item() for key, value in loaded.items() if value.numel() == 1},
            "stopped": checkpoints.differences(stopped, expected["stopped"]),
            "ranks disagree": checkpoints.disagreements(optimizer.optimizer),
            "same rate": scheduler.get_last_lr() == expected["rate"],
        }


def check_strategy(result, plugin):
    kinds, files, _ = result
    assert KINDS[plugin and plugin[0]] in kinds
    assert FILES[plugin and plugin[1]] <= files


@pytest.mark.parametrize("plugin", PLUGINS, ids=identify)
def test_a_resumed_run_is_the_run_that_was_saved(worlds, tmp_path, plugin):
    for result in worlds(RANKS).run(save_and_go_on, str(tmp_path), plugin, "AdaTAMW"):
        check_strategy(result, plugin)
        assert len(set(result[2])) == len(result[2]) >= 10  # a torque of its own in every tensor, none of them 0
        assert 0.0 not in result[2]
    for result in worlds(RANKS, "resumed").run(resume, str(tmp_path), plugin):
        assert result["loaded"] == []
        assert result["stopped"] == []
        assert result["ranks disagree"] == []
        assert result["same rate"]


def test_a_full_state_of_fsdp1_loads_into_fsdp2(worlds, tmp_path):
    worlds(RANKS).run(save_and_go_on, str(tmp_path), (1, FULL), "AdaTAMW")
    for result in worlds(RANKS, "resumed").run(resume, str(tmp_path), (2, FULL)):
        assert result["loaded"] == []
        assert result["ranks disagree"] == []


@pytest.mark.parametrize("plugin", PLUGINS, ids=identify)
def test_a_checkpoint_of_adamw_loads_exactly(worlds, tmp_path, plugin):
    for result in worlds(RANKS).run(save_and_go_on, str(tmp_path), plugin, "AdamW"):
        check_strategy(result, plugin)
        assert result[2] == []
    for result in worlds(RANKS, "resumed").run(resume, str(tmp_path), plugin):
        missing = {key.rpartition(".")[2] for key in result["loaded"]}
        assert missing == {"exp_avg_scale", "torque"}  # which AdamW has not; all else is equal
        assert (result["scalars"]["exp_avg_scale"], result["scalars"]["torque"]) == (1.0, 0.0)
        assert result["ranks disagree"] == []


def load_into_ours(folder, plugin):
    with fsdp_on_cpu():
        accelerator, *_ = prepare(plugin, "AdaTAMW")
        try:
            accelerator.load_state(folder)
        except ValueError as error:
            return str(error)
    return "no error"


# Not FSDP2's FULL_STATE_DICT: there only the first rank sees what the checkpoint holds, and is alone with its error.
@pytest.mark.parametrize("plugin", [(1, FULL), (1, SHARDED), (2, SHARDED)], ids=identify)
def test_a_checkpoint_of_amsgrad_is_refused(worlds, tmp_path, plugin):
    worlds(RANKS).run(save_and_go_on, str(tmp_path), plugin, "AMSGrad")
    for error in worlds(RANKS, "resumed").run(load_into_ours, str(tmp_path), plugin):
        assert "made with amsgrad=True: a torque-aware optimizer has no form with AMSGrad" in error


def save_and_load_under_tensor_parallelism(folder):
    from accelerate import Accelerator

    with fsdp_on_cpu():
        accelerator = Accelerator()
        model = strategies.tensor_parallel(Model(False))
        optimizer = checkpoints.optimizer_for(model, "AdaTAMW")
        accelerator._models.append(model)
        optimizer = accelerator.prepare(optimizer)
        errors = []
        for method in (accelerator.save_state, accelerator.load_state):
            try:
                method(folder)
            except RuntimeError as error:
                errors.append(str(error))
        return errors, os.listdir(folder)


def test_what_accelerate_would_save_of_one_rank_only_is_refused(worlds, tmp_path):
    for errors, files in worlds(RANKS).run(save_and_load_under_tensor_parallelism, str(tmp_path)):
        assert len(errors) == 2
        assert all("use torch.distributed.checkpoint with get_model_state_dict" in error for error in errors)
        assert files == []
