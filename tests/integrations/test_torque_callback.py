"""What TorqueCallback logs and writes, compared with what is computed here from the optimizer's state."""

import json
import logging

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import hf_tam
from hf_tam.torque_log import group_name, read_torque
from tests.integrations.test_trainer import make_trainer, training_arguments, unwrapped
from tests.integrations.untouched import tiny_llama
from tests.test_equivalence import Dispatched

OVERALL = ("cosine_mean", "damping_mean", "damping_p10", "damping_p90", "effective_lr", "skipped")


class Witness(TrainerCallback):
    """Stands before the TorqueCallback in the Trainer's list, as the reporters do; computes what must be logged."""

    def __init__(self):
        self.reported, self.expected, self._before = [], [], []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        dampings, rates, cosines = [], [], []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                torque = float(optimizer.state[parameter]["torque"])
                before = self._before[len(dampings)] if self._before else 0.0
                dampings.append((1 + torque) / 2)
                cosines.append((torque - group["gamma"] * before) / (1 - group["gamma"]))
                literal = group["step_size"] == "paper"
                rates.append(group["lr"] * (group["damping_eps"] + dampings[-1]) * (1 if literal else 2))
        self._before = [2 * damping - 1 for damping in dampings]
        values = [np.mean(cosines), np.mean(dampings), *np.quantile(dampings, [0.1, 0.9]), np.mean(rates), 0]
        self.expected.append({f"torque/{name}": value for name, value in zip(OVERALL, values, strict=True)})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.reported.append(dict(logs))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "torque.jsonl").read_text().splitlines()]


def lora_llama():
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))


def torque_values(row):
    return {name: value for name, value in row.items() if name.startswith("torque/")}


@pytest.mark.long
@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("adatamw", None),
        ("adatam", "gamma=0.5,damping_eps=0.125"),
        ("tam", "scope=model"),
        ("tam", "step_size=paper,damping_eps=0.25"),
        ("adatamw", "step_size=paper"),
    ],
)
def test_the_values_reach_the_reporters_and_the_history(tmp_path, optim, optim_args):
    """With accumulation, clipping, two param groups, warm-up and evaluations, which log no torque."""
    witness = Witness()
    trainer = make_trainer(
        tmp_path, callbacks=[witness, hf_tam.TorqueCallback], optim=optim, optim_args=optim_args, logging_steps=2,
        gradient_accumulation_steps=2, weight_decay=0.1, warmup_steps=2, eval_strategy="steps", eval_steps=2,
        learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    reported = [row for row in witness.reported if "loss" in row]
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(reported) == 3
    for seen, kept, expected in zip(reported, history, witness.expected[1::2], strict=True):
        assert torque_values(seen) == torque_values(kept)
        # fp32 states; the cosine is found from a difference of two of them
        assert torque_values(seen) == pytest.approx(expected, rel=1e-5, abs=3e-6)
    others = [row for row in (*witness.reported, *trainer.state.log_history) if "loss" not in row]
    assert len(others) == 8
    assert not any(torque_values(row) for row in others)


@pytest.mark.long
def test_one_row_for_each_layer_group(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[hf_tam.TorqueCallback()], logging_steps=3, max_grad_norm=0.5)
    trainer.train()
    rows = rows_of(tmp_path)
    groups = {
        "model.embed_tokens": 1, "model.layers.0.self_attn": 4, "model.layers.0.mlp": 3, "lm_head": 1,
        "model.layers.0.input_layernorm": 1, "model.layers.0.post_attention_layernorm": 1, "model.norm": 1,
    }  # fmt: skip
    assert [row["step"] for row in rows] == [3] * 7 + [6] * 7
    assert {row["group"]: row["num_tensors"] for row in rows[:7]} == groups
    optimizer = unwrapped(trainer)
    stats = optimizer.torque_stats()
    for row in rows[7:]:
        mine = torch.tensor([name.startswith(f"{row['group']}.") for name in stats["names"]])
        damping = stats["damping"][mine]
        assert row["damping_mean"] == pytest.approx(float(damping.mean()), abs=1e-6)
        assert (row["damping_min"], row["damping_max"]) == (float(damping.min()), float(damping.max()))
        assert row["cosine_mean"] == pytest.approx(float(stats["cosine"][mine].mean()), abs=1e-6)
        assert row["epoch"] == pytest.approx(0.75)
    total = sum(row["grad_norm"] ** 2 for row in rows[7:]) ** 0.5
    assert total == pytest.approx(float(stats["grad_norm"]), rel=1e-5)
    assert total == pytest.approx(0.5, rel=1e-4)  # after clipping


@pytest.mark.long
def test_the_matrices_of_an_adapter_are_apart(tmp_path):
    trainer = make_trainer(tmp_path, model=lora_llama(), callbacks=[hf_tam.TorqueCallback()], logging_steps=6)
    trainer.train()
    rows = {row["group"]: row for row in rows_of(tmp_path)}
    assert list(rows) == [
        f"model.layers.0.{part}.{side}" for part in ("self_attn", "mlp") for side in ("lora_A", "lora_B")
    ]
    logged = next(row for row in trainer.state.log_history if "loss" in row)
    states = unwrapped(trainer).state
    for side in ("lora_A", "lora_B"):
        torques = [float(states[value]["torque"]) for name, value in trainer.model.named_parameters() if side in name]
        assert len(torques) == 3
        assert logged[f"torque/{side}_damping_mean"] == pytest.approx((1 + np.mean(torques)) / 2, abs=1e-6)
    assert logged["torque/lora_A_damping_mean"] != logged["torque/lora_B_damping_mean"]


@pytest.mark.parametrize(
    ("parameter", "group"),
    [
        ("model.layers.13.self_attn.q_proj.weight", "model.layers.13.self_attn"),
        ("model.layers.3.input_layernorm.weight", "model.layers.3.input_layernorm"),
        ("model.layers.0.mlp.experts.7.down_proj.weight", "model.layers.0.mlp"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_B.default.weight", "model.layers.3.mlp.lora_B"),
        ("base_model.model.h.1.attn.c_attn.lora_magnitude_vector.default.weight", "h.1.attn.lora_magnitude_vector"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", "model.embed_tokens.lora_A"),
        ("base_model.model.score.modules_to_save.default.weight", "score"),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", "encoder.block.2.layer.1"),
        ("resnet.encoder.stages.0.layers.2.layer.1.convolution.weight", "resnet.encoder.stages.0.layers.2"),
        ("lm_head.weight", "lm_head"),
        ("0.weight", "0"),
        ("weight", "weight"),
        (None, "(unnamed)"),
    ],
)
def test_names_of_groups(parameter, group):
    assert group_name(parameter) == group


@pytest.mark.long
def test_another_optimizer_gets_one_warning_and_nothing_else(tmp_path, caplog):
    trainer = make_trainer(tmp_path, callbacks=[hf_tam.TorqueCallback()], optim="adamw_torch", logging_steps=2)
    trainer.train()
    warnings = [record.message for record in caplog.records if record.name == "hf_tam"]
    assert len(warnings) == 1
    assert warnings[0].startswith("TorqueCallback logs nothing: the optimizer is AdamW, not one of hf_tam.")
    assert not (tmp_path / "torque.jsonl").exists()
    assert not any(torque_values(row) for row in trainer.state.log_history)


@pytest.mark.long
def test_a_resumed_run_goes_on_with_the_file(tmp_path):
    """Rows past the checkpoint, and a last line that was cut short, are dropped."""
    options = {"callbacks": [hf_tam.TorqueCallback()], "logging_steps": 1}
    make_trainer(tmp_path, save_strategy="steps", save_steps=4, **options).train()
    path = tmp_path / "torque.jsonl"
    whole = path.read_text()
    assert len(whole.splitlines()) == 6 * 7
    path.write_text(whole[:-40])
    make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert path.read_text() == whole
    make_trainer(tmp_path, max_steps=1, **options).train()  # a new run begins a new file
    assert path.read_text().splitlines() == whole.splitlines()[:7]


@pytest.mark.long
@pytest.mark.parametrize("moment", ["begin", "append"])
def test_a_file_that_cannot_be_written_is_one_warning(tmp_path, caplog, moment):
    """A folder in its place: not even root can write it."""
    path = tmp_path / "torque.jsonl"

    class Vandal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                path.unlink()
                path.mkdir()

    callbacks = [hf_tam.TorqueCallback()]
    if moment == "begin":
        path.mkdir()
    else:
        callbacks.append(Vandal())
    trainer = make_trainer(tmp_path, callbacks=callbacks, logging_steps=1)
    trainer.train()
    (message,) = [record.message for record in caplog.records if record.name == "hf_tam"]
    assert message.startswith(f"{path} cannot be written (Is a directory): training goes on without it.")
    assert len([row for row in trainer.state.log_history if "torque/damping_mean" in row]) == 6


@pytest.mark.long
def test_a_log_file_with_damaged_bytes_does_not_stop_a_resumed_run(tmp_path):
    options = {"callbacks": [hf_tam.TorqueCallback()], "logging_steps": 2}
    make_trainer(tmp_path, save_strategy="steps", save_steps=4, **options).train()
    path = tmp_path / "torque.jsonl"
    kept = path.read_bytes()
    path.write_bytes(b"\xff\xfe\n" + kept)
    make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert path.read_bytes() == kept


class TestOptimArgs:
    @pytest.mark.long
    @pytest.mark.parametrize("optim", ["adatamw", "adatam", "tam"])
    def test_true_adds_the_callback(self, tmp_path, optim):
        trainer = make_trainer(tmp_path, optim=optim, optim_args="gamma=0.8,log_torque=true", logging_steps=3)
        trainer.train()
        assert [row["step"] for row in rows_of(tmp_path)] == [3] * 7 + [6] * 7
        assert isinstance(trainer.callback_handler.callbacks[0], hf_tam.TorqueCallback)
        assert "log_torque" not in unwrapped(trainer).param_groups[0]
        assert unwrapped(trainer).param_groups[0]["gamma"] == 0.8

    @pytest.mark.long
    def test_true_leaves_it_at_one(self, tmp_path):
        mine = hf_tam.TorqueCallback()
        trainer = make_trainer(tmp_path, optim_args="log_torque=true", callbacks=[mine], logging_steps=3)
        trainer.train()
        trainer.train()
        found = [item for item in trainer.callback_handler.callbacks if isinstance(item, hf_tam.TorqueCallback)]
        assert found == [mine]

    @pytest.mark.long
    def test_false_takes_it_away(self, tmp_path):
        callbacks = [hf_tam.TorqueCallback()]
        trainer = make_trainer(tmp_path, optim_args="log_torque=false", callbacks=callbacks, logging_steps=3)
        trainer.train()
        assert not (tmp_path / "torque.jsonl").exists()
        assert not any(torque_values(row) for row in trainer.state.log_history)

    @pytest.mark.long
    def test_without_it_nothing_is_logged(self, tmp_path):
        trainer = make_trainer(tmp_path, logging_steps=3)
        trainer.train()
        assert not any(torque_values(row) for row in trainer.state.log_history)

    def test_a_value_that_is_no_switch(self, tmp_path):
        with pytest.raises(ValueError, match=r"log_torque=maybe: log_torque must be true or false, got 'maybe'"):
            training_arguments(tmp_path, optim_args="log_torque=maybe")


def test_tensors_that_took_no_step_do_not_count(caplog):
    """One without a gradient, one that was skipped: their damping stays, their angle is not of this step."""
    caplog.set_level(logging.ERROR)
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = hf_tam.AdaTAMW(parameters, lr=0.5)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones(3)
        if step == 2:
            parameters[1].grad = None
            parameters[2].grad = torch.full((3,), torch.nan)
            with pytest.warns(RuntimeWarning, match="were skipped"):
                optimizer.step()
        else:
            optimizer.step()
    torques = [0.9 * 0.1 + 0.1, 0.1, 0.1]  # cosines 0, 1, and 1 again for the first alone
    reading = read_torque(optimizer)
    assert [tensor.damping for tensor in reading.tensors] == pytest.approx([(1 + torque) / 2 for torque in torques])
    summary = reading.summary()
    assert summary["torque/cosine_mean"] == pytest.approx(1.0)
    assert summary["torque/effective_lr"] == pytest.approx(0.5 * (1 + torques[0]), rel=1e-6)
    assert summary["torque/skipped"] == 1
    (row,) = reading.rows(step=3, epoch=None)
    assert row["num_tensors"] == 3
    assert row["grad_norm"] == pytest.approx(3**0.5)  # of the one gradient that there was


@pytest.mark.long
def test_after_the_warm_up_the_learning_rate_is_the_groups(tmp_path):
    trainer = make_trainer(
        tmp_path, callbacks=[hf_tam.TorqueCallback()], optim_args="torque_steps=3", logging_steps=1,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    rates = [row["torque/effective_lr"] for row in trainer.state.log_history if "loss" in row]
    assert rates[3:] == pytest.approx([1e-2] * 3, rel=1e-6)
    assert all(abs(rate - 1e-2) > 1e-6 for rate in rates[1:3])


def test_reading_asks_the_device_once():
    """Scalars that are read one by one would each wait for an accelerator."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(20)]
    optimizer = hf_tam.AdaTAMW(parameters, capturable=True)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    with Dispatched() as dispatched:
        reading = read_torque(optimizer)
    assert len(reading.tensors) == 20
    assert dispatched.count("_local_scalar_dense") == 0
    assert dispatched.names[-1] == "aten.cat.default"  # what is brought to the host


def test_what_is_frozen_does_not_count():
    """An optimizer over all of a model with an adapter has hundreds of tensors that are never stepped."""
    frozen = [torch.nn.Parameter(torch.ones(3), requires_grad=False) for _ in range(9)]
    trained = torch.nn.Parameter(torch.ones(3))
    named = [(f"base.layers.0.w{index}", parameter) for index, parameter in enumerate(frozen)]
    optimizer = hf_tam.AdaTAMW([*named, ("base.layers.0.lora_A.default.weight", trained)], lr=0.1)
    assert "torque/damping_mean" not in read_torque(optimizer).summary()  # before the first step
    for _ in range(2):
        trained.grad = torch.ones(3)
        optimizer.step()
    reading = read_torque(optimizer)
    assert len(reading.tensors) == 10
    assert reading.summary()["torque/damping_mean"] == pytest.approx(0.55)
    assert reading.summary()["torque/damping_p10"] == pytest.approx(0.55)
    (row,) = reading.rows(step=2, epoch=None)
    assert row["num_tensors"] == 1


def test_what_accelerate_wraps_is_read_and_exported():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hf_tam.AdaTAMW([parameter], lr=0.1)
    accelerate.Accelerator(cpu=True)  # which a wrapper asks for
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer)
    parameter.grad = torch.ones(3)
    wrapped.step()
    assert read_torque(wrapped).summary() == read_torque(optimizer).summary()
    exported = hf_tam.export_torch_state_dict(wrapped)
    assert exported["state"][0]["step"] == 1
    with pytest.raises(TypeError, match="read_torque takes an optimizer of hf_tam, got AdamW"):
        read_torque(torch.optim.AdamW([parameter]))
    with pytest.raises(TypeError, match="takes an optimizer of hf_tam, got AcceleratedOptimizer"):
        hf_tam.export_torch_state_dict(accelerate.optimizer.AcceleratedOptimizer(torch.optim.AdamW([parameter])))
