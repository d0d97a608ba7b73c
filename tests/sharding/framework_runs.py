"""A run through the Trainer, or through `Accelerator.prepare`, under every strategy; called in a `World`."""

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import hf_tam
from tests.integrations.test_trainer import make_trainer, unwrapped
from tests.integrations.untouched import TokenRows, tiny_llama
from tests.sharding.cpu_fsdp import fsdp_on_cpu
from tests.sharding.zero_engine import import_deepspeed

GLOBAL_BATCH = 4
ACCUMULATED = 2
STEPS = 20
OPTIONS = {"max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATED, "max_grad_norm": 0.5, "weight_decay": 0.1,
           "lr_scheduler_type": "linear", "learning_rate": 2e-3, "warmup_steps": 4}  # fmt: skip


@dataclass
class Way:
    """A strategy as a user of transformers and accelerate asks for it.

    Attributes:
        world: Number of processes.
        kind: What the optimizer must be stepping: "Parameter", "slice" (FSDP1), "DTensor", "flat" (DeepSpeed).
        fsdp: The version of FSDP.
        replicas: HSDP: over how many ranks shards are replicated.
        tensor: Tensor-parallel processes.
        stage: ZeRO's.
    """

    world: int
    kind: str
    fsdp: int = 0
    replicas: int = 1
    tensor: int = 1
    stage: int = 0


WAYS = {
    "ddp": Way(2, "Parameter"),
    "fsdp1": Way(2, "slice", fsdp=1),
    "fsdp2": Way(2, "DTensor", fsdp=2),
    "hsdp": Way(4, "DTensor", fsdp=2, replicas=2),
    "tp": Way(2, "DTensor", tensor=2),
    "fsdp2-tp": Way(4, "DTensor", tensor=2),  # transformers' own
    "zero1": Way(2, "flat", stage=1),
    "zero2": Way(2, "flat", stage=2),
    "zero3": Way(2, "flat", stage=3),
}


def model_of(lora, folder=None, way=None):
    """The tiny Llama, sharded by transformers itself where the way is tensor parallelism."""
    model = tiny_llama()
    if folder is not None and way is not None and way.tensor > 1:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig  # transformers itself has it later than 5.16

        sizes = {"tp_size": way.tensor, "fsdp_size": way.world // way.tensor}
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
    if lora:  # column-wise layers: transformers cannot put an adapter on the others under tensor parallelism
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def kind_of(optimizer, way):
    if way.stage:
        return "flat" if optimizer.logical.is_partitioned(optimizer.param_groups) else "Parameter"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "DTensor"
    return "slice" if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters) else "Parameter"


def outcome(optimizer, model, way=WAYS["ddp"]):
    """Torques by name, and the trained parameters by name, whole."""
    stats = optimizer.torque_stats()
    return {
        "kind": kind_of(optimizer, way),
        "torque": dict(zip(stats["names"], stats["torque"].tolist(), strict=True)),
        "parameters": {name: value.tolist() for name, value in whole_parameters(model).items()},
    }


def whole_parameters(model):
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if any(hasattr(value, "_z3_optimizer") or hasattr(value, "_hp_mapping") for value in trained.values()):
        from deepspeed.utils import safe_get_full_fp32_param

        return {clean(name): safe_get_full_fp32_param(value) for name, value in trained.items()}
    whole = (
        FullyShardedDataParallel.summon_full_params(model, writeback=False)
        if isinstance(model, FullyShardedDataParallel)
        else contextlib.nullcontext()
    )
    with whole:
        return {
            clean(name): (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }


def clean(name):
    return ".".join(part for part in name.split(".") if part not in ("module", "_fsdp_wrapped_module"))


def trainer_run(folder, name, optim, scope, lora):
    """Train with the real Trainer; every rank returns what it ended with."""
    way = WAYS[name]
    rows = GLOBAL_BATCH // (way.world // way.tensor)
    options = {**OPTIONS, "optim": optim, "optim_args": f"scope={scope}", "per_device_train_batch_size": rows}
    with strategy(way):
        trainer = make_trainer(folder, model=model_of(lora, folder, way), **options, **trainer_options(way))
        trainer.train()
        return outcome(unwrapped_twice(trainer.optimizer), trainer.model_wrapped, way)


def trainer_options(way):
    if way.stage:
        return {"deepspeed": deepspeed_config(way), "use_cpu": False, "bf16": False}
    if not way.fsdp:
        return {}
    config = {"version": way.fsdp, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    if way.fsdp == 1:  # its modules broadcast on accelerators only
        config |= {"use_orig_params": True, "sync_module_states": False}
    mesh = {"parallelism_config": parallelism(way)} if way.replicas > 1 or way.tensor > 1 else {}
    return {"fsdp": True, "fsdp_config": config, **mesh}


def parallelism(way):
    from accelerate.parallelism_config import ParallelismConfig

    shards = way.world // way.replicas // way.tensor
    return ParallelismConfig(dp_replicate_size=way.replicas, dp_shard_size=shards, tp_size=way.tensor)


def deepspeed_config(way):
    return {
        "zero_optimization": {"stage": way.stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


@contextlib.contextmanager
def strategy(way):
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import PartialState

    # accelerate has DeepSpeed only where it was not told to use the CPU: it must find by itself that there is no GPU
    deepspeed = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}
    environment = deepspeed if way.stage else {}
    if way.stage:
        import_deepspeed()
    backend = {"backend": "gloo"} if way.stage else {}
    with (
        fsdp_on_cpu(),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(ParallelismConfig, "_validate_accelerator", return_value=None),  # it counts accelerators
        mock.patch.object(PartialState, "__init__", functools.partialmethod(PartialState.__init__, **backend)),
    ):
        yield
    if way.stage:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def unwrapped_twice(optimizer):
    """accelerate wraps an optimizer once, DeepSpeed once more."""
    while not isinstance(optimizer, hf_tam.AdaTAMW | hf_tam.AdaTAM | hf_tam.TAM):
        optimizer = optimizer.optimizer
    return optimizer


def accelerator_run(folder, name, optim, scope, lora):
    """As `trainer_run`, by a loop as users write it."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    way = WAYS[name]
    with strategy(way):
        plugins = {}
        if way.stage:
            config = deepspeed_config(way) | {"gradient_accumulation_steps": ACCUMULATED, "gradient_clipping": 0.5}
            config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // way.world
            plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
        elif way.fsdp:
            more = {"use_orig_params": True, "sync_module_states": False} if way.fsdp == 1 else {}
            plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=way.fsdp, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False, **more,
            )  # fmt: skip
        if way.replicas > 1 or way.tensor > 1:
            plugins["parallelism_config"] = parallelism(way)
        accelerator = Accelerator(cpu=not (way.fsdp or way.stage), gradient_accumulation_steps=ACCUMULATED, **plugins)
        model = model_of(lora, folder, way)
        optimizer = loop_optimizer(model, optim, scope)
        model, optimizer = accelerator.prepare(model, optimizer)
        shard = accelerator.process_index // way.tensor, way.world // way.tensor
        loop(model, optimizer, accelerator=accelerator, shard=shard)
        return outcome(unwrapped_twice(optimizer), model, way)


def loop_optimizer(model, optim, scope):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = {"adatamw": hf_tam.AdaTAMW, "adatam": hf_tam.AdaTAM, "tam": hf_tam.TAM}[optim]
    return kind(trained, lr=2e-3, weight_decay=0.1, scope=scope)


def loop(model, optimizer, *, accelerator=None, shard=(0, 1)):
    """Twenty steps of two accumulated batches; a process takes its share of the rows of each."""
    rows = TokenRows(32).rows
    number, count = shard
    share = GLOBAL_BATCH // count
    for step in range(STEPS):
        for group in unwrapped_twice(optimizer).param_groups:
            group["lr"] = 2e-3 * (1 - step / STEPS)
        for part in range(ACCUMULATED):
            start = (step * ACCUMULATED + part) * GLOBAL_BATCH % len(rows) + number * share
            batch = rows[start : start + share]
            if accelerator is None:
                (model(input_ids=batch, labels=batch).loss / ACCUMULATED).backward()
                continue
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if accelerator is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def trainer_twin(folder, optim, scope, lora):
    """One process, whole batches."""
    options = {**OPTIONS, "optim": optim, "optim_args": f"scope={scope}", "per_device_train_batch_size": GLOBAL_BATCH}
    trainer = make_trainer(folder, model=model_of(lora), **options)
    trainer.train()
    return outcome(unwrapped(trainer), trainer.model)


def torque_rows(folder, output, name, lora):
    """What the TorqueCallback of a Trainer writes, read by every rank; `name` None: one process, whole batches."""
    way = WAYS[name] if name else Way(1, "Parameter")
    rows = GLOBAL_BATCH // way.world
    options = {**OPTIONS, "optim_args": "log_torque=true", "per_device_train_batch_size": rows, "logging_steps": 4}
    with strategy(way) if name else contextlib.nullcontext():
        trainer = make_trainer(output, model=model_of(lora, folder, way), **options, **trainer_options(way))
        trainer.train()
        trainer.accelerator.wait_for_everyone()
        return {
            "kind": kind_of(unwrapped_twice(trainer.optimizer), way),
            "lines": Path(output, "torque.jsonl").read_text().splitlines(),
            "logs": [row for row in trainer.state.log_history if "torque/damping_mean" in row],
        }


def accelerator_twin(optim, scope, lora):
    model = model_of(lora)
    optimizer = loop_optimizer(model, optim, scope)
    optimizer.attach(model)
    loop(model, optimizer)
    return outcome(optimizer, model)


SAVED_AT = 12


def trainer_with_deepspeed(output, name, resume):
    """Train, from the start or from the checkpoint in `output`; the final states as this rank holds them."""
    way = WAYS[name]
    options = {**OPTIONS, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": SAVED_AT}
    with strategy(way):
        trainer = make_trainer(output, model=model_of(True), **options, **trainer_options(way))
        trainer.train(resume_from_checkpoint=os.path.join(output, f"checkpoint-{SAVED_AT}") if resume else None)
        return states(unwrapped_twice(trainer.optimizer), trainer.model_wrapped)


def accelerator_with_deepspeed(output, name, resume):
    """As `trainer_with_deepspeed`, by save_state and load_state."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    way = WAYS[name]
    with strategy(way):
        config = deepspeed_config(way) | {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5}
        config["gradient_accumulation_steps"] = 1
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = model_of(True)
        model, optimizer = accelerator.prepare(model, loop_optimizer(model, "adatamw", "model"))
        if resume:
            accelerator.load_state(os.path.join(output, "state"))
        for step in range(SAVED_AT if resume else 0, STEPS):
            if step == SAVED_AT and not resume:
                accelerator.save_state(os.path.join(output, "state"))
            batch = TokenRows(32).rows[step : step + 2]
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        return states(unwrapped_twice(optimizer), model)


def states(optimizer, model):
    """Parameters, and every state of every buffer, as lists."""
    held = {
        f"{number}.{key}": value.tolist()
        for number, (buffer, _) in enumerate(optimizer.logical.buffers(optimizer.state))
        for key, value in optimizer.state[buffer].items()
    }
    return held | {name: value.tolist() for name, value in whole_parameters(model).items()}


def load_damaged(output, name):
    """What `load_state` says to a checkpoint that has lost a shard."""
    try:
        accelerator_with_deepspeed(output, name, True)
    except ValueError as error:
        return str(error)
    return "no error"
