"""The DeepSpeed files that everybody starts with, as they come: `--optim adatamw` trains with them.

They are those of the tests and examples of transformers 5 and accelerate 1, and of LLaMA-Factory, axolotl and
ms-swift: what matters to an optimizer in them, written anew. "bf16" and "fp16" are "auto" throughout.
"""

import contextlib
import copy
import json
import logging

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import hf_tam
from hf_tam.integrations.deepspeed.config import prevent_optimizer_swap, refuse_swap_in_config
from tests.field.deepspeed_alone import deepspeed_alone
from tests.integrations.test_trainer import make_trainer
from tests.sharding import framework_runs as runs

pytest.importorskip("deepspeed")

CPU = {"device": "cpu", "pin_memory": True}
NONE = {"device": "none", "pin_memory": True}
ALL_AUTO = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
ACCELERATES = {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True}
BLOCK, FORCED, ROUND_ROBIN = '"optimizer" block', "zero_force_ds_cpu_optimizer", "round_robin_gradients"


def stock(stage, *, params=None, scheduler=None, **zero):
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **zero},
        **dict.fromkeys(keys, "auto"),
    }
    if params:
        config["optimizer"] = {"type": "AdamW", "params": params}
    if scheduler:
        names = ["warmup_min_lr", "warmup_max_lr", "warmup_num_steps"]
        names += ["total_num_steps"] if scheduler == "WarmupDecayLR" else []
        config["scheduler"] = {"type": scheduler, "params": dict.fromkeys(names, "auto")}
    return config


AUTO_SIZES = dict.fromkeys(
    ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
)
GATHERED = {"gather_16bit_weights_on_model_save": True, "max_live_parameters": 0, "max_reuse_distance": 0}
FILES = {
    "transformers-zero2": (
        stock(2, params=ALL_AUTO, scheduler="WarmupLR", offload_optimizer=CPU), [BLOCK, FORCED]
    ),
    "transformers-zero3": (
        stock(3, params=ALL_AUTO, scheduler="WarmupLR", offload_optimizer=CPU, offload_param=CPU, sub_group_size=1e14,
              **AUTO_SIZES),
        [BLOCK, FORCED],
    ),
    "accelerate-template-zero1": (stock(1, params=ACCELERATES, scheduler="WarmupDecayLR"), [BLOCK]),
    "accelerate-template-zero2": (stock(2, params=ACCELERATES, scheduler="WarmupDecayLR"), [BLOCK]),
    "accelerate-template-zero2-offload": (
        stock(2, params=ACCELERATES, scheduler="WarmupDecayLR", offload_optimizer=CPU), [BLOCK, FORCED]
    ),
    "accelerate-template-zero3": (
        stock(3, params={"lr": "auto", "weight_decay": "auto"}, scheduler="WarmupDecayLR", **AUTO_SIZES), [BLOCK]
    ),
    "accelerate-template-zero3-offload": (
        stock(3, params={"lr": "auto", "weight_decay": "auto"}, scheduler="WarmupDecayLR", offload_optimizer=CPU,
              offload_param=CPU, **AUTO_SIZES),
        [BLOCK, FORCED],
    ),
    "accelerate-zero3": (
        stock(3, params=ACCELERATES, scheduler="WarmupLR", offload_optimizer=CPU, offload_param=CPU, **AUTO_SIZES),
        [BLOCK, FORCED],
    ),
    "accelerate-alst": (stock(3) | {"seq_parallel_communication_data_type": "bf16"}, []),
    "llama-factory-z0": (stock(0, round_robin_gradients=True), []),
    "llama-factory-z2": (stock(2, round_robin_gradients=True), [ROUND_ROBIN]),
    "llama-factory-z2-offload": (stock(2, round_robin_gradients=True, offload_optimizer=CPU), [FORCED, ROUND_ROBIN]),
    "llama-factory-z3": (stock(3, **AUTO_SIZES), []),
    "llama-factory-z3-offload": (stock(3, offload_optimizer=CPU, offload_param=CPU, **AUTO_SIZES), [FORCED]),
    "axolotl-zero1": (stock(1, overlap_comm=True), []),
    "axolotl-zero2": (stock(2, offload_optimizer={"device": "cpu"}), [FORCED]),
    "axolotl-zero3": (stock(3, sub_group_size=0, **AUTO_SIZES, **GATHERED), []),
    "axolotl-zero3-offload": (
        stock(3, sub_group_size=0, offload_optimizer=CPU, offload_param=CPU, **AUTO_SIZES, **GATHERED)
        | {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True},
        [],
    ),
    "ms-swift-zero2": (stock(2, offload_optimizer=NONE), []),
    "ms-swift-zero3-offload": (stock(3, offload_optimizer=CPU, offload_param=CPU, **AUTO_SIZES), [FORCED]),
}  # fmt: skip


class Plugin:
    """What is asked of accelerate's DeepSpeedPlugin."""

    def __init__(self, config):
        self.hf_ds_config, self.config = self, copy.deepcopy(config)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_tam"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_changed_is_said_in_one_line(name, caplog):
    config, changed = FILES[name]
    plugin = Plugin(config)
    prevent_optimizer_swap(plugin)
    refuse_swap_in_config(plugin.config)
    lines = messages(caplog)
    assert len(lines) == (1 if changed else 0)
    assert [words for words in (BLOCK, FORCED, ROUND_ROBIN) if words in "".join(lines)] == changed
    assert plugin.config.get("scheduler") == config.get("scheduler")
    prevent_optimizer_swap(plugin)
    assert messages(caplog) == lines


ASKED = {"lr": 3e-5, "betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 3e-7}


@pytest.mark.parametrize(
    "block",
    [
        {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
        {"type": "Adam", "params": {"lr": "3e-5", "adam_w_mode": True, "amsgrad": False, "torch_adam": False}},
        {"type": "adamw", "params": {"lr": "auto", "eps": 1e-8}},
        {"type": "AdamW"},
        None,
    ],
)
def test_a_block_that_repeats_what_was_asked_for_is_left_out(block):
    plugin = Plugin(stock(2) | {"optimizer": block})
    prevent_optimizer_swap(plugin, ASKED)
    assert "optimizer" not in plugin.config


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "AdamW", "params": {"lr": 1e-3}}, "lr=0.001, elsewhere 3e-05"),
        ({"type": "AdamW", "params": {"betas": [0.9, 0.999]}}, r"betas=\[0.9, 0.999\], elsewhere \(0.8, 0.999\)"),
        ({"type": "AdamW", "params": {"betas": 0.8}}, "betas=0.8"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam_w_mode=False"),
        ({"type": "AdamW", "params": {"lr": "auto", "cuda_aware": True}}, "cuda_aware=True"),
        ({"type": "OneBitAdam", "params": ALL_AUTO}, "by another algorithm: remove it"),
        ({"type": "Lion", "params": {"lr": "auto"}}, "by another algorithm: remove it"),
        ({"type": "Muon", "params": {"lr": "auto"}}, "by another algorithm: remove it"),
    ],
)
def test_a_block_that_says_something_else_is_refused(block, words, caplog):
    config = stock(2, offload_optimizer=CPU) | {"optimizer": block}
    plugin = Plugin(config)
    with pytest.raises(ValueError, match=rf"(?s)would replace the optimizer of hf_tam.*{words}"):
        prevent_optimizer_swap(plugin, ASKED)
    assert messages(caplog) == []
    assert plugin.config["optimizer"] == block


def test_what_a_file_forces_by_name_is_refused():
    config = stock(3, offload_optimizer=CPU) | {"zero_force_ds_cpu_optimizer": True}
    with pytest.raises(ValueError, match='set "zero_force_ds_cpu_optimizer": false'):
        prevent_optimizer_swap(Plugin(config))


class Rates(TrainerCallback):
    """The learning rate of every group after each step."""

    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append({group["lr"] for group in optimizer.param_groups})


@contextlib.contextmanager
def alone():
    with deepspeed_alone(), runs.strategy(runs.Way(1, "flat", stage=1)):
        yield


@pytest.fixture(name="alone")
def _alone():
    with alone():
        yield


def innermost(optimizer):
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def train(folder, config, optim):
    """Four steps with the Trainer: its optimizer and schedule, and the rate of each step."""
    rates = Rates()
    options = {"max_steps": 4, "learning_rate": 2e-3, "warmup_steps": 2, "weight_decay": 0.1, "use_cpu": False}
    with alone():
        trainer = make_trainer(
            folder, model=runs.model_of(False), callbacks=[rates], optim=optim, deepspeed=config, bf16=False, **options
        )
        trainer.train()
        return innermost(trainer.optimizer), type(trainer.lr_scheduler).__name__, rates.rates


def with_torchs_adamw(config):
    """DeepSpeed's own, for the CPU and for its devices, would have to be compiled first."""
    config = copy.deepcopy(config)
    config["zero_optimization"].pop("offload_optimizer", None)
    if "optimizer" in config:
        config["optimizer"]["params"]["torch_adam"] = True
    return config


TRAINED = [
    "transformers-zero2", "transformers-zero3", "accelerate-template-zero1", "accelerate-template-zero3",
    "llama-factory-z0", "llama-factory-z2-offload", "axolotl-zero3",
]  # fmt: skip
SLOW = ("transformers-zero2", "llama-factory-z0", "axolotl-zero3")


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TRAINED],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_trains_and_the_rate_moves_as_adamws(tmp_path, name):
    """The control is what the file trains without us: DeepSpeed's or torch's AdamW, with the file's scheduler."""
    config, _ = FILES[name]
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config))
    optimizer, schedule, rates = train(tmp_path, str(path), "adatamw")
    assert type(optimizer) is hf_tam.AdaTAMW
    assert optimizer.logical.is_partitioned(optimizer.param_groups) == (config["zero_optimization"]["stage"] > 0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.torque_stats()["torque"].abs().max() > 0
    config = with_torchs_adamw(config)
    control, expected, expected_rates = train(tmp_path, config, "adamw_torch")
    assert type(control) is torch.optim.AdamW
    assert schedule == expected == ("DeepSpeedSchedulerWrapper" if "scheduler" in config else "LambdaLR")
    assert rates == expected_rates
    assert len({rate for step in rates for rate in step}) > 1


def test_a_dictionary_is_left_as_it_is(alone, tmp_path):
    config = copy.deepcopy(FILES["transformers-zero2"][0])
    TrainingArguments(output_dir=str(tmp_path), optim="adatamw", deepspeed=config, bf16=False, report_to="none")
    assert config == FILES["transformers-zero2"][0]


def test_arguments_that_name_another_optimizer_keep_the_block(alone, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), optim="adamw_torch", deepspeed=FILES["transformers-zero2"][0], bf16=False,
        report_to="none",
    )  # fmt: skip
    config = args.hf_deepspeed_config.config
    assert config["optimizer"]["params"]["lr"] == args.learning_rate
    args.set_optimizer("adatamw", learning_rate=args.learning_rate)
    assert "optimizer" not in config


def test_a_learning_rate_that_the_file_sets_otherwise_is_refused(alone, tmp_path):
    config = stock(2, params=ALL_AUTO | {"lr": 3e-5})
    options = {"output_dir": str(tmp_path), "deepspeed": config, "bf16": False, "report_to": "none"}
    with pytest.raises(ValueError, match=r"lr=3e-05, elsewhere 5e-05"):
        TrainingArguments(optim="adatamw", **options)
    TrainingArguments(optim="adatamw", learning_rate=3e-5, **options)


def accelerator_run(config, build):
    """A loop as users of accelerate write it, with DeepSpeed's scheduler; the optimizer, and the rate of each step."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DummyScheduler

    with alone():
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), gradient_accumulation_steps=1)
        model = runs.model_of(False)
        optimizer = build(model)
        loader = torch.utils.data.DataLoader(runs.TokenRows(16), batch_size=4)
        scheduler = DummyScheduler(optimizer, total_num_steps=4, warmup_num_steps=2)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        rates = []
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            rates.append({group["lr"] for group in optimizer.param_groups})
        return innermost(optimizer), rates


@pytest.mark.long
@pytest.mark.parametrize("name", ["transformers-zero2", "accelerate-template-zero1", "accelerate-template-zero3"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_accelerate_prepares_our_optimizer_where_the_file_has_a_block(name):
    from accelerate.utils import DummyOptim

    config = copy.deepcopy(FILES[name][0])
    optimizer, rates = accelerator_run(config, lambda model: hf_tam.AdaTAMW(model.parameters(), lr=2e-3))
    assert type(optimizer) is hf_tam.AdaTAMW
    assert optimizer.logical.is_partitioned(optimizer.param_groups)
    assert None not in optimizer.torque_stats()["names"]
    # accelerate fills in no others
    config["optimizer"]["params"] = {"lr": "auto", "weight_decay": "auto"}
    control, expected = accelerator_run(
        with_torchs_adamw(config), lambda model: DummyOptim(model.parameters(), lr=2e-3)
    )
    assert type(control) is torch.optim.AdamW
    assert rates == expected
    assert len({rate for step in rates for rate in step}) > 1


def test_accelerate_launch_with_a_file(alone, tmp_path, monkeypatch, caplog):
    """As TrainingArguments see what `accelerate launch --deepspeed_config_file` has left in the environment."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(FILES["transformers-zero2"][0]))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    args = TrainingArguments(output_dir=str(tmp_path), optim="adatamw", bf16=False, report_to="none")
    assert "optimizer" not in args.deepspeed_plugin.deepspeed_config
    assert args.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] is False
    with caplog.at_level(logging.WARNING):
        TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", bf16=False, report_to="none")
    assert sum(BLOCK in line for line in messages(caplog)) == 1
