"""`--optim_args fused_clip=true`: the optimizer clips in its step, and the Trainer logs the norm that it saw."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import hf_tam
from hf_tam.integrations.transformers import patches as integration
from hf_tam.integrations.transformers.optim_args import parse_optim_args
from tests.integrations.test_trainer import assert_same_run, make_trainer, state_tensors, training_arguments, unwrapped
from tests.integrations.untouched import tiny_llama

STEPS = 20
OPTIONS = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1,
           "lr_scheduler_type": "cosine", "learning_rate": 2e-3, "warmup_steps": 4, "logging_steps": 1}  # fmt: skip
INSIDE = "fused_clip=true"


def norms_of(trainer):
    return [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]


def model_of(lora):
    if not lora:
        return tiny_llama()
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))


def trained(folder, **options):
    trainer = make_trainer(folder, **{**OPTIONS, **options})
    trainer.train()
    return trainer


@pytest.fixture
def clipped(monkeypatch):
    """The max_norm of each call of accelerate's clipping, by which every Trainer clips and measures."""
    calls, original = [], Accelerator.clip_grad_norm_

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        calls.append(max_norm)
        return original(self, parameters, max_norm, norm_type)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip_grad_norm_)
    return calls


class BreakGradient(TrainerCallback):
    """Puts a NaN into one gradient of step 3."""

    def __init__(self, name):
        self.name = name

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.get_parameter(self.name).grad.view(-1)[0] = math.nan


class TestSameRun:
    @pytest.mark.long
    @pytest.mark.parametrize(
        ("optim", "lora"),
        [
            ("adatamw", False),
            ("tam", True),
            pytest.param("adatamw", True, marks=pytest.mark.slow),
            pytest.param("adatam", False, marks=pytest.mark.slow),
        ],
    )
    def test_as_the_trainers_own_clipping(self, tmp_path, clipped, optim, lora):
        limit = 1e-4 if lora else 0.1  # the gradients of these adapters are small
        own = trained(tmp_path, optim=optim, model=model_of(lora), max_grad_norm=limit)
        assert clipped == [limit] * STEPS
        inside = trained(tmp_path, optim=optim, model=model_of(lora), max_grad_norm=limit, optim_args=INSIDE)
        assert len(clipped) == STEPS  # none more
        assert {group["max_grad_norm"] for group in unwrapped(inside).param_groups} == {limit}
        assert norms_of(inside) == pytest.approx(norms_of(own), rel=1e-4)
        assert len(norms_of(inside)) == STEPS
        assert min(norms_of(inside)) > limit
        left, right = state_tensors(own), state_tensors(inside)
        for name, value in left.items():
            torch.testing.assert_close(
                torch.as_tensor(right[name]), torch.as_tensor(value), rtol=1e-4, atol=1e-6, msg=name
            )

    @pytest.mark.long
    def test_the_limit_decides(self, tmp_path):
        """The comparison above can fail: another limit leads elsewhere."""
        weights = [
            trained(tmp_path, optim="tam", optim_args=INSIDE, max_grad_norm=limit, max_steps=6).model.lm_head.weight
            for limit in (0.1, 0.2)
        ]
        assert (weights[0] - weights[1]).abs().max() > 1e-5

    @pytest.mark.long
    def test_nothing_to_clip_to(self, tmp_path, clipped):
        own = trained(tmp_path, max_grad_norm=0, max_steps=4)
        calls = list(clipped)
        inside = trained(tmp_path, max_grad_norm=0, max_steps=4, optim_args=INSIDE)
        assert clipped == calls * 2
        assert norms_of(inside) == norms_of(own)
        assert_same_run(own, inside)

    @pytest.mark.long
    def test_a_resumed_run_is_the_uninterrupted_one(self, tmp_path):
        saving = {"save_strategy": "steps", "save_steps": 4, "optim_args": INSIDE, "max_steps": 8}
        uninterrupted = trained(tmp_path, **saving)
        resumed = make_trainer(tmp_path, **{**OPTIONS, **saving})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_same_run(uninterrupted, resumed)
        assert norms_of(resumed) == norms_of(uninterrupted)
        for optim_args, limit in ((INSIDE, 0.2), (None, None)):  # what the new arguments say holds
            changed = make_trainer(
                tmp_path, **{**OPTIONS, "max_steps": 5, "max_grad_norm": 0.2, "optim_args": optim_args}
            )
            changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
            assert {group["max_grad_norm"] for group in unwrapped(changed).param_groups} == {limit}


class TestWho:
    @pytest.mark.long
    @pytest.mark.parametrize(
        ("mine", "theirs", "expected"), [(0.3, 0.5, 0), (0.5, 0.3, 2), (0.3, 0.0, 0), (None, 0.5, 2)]
    )
    def test_an_optimizer_of_the_users_own(self, tmp_path, clipped, mine, theirs, expected):
        """Its own limit replaces the Trainer's where it is the smaller one."""
        model = tiny_llama()
        optimizer = hf_tam.AdaTAMW(model.parameters(), lr=1e-3, max_grad_norm=mine)
        trained(tmp_path, model=model, optimizers=(optimizer, None), max_grad_norm=theirs, max_steps=2)
        assert len(clipped) == expected

    def test_other_optimizers_are_clipped_by_the_trainer(self, tmp_path, clipped):
        trainer = trained(tmp_path, optim="adamw_torch", max_steps=2)
        assert clipped == [0.5] * 2
        assert len(norms_of(trainer)) == 2

    def test_both_methods_are_taken_over(self):
        if hasattr(Trainer, "_clip_grad_norm"):  # transformers 5.2 has none
            assert {"Trainer._clip_grad_norm", "Trainer._get_grad_norm"} <= set(integration.patched)

    def test_deepspeed_is_left_to_its_engine(self, tmp_path):
        args = training_arguments(tmp_path, optim_args=INSIDE)
        assert integration.optimizer_class_and_kwargs(args)[1]["max_grad_norm"] == 1.0
        args.deepspeed_plugin = object()
        assert integration.optimizer_class_and_kwargs(args)[1]["max_grad_norm"] is None

    def test_the_engine_is_named(self, tmp_path, caplog, monkeypatch):
        trainer = make_trainer(tmp_path, optim_args=INSIDE)
        monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
        with caplog.at_level(logging.INFO, "hf_tam"):
            integration._prepare(trainer)
        assert "DeepSpeed's engine clips" in caplog.text

    def test_the_key(self):
        assert parse_optim_args("tam", "fused_clip=yes") == {"fused_clip": True}
        with pytest.raises(ValueError, match=r"'max_grad_norm', unknown .*use --max_grad_norm, and fused_clip=true"):
            parse_optim_args("adatamw", "max_grad_norm=0.5")


class TestNonfinite:
    @pytest.mark.long
    @pytest.mark.filterwarnings("ignore:.*were skipped")
    def test_one_nan_costs_one_tensor_one_update(self, tmp_path):
        """The Trainer's own clipping would spread it to every gradient; the log says NaN for that step in both."""
        name = "lm_head.weight"
        inside = trained(tmp_path, optim_args=INSIDE, callbacks=[BreakGradient(name)], max_steps=5)
        optimizer = unwrapped(inside)
        names, stats = optimizer.torque_stats()["names"], optimizer.torque_stats()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        steps = {n: int(optimizer.state[parameter]["step"]) for n, parameter in zip(names, parameters, strict=True)}
        assert steps == {n: 4 if n == name else 5 for n in names}
        assert int(stats["skipped"]) == 1
        assert [math.isnan(norm) for norm in norms_of(inside)] == [False, False, True, False, False]
        assert all(bool(parameter.isfinite().all()) for parameter in parameters)
        own = trained(tmp_path, callbacks=[BreakGradient(name)], max_steps=5)
        assert int(unwrapped(own).torque_stats()["skipped"]) == len(names)

    @pytest.mark.long
    def test_raised(self, tmp_path):
        with pytest.raises(FloatingPointError, match=r"parameter lm_head\.weight is not finite"):
            trained(tmp_path, optim_args=f"{INSIDE},nonfinite=raise", callbacks=[BreakGradient("lm_head.weight")])
