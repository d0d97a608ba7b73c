"""Scripts that bring an optimizer of their own while the arguments ask for one of ours: what trains is said, once."""

import logging

import pytest
import torch
from transformers import Trainer

import hf_tam
from tests.field.deepspeed_alone import deepspeed_alone
from tests.integrations.test_trainer import make_trainer, unwrapped
from tests.integrations.untouched import tiny_llama
from tests.sharding import framework_runs as runs


@pytest.fixture
def said(caplog):
    """What hf_tam has logged so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "hf_tam"]


def passed_object(folder, build, **changes):
    model = tiny_llama()
    return make_trainer(folder, model=model, optimizers=(build(model.parameters()), None), **changes)


def passed_class(folder, kind, **changes):
    class WithClass(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, optimizer_cls_and_kwargs=(kind, {"lr": 0.1}), **kwargs)

    return make_trainer(folder, trainer=WithClass, **changes)


class Overriding(Trainer):
    """As scripts for layer-wise learning rates do."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class Choosing(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.SGD, {"lr": 0.1}


class Setting(Trainer):
    def create_optimizer_and_scheduler(self, num_training_steps):
        self.create_scheduler(num_training_steps, self.optimizer)

    def train(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return super().train(*args, **kwargs)


WAYS = {
    "optimizers": lambda folder, **changes: passed_object(folder, lambda p: torch.optim.SGD(p, lr=0.1), **changes),
    "optimizer_cls_and_kwargs": lambda folder, **changes: passed_class(folder, torch.optim.SGD, **changes),
    "create_optimizer": lambda folder, **changes: make_trainer(folder, trainer=Overriding, **changes),
    "get_optimizer_cls_and_kwargs": lambda folder, **changes: make_trainer(folder, trainer=Choosing, **changes),
    "self.optimizer": lambda folder, **changes: make_trainer(folder, trainer=Setting, **changes),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_optimizer_than_the_one_that_was_named(tmp_path, said, way):
    trainer = WAYS[way](tmp_path)
    trainer.train()
    assert type(unwrapped(trainer)) is torch.optim.SGD
    assert said() == [
        "--optim adatamw (hf_tam.AdaTAMW) has no effect: the script gives the Trainer an optimizer of its own, and "
        "torch's SGD trains. Take one of the two out."
    ]


def test_one_of_ours_that_is_not_the_one_that_was_named(tmp_path, said):
    trainer = passed_object(tmp_path, lambda params: hf_tam.TAM(params, lr=0.1))
    trainer.train()
    assert len(said()) == 1
    assert "--optim adatamw (hf_tam.AdaTAMW) has no effect" in said()[0]
    assert "hf_tam's TAM trains" in said()[0]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_said_where_the_flag_is_left_out(tmp_path, said, way):
    WAYS[way](tmp_path, optim="adamw_torch").train()
    assert said() == []


def test_the_advice_is_not_to_pass_the_flag_that_was_passed(tmp_path, said):
    WAYS["optimizers"](tmp_path, optim_args="log_torque=true").train()
    first, second = said()
    assert "torch's SGD trains" in first + second
    (callbacks,) = (line for line in (first, second) if line.startswith("TorqueCallback logs nothing"))
    assert callbacks.endswith("--optim adatamw has no effect where the script gives the Trainer its own.")


@pytest.mark.parametrize(
    ("options", "silent"),
    [
        ({"logging_steps": 500}, True),
        ({"logging_strategy": "no"}, True),
        ({"logging_steps": 6}, False),
        ({"logging_steps": 500, "logging_first_step": True}, False),
        ({"logging_strategy": "epoch"}, False),
    ],
)
def test_a_torque_log_that_no_row_would_come_into(tmp_path, said, options, silent):
    """Six steps; transformers logs the losses of every 500th by default."""
    make_trainer(tmp_path, optim_args="log_torque=true", max_steps=6, num_train_epochs=1, **options).train()
    assert (not (tmp_path / "torque.jsonl").read_text()) == (len(said()) == 1) == silent
    assert all(line.startswith("TorqueCallback logs nothing in this training of 6 steps") for line in said())


def test_optim_args_that_do_not_reach_the_scripts_optimizer(tmp_path, said):
    options = {"optim_args": "gamma=0.5,beta1=0.8,damping_eps=1e-8,scope=tensor,fused_clip=true"}
    passed_object(tmp_path, lambda params: hf_tam.AdaTAMW(params, lr=0.1), **options).train()
    assert said() == [
        "--optim_args has no effect on the AdaTAMW that the script gives the Trainer: "
        "max_grad_norm=1.0 (it has None), betas=(0.8, 0.999) (it has (0.9, 0.999)), gamma=0.5 (it has 0.9)."
    ]


class Grouping(Trainer):
    """Makes the named optimizer itself, over param groups of its own: as LLaMA-Factory's LoRA+ and BAdam do."""

    def create_optimizer(self, model=None):
        kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        groups = [{"params": [parameter], "lr": 1e-3} for parameter in self.model.parameters()]
        self.optimizer = kind(groups, **kwargs)
        return self.optimizer


@pytest.mark.long
def test_nothing_is_said_where_the_script_makes_what_was_named(tmp_path, said):
    options = {"optim_args": "gamma=0.5,beta2=0.95,fused_clip=true,foreach=true"}
    trainer = make_trainer(tmp_path, trainer=Grouping, **options)
    trainer.train()
    assert type(unwrapped(trainer)) is hf_tam.AdaTAMW
    make_trainer(tmp_path, **options).train()
    assert said() == []


@pytest.mark.long
def test_each_training_says_it_once(tmp_path, caplog, said):
    with caplog.at_level(logging.INFO):
        trainer = WAYS["create_optimizer"](tmp_path, max_steps=2)
        trainer.train()
        trainer.train()
    assert sum("torch's SGD trains" in line for line in said()) == 2


def zero1(folder, **changes):
    config = runs.deepspeed_config(runs.WAYS["zero1"])
    return {"deepspeed": config, "use_cpu": False, "bf16": False, **changes}


class TestUnderDeepSpeed:
    """transformers forgets the optimizer that it was given, and makes one by --optim."""

    @pytest.fixture(autouse=True)
    def _alone(self):
        pytest.importorskip("deepspeed")
        with deepspeed_alone(), runs.strategy(runs.Way(1, "flat", stage=1)):
            yield

    def test_ours_is_not_left_aside(self, tmp_path):
        trainer = passed_object(tmp_path, lambda p: hf_tam.TAM(p, lr=0.1), **zero1(tmp_path, optim="adamw_torch"))
        with pytest.raises(
            ValueError, match=r"leave the TAM of optimizers=\(...\) aside, and train with --optim adamw"
        ):
            trainer.train()

    @pytest.mark.long
    def test_a_class_of_ours_trains(self, tmp_path, said):
        trainer = passed_class(tmp_path, hf_tam.TAM, **zero1(tmp_path, optim="adamw_torch", max_steps=2))
        trainer.train()
        assert type(runs.unwrapped_twice(trainer.optimizer)) is hf_tam.TAM
        assert said() == []

    @pytest.mark.long
    def test_the_control_is_left_aside_without_a_word(self, tmp_path):
        """Why ours is refused; when this fails, transformers has mended it."""
        given = []

        def build(params):
            given.append(torch.optim.SGD(params, lr=0.1))
            return given[0]

        trainer = passed_object(tmp_path, build, **zero1(tmp_path, optim="adamw_torch", max_steps=2))
        trainer.train()
        assert type(trainer.optimizer.optimizer.optimizer) is torch.optim.AdamW

    @pytest.mark.long
    def test_another_one_than_was_named_is_said(self, tmp_path, said):
        """DeepSpeed warns of optimizers that it has not tested, and takes them."""
        config = zero1(tmp_path, max_steps=2)
        config["deepspeed"] = config["deepspeed"] | {"zero_allow_untested_optimizer": True}
        make_trainer(tmp_path, trainer=Overriding, **config).train()
        assert sum("torch's SGD trains" in line for line in said()) == 1
