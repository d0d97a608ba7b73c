"""DeepSpeed settings that would train another optimizer, silently, are refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import hf_tam
from hf_tam.integrations.deepspeed.checkpoint import first_harm, shards_in
from hf_tam.integrations.deepspeed.config import refuse_swap_in_config
from hf_tam.integrations.deepspeed.patches import refuse_split_model_scope
from hf_tam.integrations.transformers.checkpoint import require_resumable
from tests.integrations.test_trainer import make_trainer
from tests.integrations.untouched import tiny_llama

BLOCK = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}, "zero_optimization": {"stage": 2}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BLOCK, ['"optimizer" block', "AdamW", "remove it"]),
        (OFFLOAD, ['"zero_force_ds_cpu_optimizer": false', "DeepSpeedCPUAdam"]),
        (OFFLOAD | {"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer"]),
    ],
)
def test_a_swap_is_refused(config, words):
    with pytest.raises(ValueError, match="would replace") as caught:
        refuse_swap_in_config(config)
    assert [word for word in words if word not in str(caught.value)] == []


def zero(**settings):
    return {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 3, **settings}}


@pytest.mark.parametrize(
    ("config", "name", "remedy"),
    [
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), '"offload_optimizer.ratio"', "Set it to 1"),
        (zero(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload", "Remove it"),
        (zero(offload_optimizer={"device": "nvme"}), "nvme", '"device": "cpu"'),
        (zero(offload_param={"device": "nvme"}), "offload_param.device: nvme", '"device": "cpu"'),
        (zero(zenflow={"topk_ratio": 0.1}), '"zenflow"', "Remove it"),
        (zero(elastic_checkpoint=True), '"elastic_checkpoint"', "universal checkpoint"),
        (zero(stage=1, round_robin_gradients=True), '"round_robin_gradients"', "Remove it"),
        (zero(mics_shard_size=2), '"mics_shard_size"', "Remove it"),
        (zero() | {"tensor_parallel": {"autotp_size": 2}}, "autotp_size", "tp_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size", "tp_size"),
        (zero() | {"expert_parallel": {"enabled": True, "autoep_size": 2}}, '"expert_parallel"', "transformers' own"),
        (zero() | {"sequence_parallel_size": 2, "data_parallel_size": 1}, "sequence_parallel_size", "sp_backend"),
        (zero() | {"hybrid_engine": {"enabled": True}}, '"hybrid_engine"', "Remove it"),
        (zero() | {"weight_quantization": {"post_init_quant": {}}}, '"weight_quantization"', "Remove it"),
        (zero() | {"compile": {"deepcompile": True, "passes": ["z3", "autotp"]}}, "compile.passes: autotp", "Remove"),
        (zero() | {"compile": {"offload_opt_states": True}}, "compile.offload_opt_states", "Remove it"),
        ({"bf16": {"enabled": True}}, "bf16 without ZeRO", '"stage": 1'),
        ({"bfloat16": {"enabled": True}, "zero_optimization": False}, "bfloat16 without ZeRO", '"stage": 1'),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16 without ZeRO", '"stage": 1'),
    ],
)
def test_settings_that_hide_tensors_are_refused(config, name, remedy):
    with pytest.raises(ValueError, match="does not go with an optimizer of hf_tam") as caught:
        refuse_swap_in_config(config)
    assert name in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": True, "bf16": {"enabled": True}},
        {"zero_optimization": {"stage": 0, "round_robin_gradients": True}, "sequence_parallel_size": 2},
        zero(round_robin_gradients=True, parameter_alignment=True, zero_hpz_partition_size=2),
        {"expert_parallel": {"enabled": False}, "hybrid_engine": {"enabled": False}, "compile": {"passes": None}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": None}},
        OFFLOAD | {"zero_force_ds_cpu_optimizer": False},
        zero(offload_optimizer={"device": "cpu", "ratio": 1.0}, mics_shard_size=-1, zenflow=None),
        {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 0}},
    ],
)
def test_what_keeps_the_optimizer_is_accepted(config):
    refuse_swap_in_config(config)


@pytest.mark.parametrize("config", [BLOCK, OFFLOAD | {"zero_force_ds_cpu_optimizer": True}])
def test_training_arguments_refuse_before_training(tmp_path, config, monkeypatch):
    """A file that only says what everybody's says is accepted: tests/field/test_deepspeed_stock_files.py."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": "auto"}))
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False}
    with pytest.raises(ValueError, match="would replace"):
        TrainingArguments(optim="adatamw", deepspeed=str(path), **options)
    TrainingArguments(optim="adamw_torch", deepspeed=str(path), **options)


def test_the_settings_of_accelerate_launch_are_read_too(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False}
    config = TrainingArguments(optim="adatamw", **options).deepspeed_plugin.deepspeed_config
    assert config["zero_force_ds_cpu_optimizer"] is False
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme")
    with pytest.raises(ValueError, match=r"offload_optimizer\.device: nvme"):
        TrainingArguments(optim="adatamw", **options)


def test_an_optimizer_that_is_not_selected_by_name_is_protected_too(tmp_path, monkeypatch):
    model = tiny_llama()
    optimizer = hf_tam.TAM(model.parameters())
    trainer = make_trainer(tmp_path, model=model, optim="sgd", optimizers=(optimizer, None))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=BLOCK))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    with pytest.raises(ValueError, match='"optimizer" block'):
        trainer.train()


def test_scope_model_is_refused_before_training_where_it_would_be_split():
    optimizer = hf_tam.AdaTAMW([torch.nn.Parameter(torch.zeros(2))], scope="model")
    refuse_split_model_scope(SimpleNamespace(bit16_groups=[[1]]), optimizer)
    refuse_split_model_scope(None, optimizer)
    for parts in ({"bit16_groups": [[1], [2]]}, {"fp16_groups": [[1], [2], [3]]}):
        with pytest.raises(ValueError, match=r"hands them over in [23] parts.*use scope='tensor'"):
            refuse_split_model_scope(SimpleNamespace(**parts), optimizer)
    other = hf_tam.AdaTAMW([torch.nn.Parameter(torch.zeros(2))])
    refuse_split_model_scope(SimpleNamespace(bit16_groups=[[1], [2]]), other)


def shards(folder, ranks, *, tag="global_step4", prefix="zero_pp_rank_"):
    (folder / tag).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    for rank in ranks:
        torch.save({"rank": rank}, folder / tag / f"{prefix}{rank}_mp_rank_00_optim_states.pt")
    torch.save({}, folder / tag / "mp_rank_00_model_states.pt")
    return folder


class TestShards:
    @pytest.mark.parametrize("prefix", ["zero_pp_rank_", "bf16_zero_pp_rank_"])
    def test_all_there(self, tmp_path, prefix):
        folder = shards(tmp_path, [0, 1], prefix=prefix)
        assert first_harm(folder, world_size=2) is None
        assert len(shards_in(folder / "global_step4")) == 3

    def test_one_missing_is_named(self, tmp_path):
        harm = first_harm(shards(tmp_path, [0, 2]), world_size=3)
        assert harm == f"{tmp_path}/global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"

    def test_another_number_of_processes(self, tmp_path):
        harm = first_harm(shards(tmp_path, [0, 1]), world_size=4)
        assert "has the optimizer shards of 2 process(es), and 4 are to load them" in harm
        assert "ds_to_universal" in harm
        (tmp_path / "latest_universal").write_text("universal")
        assert first_harm(tmp_path, world_size=4, config={"checkpoint": {"load_universal": True}}) is None
        assert first_harm(tmp_path, world_size=4) == harm

    @pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
    def test_one_cut_off_is_named(self, tmp_path, name):
        path = shards(tmp_path, [0, 1]) / "global_step4" / name
        path.write_bytes(path.read_bytes()[:-20])
        assert first_harm(tmp_path, world_size=2) == f"{path} is cut off or not a torch.save file"

    def test_nothing_there(self, tmp_path):
        assert "has no optimizer shards of DeepSpeed's" in first_harm(tmp_path, world_size=1)
        folder = shards(tmp_path, [0])
        (folder / "latest").unlink()
        assert first_harm(folder, world_size=1) == f"{tmp_path}/latest is missing"

    def test_the_trainer_refuses_them_before_training(self, tmp_path):
        folder = shards(tmp_path / "checkpoint-4", [0, 1])
        (folder / "trainer_state.json").write_text("{}")
        require_resumable(folder, strategy="deepspeed", weights_only_wanted=False, world_size=2)
        with pytest.raises(ValueError, match=r"shards of 2 process\(es\), and 3 are to load.*no other complete"):
            require_resumable(folder, strategy="deepspeed", weights_only_wanted=False, world_size=3)
