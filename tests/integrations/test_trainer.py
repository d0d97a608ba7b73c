"""The Trainer with our optimizers: its arguments arrive, its features work, and a resumed run is the same run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_tam
from tests.integrations.untouched import TokenRows, tiny_llama


def training_arguments(folder, **changes):
    options = {
        "output_dir": str(folder),
        "optim": "adatamw",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**(options | changes))


def make_trainer(folder, *, model=None, callbacks=None, trainer=Trainer, optimizers=(None, None), **changes):
    return trainer(
        model=tiny_llama() if model is None else model,
        args=training_arguments(folder, **changes),
        train_dataset=TokenRows(32),
        eval_dataset=TokenRows(8),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def unwrapped(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def torques(optimizer):
    return [float(entry["torque"]) for entry in optimizer.state.values()]


def state_tensors(trainer):
    """Every parameter, and every state tensor of the optimizer, by name."""
    model = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    states = unwrapped(trainer).state_dict()["state"]
    return model | {f"{index}.{key}": value for index, entry in states.items() for key, value in entry.items()}


def assert_same_run(first, second):
    left, right = state_tensors(first), state_tensors(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(torch.as_tensor(left[name]), torch.as_tensor(right[name]))]
    assert different == []
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()


class TestArguments:
    @pytest.mark.parametrize(
        ("optim", "optimizer_class"), [("adatamw", hf_tam.AdaTAMW), ("adatam", hf_tam.AdaTAM), ("tam", hf_tam.TAM)]
    )
    def test_each_name_trains_with_its_class(self, tmp_path, optim, optimizer_class):
        trainer = make_trainer(tmp_path, optim=optim, weight_decay=0.1)
        trainer.train()
        optimizer = unwrapped(trainer)
        assert type(optimizer) is optimizer_class
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert len(set(torques(optimizer))) > 5

    def test_the_values_of_the_trainer_arrive(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            learning_rate=3e-4,
            weight_decay=0.2,
            adam_beta1=0.8,
            adam_beta2=0.95,
            adam_epsilon=1e-6,
            optim_args="gamma=0.7,damping_eps=1e-6,scope=model,step_size=paper,torque_steps=3,nonfinite=raise",
        )
        decayed, plain = trainer.create_optimizer().param_groups
        for group in (decayed, plain):
            assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
            assert (group["gamma"], group["damping_eps"], group["scope"]) == (0.7, 1e-6, "model")
            assert (group["step_size"], group["torque_steps"], group["nonfinite"]) == ("paper", 3, "raise")
        no_decay = {name for name, parameter in trainer.model.named_parameters() if "norm" in name}
        assert len(plain["params"]) == len(no_decay) == 3
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)

    def test_optim_args_win_over_the_adam_arguments(self, tmp_path):
        trainer = make_trainer(tmp_path, adam_beta1=0.8, optim_args="beta1=0.7,beta2=0.9,eps=1e-3,foreach=true")
        group = trainer.create_optimizer().param_groups[0]
        assert (group["betas"], group["eps"], group["foreach"]) == ((0.7, 0.9), 1e-3, True)

    def test_momentum_of_tam_comes_from_optim_args_only(self, tmp_path):
        assert make_trainer(tmp_path, optim="tam", adam_beta1=0.5).create_optimizer().defaults["momentum"] == 0.9
        assert make_trainer(tmp_path, optim="tam", optim_args="momentum=0.8").create_optimizer().defaults[
            "momentum"
        ] == pytest.approx(0.8)

    def test_class_and_kwargs_without_a_model_carry_the_weight_decay(self, tmp_path):
        """As LLaMA-Factory asks for them, to build param groups of its own."""
        args = training_arguments(tmp_path, weight_decay=0.3)
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert optimizer_class is hf_tam.AdaTAMW
        assert optimizer_class([torch.nn.Parameter(torch.ones(2))], **kwargs).param_groups[0]["weight_decay"] == 0.3

    def test_arguments_changed_after_their_creation_are_checked_when_used(self, tmp_path):
        args = training_arguments(tmp_path)
        args.optim_args = "gamma=0.5,"
        assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["gamma"] == 0.5
        args.optim_args = "betas=(0.9,0.99)"
        with pytest.raises(ValueError, match="use beta1"):
            Trainer.get_optimizer_cls_and_kwargs(args)

    def test_other_optimizers_still_get_theirs(self, tmp_path):
        args = training_arguments(tmp_path, optim="rmsprop", optim_args="momentum=0.5")
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert (optimizer_class, kwargs["lr"]) == (torch.optim.RMSprop, 1e-2)


class TestFeatures:
    def test_the_optimizer_knows_the_model(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        assert set(unwrapped(trainer).torque_stats()["names"]) == {n for n, _ in trainer.model.named_parameters()}

    def test_an_optimizer_of_the_users_own_knows_the_model_too(self, tmp_path):
        model = tiny_llama()
        optimizer = hf_tam.TAM(model.parameters(), lr=1e-2)
        make_trainer(tmp_path, model=model, optimizers=(optimizer, None)).train()
        assert None not in optimizer.torque_stats()["names"]

    @pytest.mark.long
    @pytest.mark.parametrize(
        "changes",
        [
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
            {"bf16": True, "lr_scheduler_type": "cosine", "warmup_steps": 2},
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "optim": "adatam"},
        ],
    )
    def test_training_lowers_the_loss(self, tmp_path, changes):
        trainer = make_trainer(tmp_path, max_steps=12, logging_steps=1, **changes)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 12
        assert float(losses[-1]) < float(losses[0]) - 0.05
        assert all(entry["torque"].dtype == torch.float32 for entry in unwrapped(trainer).state.values())

    @pytest.mark.long
    def test_gradient_accumulation_is_one_step(self, tmp_path):
        """4 rows at once, or 2 times 2: the same gradients, so the same run up to rounding."""
        runs = []
        for rows, accumulation in ((4, 1), (2, 2)):
            trainer = make_trainer(
                tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation
            )
            trainer.train()
            runs.append(trainer)
        whole, halves = (torch.tensor(torques(unwrapped(trainer))) for trainer in runs)
        torch.testing.assert_close(whole, halves, rtol=0, atol=1e-3)
        assert {float(entry["step"]) for entry in unwrapped(runs[1]).state.values()} == {6.0}

    def test_clipping_happens_before_the_step(self, tmp_path):
        class GradNorm(TrainerCallback):
            norms: list[float] = []  # noqa: RUF012

            def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                self.norms.append(float(unwrapped_optimizer(optimizer).torque_stats()["grad_norm"]))

        def unwrapped_optimizer(optimizer):
            return getattr(optimizer, "optimizer", optimizer)

        make_trainer(tmp_path, max_grad_norm=0.01, callbacks=[GradNorm()]).train()
        assert GradNorm.norms == pytest.approx([0.01] * 6, rel=1e-3)

    @pytest.mark.long
    def test_load_best_model_at_end(self, tmp_path):
        schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path, load_best_model_at_end=True, learning_rate=0.3, **schedule)
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        assert best.name == f"checkpoint-{min(losses, key=lambda step: float(losses[step]))}"
        assert float(trainer.evaluate()["eval_loss"]) == pytest.approx(min(map(float, losses.values())), rel=1e-3)

    @pytest.mark.long
    def test_hyperparameter_search(self, tmp_path):
        optuna = pytest.importorskip("optuna")
        seen = set()

        class Witness(TrainerCallback):
            def on_train_end(self, args, state, control, optimizer=None, **kwargs):
                group = getattr(optimizer, "optimizer", optimizer).param_groups[0]
                seen.add((args.optim, args.optim_args, group["gamma"]))

        trainer = Trainer(
            model_init=tiny_llama,
            args=training_arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2),
            train_dataset=TokenRows(16),
            eval_dataset=TokenRows(8),
            callbacks=[Witness()],
        )
        choices = ["gamma=0.5", "gamma=0.7,"]
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"optim_args": trial.suggest_categorical("optim_args", choices)},
            sampler=optuna.samplers.GridSampler({"optim_args": choices}),
            n_trials=2,
            direction="minimize",
            backend="optuna",
        )
        assert seen == {("adatamw", "gamma=0.5", 0.5), ("adatamw", "gamma=0.7", 0.7)}

    @pytest.mark.long
    def test_loraplus_groups_keep_their_learning_rates(self, tmp_path):
        peft = pytest.importorskip("peft")
        from peft.optimizers import create_loraplus_optimizer

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_llama(), config)
        args = training_arguments(tmp_path, optim_args="gamma=0.5", lr_scheduler_type="constant")
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        rate = kwargs.pop("lr")
        optimizer = create_loraplus_optimizer(model, optimizer_class, lr=rate, loraplus_lr_ratio=16, **kwargs)
        trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None), lr_scheduler_type="constant")
        trainer.train()
        rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
        assert rates == {1e-2, 16e-2}
        assert {group["gamma"] for group in optimizer.param_groups} == {0.5}
        assert all("lora" in name for name in optimizer.torque_stats()["names"])
        assert any(torques(optimizer))


class TestResume:
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1}  # noqa: RUF012

    @pytest.mark.long
    @pytest.mark.parametrize(
        "changes",
        [{"optim": "adatamw"}, {"optim": "adatam", "bf16": True}, {"optim": "tam"}, {"optim_args": "scope=model"}],
    )
    def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(self, tmp_path, changes):
        uninterrupted = make_trainer(tmp_path, **self.saving, **changes)
        uninterrupted.train()
        resumed = make_trainer(tmp_path, **self.saving, **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert resumed.state.global_step == 6
        assert_same_run(uninterrupted, resumed)

    @pytest.mark.long
    @pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
    def test_a_run_goes_on_from_adamw(self, tmp_path, optim):
        make_trainer(tmp_path, optim=optim, **self.saving).train()
        saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
        loaded = {}

        class Witness(TrainerCallback):
            def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
                for index, entry in optimizer.state_dict()["state"].items():
                    loaded[index] = {key: torch.as_tensor(value).clone() for key, value in entry.items()}

        trainer = make_trainer(tmp_path, callbacks=[Witness()], **self.saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert loaded.keys() == saved.keys()
        for index, entry in saved.items():
            assert float(loaded[index]["torque"]) == 0.0
            assert float(loaded[index]["step"]) == float(entry["step"]) == 3.0
            assert torch.equal(loaded[index]["exp_avg_sq"], entry["exp_avg_sq"])
            first_moment = loaded[index]["exp_avg"] * loaded[index]["exp_avg_scale"]
            torch.testing.assert_close(first_moment, entry["exp_avg"], rtol=1e-6, atol=0)
        assert any(torques(unwrapped(trainer)))

    @pytest.mark.long
    def test_save_only_model_resumes_with_a_fresh_optimizer_when_asked_for(self, tmp_path, caplog):
        make_trainer(tmp_path, save_only_model=True, **self.saving).train()
        checkpoint = tmp_path / "checkpoint-3"
        assert not (checkpoint / "optimizer.pt").exists()
        trainer = make_trainer(tmp_path, save_only_model=True, **self.saving)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert {float(entry["step"]) for entry in unwrapped(trainer).state.values()} == {3.0}
        assert "the optimizer and the schedule start afresh" in caplog.text
        with pytest.raises(ValueError, match=r"optimizer\.pt is missing.*save_only_model=True"):
            make_trainer(tmp_path, **self.saving).train(resume_from_checkpoint=str(checkpoint))

    @pytest.mark.long
    def test_the_state_file_of_the_trainer_is_written_last(self, tmp_path):
        """What `require_resumable` rests on."""
        make_trainer(tmp_path, **self.saving).train()
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-3").iterdir()}
        assert max(times, key=times.get) == "trainer_state.json"
        assert {"optimizer.pt", "scheduler.pt", "optimizer.sha256"} < set(times)
        assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
