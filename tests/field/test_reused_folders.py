"""Output folders that another optimizer, another kind of sharding or another run had used before.

What a resumed run is judged by is what it would load; remains of others beside it do not count.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from transformers import Trainer

import hf_tam
from hf_tam.integrations.deepspeed.checkpoint import first_harm
from hf_tam.integrations.transformers.checkpoint import require_resumable
from tests.field.deepspeed_alone import deepspeed_alone
from tests.field.test_deepspeed_universal import start
from tests.field.test_deepspeed_universal import train as take_steps
from tests.integrations.test_trainer import assert_same_run, make_trainer, state_tensors, torques, unwrapped
from tests.sharding import framework_runs as runs
from tests.sharding.zero_engine import configuration

# The engine's runs move lr by hand, without a scheduler that would note where it began.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint's hyperparameters override the requested ones. lr=")

ADAMW = {"optim": "adamw_torch", "optim_args": None}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def run(folder, checkpoint=None, **changes):
    """Train for four steps and save at the second and the last, or go on from a checkpoint to the fifth."""
    options = SAVING | changes
    if checkpoint:
        options |= {"max_steps": 5, "save_strategy": "no"}
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def adamws(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adamws")
    run(folder, **ADAMW)
    return folder


@pytest.fixture
def folder(ours, tmp_path):
    """What a run of ours has left."""
    return Path(shutil.copytree(ours, tmp_path / "run"))


def without_hf_tam(adamws, folder):
    """As by a run of AdamW in an environment that has not got hf_tam: its files go over those that lie there."""
    shutil.copytree(adamws, folder, dirs_exist_ok=True)


@pytest.mark.long
def test_adamw_goes_on_in_a_folder_where_ours_had_run(folder, adamws):
    assert (folder / "checkpoint-4" / "optimizer.sha256").exists()
    run(folder, **ADAMW)
    assert not (folder / "checkpoint-4" / "optimizer.sha256").exists()
    resumed = run(folder, True, **ADAMW)
    assert_same_run(resumed, run(adamws, True, **ADAMW))


@pytest.mark.long
def test_adamw_goes_on_where_hf_tam_was_not_there_when_it_wrote(folder, adamws):
    without_hf_tam(adamws, folder)
    assert (folder / "checkpoint-4" / "optimizer.sha256").exists()
    assert_same_run(run(folder, True, **ADAMW), run(adamws, True, **ADAMW))


@pytest.mark.long
def test_ours_takes_over_what_adamw_wrote_over_its_own(folder, adamws):
    without_hf_tam(adamws, folder)
    resumed = run(folder, True)
    assert type(unwrapped(resumed)) is hf_tam.AdaTAMW
    assert_same_run(resumed, run(adamws, True))


@pytest.mark.long
def test_ours_goes_on_in_a_folder_where_adamw_had_run(adamws, ours, tmp_path):
    folder = Path(shutil.copytree(adamws, tmp_path / "run"))
    run(folder)
    assert_same_run(run(folder, True), run(ours, True))


@pytest.mark.long
def test_the_newest_checkpoint_is_judged_whoever_wrote_the_others(folder):
    """AdamW's run is shorter: the last checkpoint is one of ours, and is what the Trainer would take."""
    run(folder, max_steps=2, **ADAMW)
    with pytest.raises(ValueError, match=r"checkpoint-4/optimizer\.pt was saved by an optimizer of hf_tam"):
        run(folder, True, **ADAMW)
    assert run(folder, str(folder / "checkpoint-2"), **ADAMW).state.global_step == 5


def test_our_state_is_known_without_its_checksums(folder):
    (folder / "checkpoint-4" / "optimizer.sha256").unlink()
    with pytest.raises(
        ValueError, match=r"was saved by an optimizer of hf_tam, and --optim adamw_torch would misread"
    ):
        run(folder, True, **ADAMW)


@pytest.mark.long
def test_what_was_exported_in_its_place_goes_on_at_once(folder):
    """As the refusal says; the checksums that are left do not speak of it."""
    trainer = run(folder, True)
    exported = hf_tam.export_torch_state_dict(unwrapped(trainer))
    torch.save(exported, folder / "checkpoint-4" / "optimizer.pt")
    assert run(folder, True, **ADAMW).state.global_step == 5


class MakesAdamW(Trainer):
    def create_optimizer(self, model=None):
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = [
            {"params": [parameter for name, parameter in self.model.named_parameters() if (name in decayed) is decays]}
            for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        return self.optimizer


def test_a_script_that_overrides_what_it_names_does_not_misread(folder):
    """Named is ours, made is another one: known when it has been loaded."""
    with pytest.raises(ValueError, match=r"checkpoint-4 was saved by an optimizer of hf_tam, and AdamW would misread"):
        run(folder, True, trainer=MakesAdamW)


@pytest.mark.long
@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer_0"])
def test_remains_of_fsdp_beside_the_checkpoint_of_one_process(folder, name):
    """Cut off where they are of a run that was killed, or, as shards, because the folder was written anew.

    The models that FSDP leaves are refused by transformers itself, with any optimizer.
    """
    remains = folder / "checkpoint-4" / name
    if name.endswith("_0"):
        remains.mkdir()
        (remains / "__0_0.distcp").write_bytes(b"cut off")
    else:
        remains.write_bytes(b"cut off")
    assert run(folder, True).state.global_step == 5
    again = run(folder)  # saves over it
    assert again.state.global_step == 4
    assert "fsdp" not in (folder / "checkpoint-4" / "optimizer.sha256").read_text()
    assert run(folder, True).state.global_step == 5


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("fsdp_full", ("optimizer.bin", "pytorch_model_fsdp.bin")),
        ("fsdp_sharded", ("optimizer_0", "pytorch_model_fsdp_0")),
    ],
)
def test_remains_of_one_process_beside_the_checkpoint_of_fsdp(folder, strategy, names):
    checkpoint = folder / "checkpoint-4"
    for name in names:
        if name.endswith("_0"):
            dcp.save({"x": torch.ones(2)}, checkpoint_id=checkpoint / name, no_dist=True)
        else:
            torch.save({}, checkpoint / name)
    (checkpoint / "optimizer.pt").write_bytes(b"cut off")
    require_resumable(checkpoint, strategy=strategy, weights_only_wanted=False)
    with pytest.raises(ValueError, match=r"optimizer\.pt is cut off"):
        require_resumable(checkpoint, strategy="whole", weights_only_wanted=False)


def test_a_run_that_saves_only_the_model_drops_the_checksums_of_the_last(folder):
    run(folder, save_only_model=True)
    assert not (folder / "checkpoint-4" / "optimizer.sha256").exists()


@pytest.mark.long
def test_rotation_removes_whole_checkpoints_and_leaves_the_last(folder, ours):
    run(folder, save_total_limit=1)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_same_run(run(folder, True), run(ours, True))


@pytest.mark.long
def test_a_copy_under_another_name_goes_on(folder, ours, tmp_path):
    """As on another machine; without the checksums it is taken as it is."""
    copied = Path(shutil.copytree(folder / "checkpoint-4", tmp_path / "other" / "epoch one"))
    expected = state_tensors(run(ours, True))
    for checksums in (True, False):
        if not checksums:
            (copied / "optimizer.sha256").unlink()
        resumed = state_tensors(run(tmp_path / "new", str(copied)))
        assert all(torch.equal(torch.as_tensor(resumed[name]), torch.as_tensor(expected[name])) for name in expected)


class TestAccelerate:
    def prepare(self, kind):
        from accelerate import Accelerator

        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        model = nn.Linear(4, 3)
        model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
        for _ in range(3):
            accelerator.backward(model(torch.ones(2, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return accelerator, optimizer

    def test_adamws_state_over_ours(self, tmp_path):
        self.prepare(hf_tam.AdaTAMW)[0].save_state(str(tmp_path))
        noted = (tmp_path / "complete.json").read_bytes()
        self.prepare(torch.optim.AdamW)[0].save_state(str(tmp_path))
        assert not (tmp_path / "complete.json").exists()
        (tmp_path / "complete.json").write_bytes(noted)  # as if hf_tam had not been there
        self.prepare(torch.optim.AdamW)[0].load_state(str(tmp_path))
        accelerator, optimizer = self.prepare(hf_tam.AdaTAMW)
        accelerator.load_state(str(tmp_path))
        assert torques(optimizer.optimizer) == [0.0, 0.0]
        assert {float(state["step"]) for state in optimizer.optimizer.state.values()} == {3.0}

    def test_adamw_does_not_misread_ours(self, tmp_path):
        self.prepare(hf_tam.AdaTAMW)[0].save_state(str(tmp_path))
        with pytest.raises(ValueError, match="was saved by an optimizer of hf_tam, and AdamW would misread its first"):
            self.prepare(torch.optim.AdamW)[0].load_state(str(tmp_path))

    def test_remains_of_shards_beside_it(self, tmp_path):
        (tmp_path / "optimizer_0").mkdir()
        (tmp_path / "optimizer_0" / "__0_0.distcp").write_bytes(b"cut off")
        (tmp_path / "pytorch_model_fsdp.bin").write_bytes(b"cut off")
        self.prepare(hf_tam.AdaTAMW)[0].save_state(str(tmp_path))
        assert "optimizer_0" not in (tmp_path / "complete.json").read_text()
        shutil.rmtree(tmp_path / "optimizer_0")
        self.prepare(hf_tam.AdaTAMW)[0].load_state(str(tmp_path))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


class TestDeepSpeed:
    @pytest.fixture(autouse=True)
    def _alone(self):
        pytest.importorskip("deepspeed")
        with deepspeed_alone() as self.deepspeed:
            yield

    def test_adamw_does_not_misread_ours_without_zero(self, tmp_path):
        engines = []
        for kind in (hf_tam.AdaTAMW, torch.optim.AdamW):
            model = nn.Linear(5, 3)
            optimizer = kind(model.parameters(), lr=0.02)
            engines.append(self.deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(0))[0])
        engines[0].backward(engines[0](torch.ones(2, 5)).sum())
        engines[0].step()
        engines[0].save_checkpoint(tmp_path, tag="step")
        with pytest.raises(ValueError, match="was saved by an optimizer of hf_tam, and AdamW would misread its first"):
            engines[1].load_checkpoint(tmp_path, tag="step")

    @pytest.mark.long
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_adamw_does_not_misread_ours(self, tmp_path, stage):
        trained = start(stage, num_groups=1)
        take_steps(trained, range(2))
        trained.engine.save_checkpoint(tmp_path, tag="step")
        with pytest.raises(ValueError, match="was saved by an optimizer of hf_tam, and AdamW would misread its first"):
            start(stage, optimizer=adamw).engine.load_checkpoint(tmp_path, tag="step")

    @pytest.mark.long
    @pytest.mark.parametrize("stage", [1, 3])
    def test_remains_of_more_processes_and_of_another_precision(self, tmp_path, stage):
        """DeepSpeed loads as many shards as it has noted, from the folder that `latest` names."""
        trained = start(stage)
        take_steps(trained, range(2))
        trained.engine.save_checkpoint(tmp_path, tag="global_step2")
        (shard,) = (tmp_path / "global_step2").glob("*zero_pp_rank_0*_optim_states.pt")
        for name in (
            shard.name.replace("rank_0", "rank_1", 1),
            shard.name.replace("zero_pp_rank_0", "zero_pp_rank_7"),
        ):
            (shard.parent / name).write_bytes(b"cut off")
        shutil.copytree(tmp_path / "global_step2", tmp_path / "global_step10")
        (tmp_path / "global_step10" / shard.name).write_bytes(b"cut off")
        assert first_harm(tmp_path, world_size=1) is None
        start(stage).engine.load_checkpoint(tmp_path)
        assert "shards of 1 process(es), and 2 are to load them" in first_harm(tmp_path, world_size=2)
        (tmp_path / "latest").write_text("global_step10")
        assert first_harm(tmp_path, world_size=1) == f"{tmp_path}/global_step10/{shard.name} is cut off or not a " + (
            "torch.save file"
        )
        (tmp_path / "latest").write_text("global_step11")
        assert first_harm(tmp_path, world_size=1).startswith(f"{tmp_path}/global_step11 has no optimizer shards")

    def test_a_machine_with_the_shards_of_its_own_processes_only(self, tmp_path):
        """ "use_node_local_storage", which --save_on_each_node sets."""
        folder = tmp_path / "step"
        folder.mkdir()
        (tmp_path / "latest").write_text("step")
        for rank in (2, 3):
            torch.save({}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        assert "zero_pp_rank_0_mp_rank_00_optim_states.pt is missing" in first_harm(tmp_path, world_size=4)
        local = {"zero_optimization": {"stage": 2}, "checkpoint": {"use_node_local_storage": True}}
        assert first_harm(tmp_path, world_size=4, config=local) is None

    def test_a_universal_checkpoint_is_taken_where_it_is_asked_for(self, tmp_path):
        (tmp_path / "latest_universal").write_text("universal")
        assert 'set "checkpoint": {"load_universal": true}' in first_harm(tmp_path, world_size=1)
        universal = {"checkpoint": {"load_universal": True}}
        assert first_harm(tmp_path, world_size=1, config=universal) is None

    @pytest.mark.long
    @pytest.mark.parametrize("stage", [0, 1])
    def test_the_trainer_goes_on_without_zero_too(self, tmp_path, stage):
        """Without ZeRO there are no shards: the optimizer's state lies in the model's file."""
        with runs.strategy(runs.Way(1, "flat", stage=1)):
            options = {
                "use_cpu": False,
                "bf16": False,
                "deepspeed": runs.deepspeed_config(runs.Way(1, "", stage=stage)),
            }
            whole = run(tmp_path, **options)
            assert whole.state.global_step == 4
            resumed = run(tmp_path, True, **options)
            optimizer = runs.unwrapped_twice(resumed.optimizer)
            steps = {float(step) for state in optimizer.state.values() for step in state["step"].reshape(-1)}
            assert steps == {5.0}
            (model_file,) = (tmp_path / "checkpoint-4").glob("*/mp_rank_00_model_states.pt")
            model_file.write_bytes(model_file.read_bytes()[:1000])
            with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt is cut off"):
                run(tmp_path, True, **options)
