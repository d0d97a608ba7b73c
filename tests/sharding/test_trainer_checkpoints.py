"""The Trainer's checkpoints under real FSDP1, FSDP2 and DDP, resumed by processes that never saw the run."""

import shutil
from importlib.metadata import version

import pytest
from packaging.version import Version

from hf_tam.integrations.transformers.checkpoint import refuse_other_optimizer
from tests.sharding import trainer_runs
from tests.sharding.trainer_runs import FULL, RANKS, SHARDED, STOPPED_AT, checkpoint

# One worker runs them all, so that the worlds are started once.
pytestmark = pytest.mark.distributed

PLUGINS = [None, (1, FULL), (1, SHARDED), (2, FULL), (2, SHARDED)]


# Its FSDP has one kind of checkpoint for each version, whatever fsdp_config says, and DDP on CPUs loads to "cpu:0",
# which torch does not know, with any optimizer.
AS_CONFIGURED = Version(version("transformers")) >= Version("5.3")
needs_as_configured = pytest.mark.skipif(not AS_CONFIGURED, reason="transformers 5.2 does not resume as configured")


# With any optimizer; what is lost is the adapter, not the optimizer's states.
needs_adapters = pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15"), reason="accelerate 1.13 and 1.14 do not load an adapter here"
)


def marked(plugin, *values):
    marks = [needs_as_configured] if plugin in (None, (1, SHARDED), (2, FULL)) else []
    marks += [needs_adapters] if plugin == (2, FULL) and True in values else []
    # With an adapter in the gate under FSDP2 alone.
    marks += [pytest.mark.slow] if True in values and plugin != (2, SHARDED) else []
    return pytest.param(plugin, *values, marks=marks)


def identify(plugin):
    return "ddp" if plugin is None else f"fsdp{plugin[0]}-{plugin[1].partition('_')[0].lower()}"


def run_to_the_end(world, folder, plugin, **options):
    """Train; checks that the strategy is what was meant, and returns what rank 0 ended with."""
    first, *others = world.run(trainer_runs.train, str(folder), plugin, options.pop("resume", None), options)
    assert first["kind"] == (plugin and plugin[0])
    assert all(other == first for other in others)
    assert first["steps"] == STOPPED_AT
    return first


@pytest.mark.parametrize(
    ("plugin", "lora"),
    [marked(plugin, lora) for lora in (False, True) for plugin in PLUGINS if plugin or not lora],
    ids=lambda value: identify(value) if not isinstance(value, bool) else "lora" if value else "whole",
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(worlds, tmp_path, plugin, lora):
    whole = run_to_the_end(worlds(RANKS), tmp_path / "whole", plugin, lora=lora)
    torques = [value[0] for name, value in whole["tensors"].items() if name.endswith(".torque")]
    assert len(set(torques)) == len(torques) == (4 if lora else 12)
    assert 0.0 not in torques
    source = checkpoint(tmp_path / "whole")
    shutil.copytree(source, checkpoint(tmp_path / "resumed"))
    resumed = run_to_the_end(worlds(RANKS, "resumed"), tmp_path / "resumed", plugin, resume=True, lora=lora)
    assert resumed == whole
    strategy = {None: "whole", FULL: "fsdp_full", SHARDED: "fsdp_sharded"}[plugin and plugin[1]]
    with pytest.raises(ValueError, match="was saved by an optimizer of hf_tam, and --optim adamw_torch would misread"):
        refuse_other_optimizer(source, "adamw_torch", strategy)


@pytest.mark.parametrize("plugin", [marked(plugin) for plugin in (None, (1, SHARDED), (2, FULL))], ids=identify)
def test_a_checkpoint_of_adamw_goes_on_as_adamw(worlds, tmp_path, plugin):
    """Held neutral, our optimizer is AdamW: four more steps of a resumed run are those of the run it resumes."""
    whole = run_to_the_end(worlds(RANKS), tmp_path, plugin, optim="adamw_torch")
    assert whole["optimizer"] == "AdamW"
    neutral = "gamma=1.0,damping_eps=0.0"
    resumed = run_to_the_end(
        worlds(RANKS, "resumed"), tmp_path, plugin, resume=checkpoint(tmp_path), optim="adatamw", optim_args=neutral
    )
    assert resumed["optimizer"] == "AdaTAMW"
    for name, expected in whole["tensors"].items():
        if name.endswith((".value", ".step")):
            # another order of the same operations, for four steps
            assert resumed["tensors"][name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    torques = {value[0] for name, value in resumed["tensors"].items() if name.endswith(".torque")}
    assert torques == {0.0}


@pytest.mark.parametrize("plugin", [(2, FULL), (2, SHARDED)], ids=identify)
def test_states_that_accelerate_does_not_load(worlds, tmp_path, plugin):
    """As accelerate 1.12 under FSDP2: every optimizer began anew, and nobody said so."""
    run_to_the_end(worlds(RANKS), tmp_path, plugin)
    remedy = r"has loaded none of the optimizer's states in .*checkpoint-10.*install accelerate>=1\.13"
    with pytest.raises(AssertionError, match=remedy):
        worlds(RANKS, "resumed").run(trainer_runs.resume_without_states, str(tmp_path), plugin)
