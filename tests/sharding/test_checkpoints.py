"""Checkpoints of torch's own making, loaded by processes that never saw the run: exact to the last bit."""

import pytest
import torch

from tests.sharding import checkpoints
from tests.sharding.checkpoints import SAVED_AT, STOPPED_AT

# One worker runs them all, so that the worlds are started once.
pytestmark = pytest.mark.distributed

BF16 = torch.bfloat16
KEPT = {"param_correction": "bits16", "state_bits": 32}

# Who saves (name, ranks, optimizer, options of `build`), and who loads what: (name, ranks, format).
RUNS = {
    "fsdp2": ("fsdp2", 2, "AdaTAMW", {}, [
        ("fsdp2", 2, "dcp"), ("fsdp2", 2, "full"), ("fsdp2", 2, "ranks"), ("fsdp2", 4, "dcp"),
        ("fsdp2", 1, "dcp"), ("single", 1, "dcp"), ("single", 1, "full"),
    ]),
    "fsdp2-of-4": ("fsdp2", 4, "AdaTAMW", {"scope": "model"}, [("fsdp2", 4, "dcp"), ("fsdp2", 2, "dcp")]),
    "single": ("single", 1, "AdaTAMW", {"unused": False}, [("fsdp2", 2, "dcp"), ("single", 1, "dcp")]),
    "fsdp2-bf16": ("fsdp2", 2, "AdaTAMW", {"dtype": BF16}, [("fsdp2", 2, "dcp"), ("fsdp2", 2, "full")]),
    "fsdp2-bits": ("fsdp2", 2, "AdaTAMW", {"dtype": BF16, "kept": KEPT}, [
        ("fsdp2", 2, "dcp"), ("fsdp2", 2, "full"), ("fsdp2", 2, "ranks"), ("fsdp2", 4, "dcp"), ("fsdp2", 1, "dcp"),
    ]),
    "fsdp1-bits": ("fsdp1", 2, "AdaTAMW", {"dtype": BF16, "kept": {"param_correction": "bits16"}}, [
        ("fsdp1", 2, "fsdp1-full"), ("fsdp1", 2, "dcp"),
    ]),
    "fsdp1-wide": ("fsdp1", 2, "AdaTAMW", {"dtype": BF16, "kept": {"state_bits": 32}}, [
        ("fsdp1", 2, "fsdp1-full"), ("fsdp1", 2, "dcp"),
    ]),
    "hsdp-bits": ("hsdp", 4, "AdaTAM", {"dtype": BF16, "kept": KEPT}, [("hsdp", 4, "dcp")]),
    "tp-bits": ("tp", 2, "AdaTAMW", {"dtype": BF16, "kept": KEPT}, [("tp", 2, "dcp")]),
    "ddp-bits": ("ddp", 2, "TAM", {"dtype": BF16, "kept": KEPT}, [("ddp", 2, "ranks")]),
    "fsdp2-lora": ("fsdp2", 4, "AdaTAMW", {"lora": True}, [("fsdp2", 4, "dcp")]),
    "fsdp2-offload-tam": ("fsdp2-offload", 2, "TAM", {}, [("fsdp2-offload", 2, "dcp")]),
    "hsdp": ("hsdp", 4, "AdaTAM", {}, [("hsdp", 4, "dcp")]),
    "tp": ("tp", 2, "AdaTAMW", {}, [("tp", 2, "dcp"), ("tp", 2, "ranks")]),
    "fsdp2-tp": ("fsdp2-tp", 4, "AdaTAMW", {}, [("fsdp2-tp", 4, "dcp")]),
    "ddp": ("ddp", 2, "AdaTAMW", {}, [("ddp", 2, "ranks")]),
    "fsdp1": ("fsdp1", 2, "AdaTAMW", {}, [
        ("fsdp1", 2, "fsdp1-full"), ("fsdp1", 2, "dcp"), ("fsdp1", 2, "ranks"),
        ("fsdp2", 2, "fsdp1-full"), ("single", 1, "fsdp1-full"),
    ]),
    "fsdp1-of-4": ("fsdp1", 4, "AdaTAMW", {"scope": "model"}, [("fsdp1", 4, "fsdp1-full"), ("fsdp1", 4, "dcp")]),
    "fsdp1-bf16-tam": ("fsdp1", 2, "TAM", {"dtype": BF16}, [("fsdp1", 2, "fsdp1-full"), ("fsdp1", 2, "dcp")]),
    "fsdp2-adamw": ("fsdp2", 2, "AdamW", {"unused": False}, [("fsdp2", 2, "dcp"), ("fsdp2", 2, "full")]),
    "fsdp2-sgd": ("fsdp2", 2, "SGD", {"unused": False}, [("fsdp2", 2, "dcp"), ("fsdp2", 2, "full")]),
    "fsdp1-adamw": ("fsdp1", 4, "AdamW", {}, [("fsdp1", 4, "fsdp1-full"), ("fsdp1", 4, "dcp")]),
}  # fmt: skip
CASES = [
    pytest.param(run, *resumed, id=f"{run}-to-{resumed[0]}-{resumed[1]}-{resumed[2]}")
    for run, (_, _, optimizer_name, _, resumes) in RUNS.items()
    for resumed in resumes
    if optimizer_name in ("AdaTAMW", "AdaTAM", "TAM")
]
# (run, who loads it, step_size, format, the scalar states that torch has not)
ADAMWS = [("exp_avg_scale", 1.0), ("torque", 0.0)]
PAPERS = [("exp_avg_scale", 5.0), ("torque", 0.0)]  # m = exp_avg / (2 (1 - beta1))
SGDS = [("step", 0.0), ("torque", 0.0)]  # torch.optim.SGD counts no steps
FOREIGN = [
    ("fsdp2-adamw", "AdaTAMW", "adamw", "dcp", ADAMWS),
    ("fsdp2-adamw", "AdaTAMW", "paper", "full", PAPERS),
    ("fsdp1-adamw", "AdaTAMW", "adamw", "fsdp1-full", ADAMWS),
    ("fsdp1-adamw", "AdaTAMW", "paper", "dcp", PAPERS),
    ("fsdp2-sgd", "TAM", "sgd", "dcp", SGDS),
    ("fsdp2-sgd", "TAM", "paper", "full", SGDS),
]


def save_and_go_on(folder, name, optimizer_name, options, formats):
    """Train, save, train on; writes what was held at both times, returns what is needed to trust the comparison."""
    model, optimizer = checkpoints.build(name, optimizer_name, **options)
    checkpoints.train(model, optimizer, 0, SAVED_AT)
    saved = checkpoints.snapshot(model, optimizer)
    for format in formats:
        checkpoints.save(folder, model, optimizer, format)
    changed = checkpoints.differences(checkpoints.snapshot(model, optimizer), saved)
    hyperparameters = checkpoints.hyperparameters(optimizer)
    checkpoints.train(model, optimizer, SAVED_AT, STOPPED_AT)
    stopped = checkpoints.snapshot(model, optimizer)
    checkpoints.write_expected(folder, {"saved": saved, "stopped": stopped, "hyperparameters": hyperparameters})
    return changed, [value.item() for key, value in saved.items() if key.endswith(".torque")]


def resume(folder, name, optimizer_name, options, format):
    """What differs right after a load, and after as many steps as the run took that was not stopped."""
    expected = checkpoints.read_expected(folder)
    model, optimizer = checkpoints.build(name, optimizer_name, moved=True, **options)
    before = checkpoints.differences(checkpoints.snapshot(model, optimizer), expected["saved"])
    checkpoints.load(folder, model, optimizer, format)
    loaded = checkpoints.differences(checkpoints.snapshot(model, optimizer), expected["saved"])
    same_groups = checkpoints.hyperparameters(optimizer) == expected["hyperparameters"]
    checkpoints.train(model, optimizer, SAVED_AT, STOPPED_AT)
    stopped = checkpoints.snapshot(model, optimizer)
    return {
        "nothing loaded": before,
        "loaded": loaded,
        "same groups": same_groups,
        "stopped": checkpoints.differences(stopped, expected["stopped"]),
        "distance": checkpoints.distance(stopped, expected["stopped"]),
        "ranks disagree": checkpoints.disagreements(optimizer),
    }


@pytest.fixture(scope="module")
def saved_run(worlds, tmp_path_factory):
    """The folder of a run in `RUNS`, made when it is first asked for."""
    folders = {}

    def run(key):
        if key not in folders:
            name, size, optimizer_name, options, resumes = RUNS[key]
            folders[key] = str(tmp_path_factory.mktemp(key))
            formats = sorted({format for _, _, format in resumes})
            for changed, torques in worlds(size).run(
                save_and_go_on, folders[key], name, optimizer_name, options, formats
            ):
                assert changed == [], "saving must change nothing"
                if torques:
                    assert sum(torque != 0 for torque in torques) >= len(torques) - 1  # one is never used
                    assert len(set(torques)) > 1 or options.get("scope") == "model"
                else:
                    assert optimizer_name in ("AdamW", "SGD")
        return folders[key]

    return run


@pytest.mark.parametrize(("key", "name", "size", "format"), CASES)
def test_a_resumed_run_is_the_run_that_was_saved(worlds, saved_run, key, name, size, format):
    saved_name, saved_size, optimizer_name, options, _ = RUNS[key]
    for result in worlds(size, "resumed").run(resume, saved_run(key), name, optimizer_name, options, format):
        assert len(result["nothing loaded"]) > 10, "the fresh model must not be equal by itself"
        assert result["loaded"] == []
        assert result["same groups"]
        assert result["ranks disagree"] == []
        if (name, size) == (saved_name, saved_size):
            assert result["stopped"] == []
        elif not saved_name.startswith("fsdp1"):  # which turns a missing gradient into one of zeros
            # Four more steps in another order of summation; rounding of sums in fp32.
            assert result["distance"] < 1e-5


def first_step(name):
    model, optimizer = checkpoints.build(name, "AdaTAMW", dtype=BF16, kept=KEPT)
    checkpoints.train(model, optimizer, 0, 1)


def test_states_of_two_dtypes_under_fsdp1_are_refused_before_a_step(worlds):
    """It could train with them, and not save them."""
    with pytest.raises(
        AssertionError, match=r"param_correction='bits16' cannot be used here: FSDP1 saves states of one dtype"
    ):
        worlds(2).run(first_step, "fsdp1")


def load_foreign(folder, name, optimizer_name, step_size, options, format):
    """What differs from torch's moments, the scalar states torch has not, and what ranks disagree on in the end."""
    expected = checkpoints.read_expected(folder)
    model, optimizer = checkpoints.build(name, optimizer_name, moved=True, step_size=step_size, **options)
    checkpoints.load(folder, model, optimizer, format, partial=True)
    loaded = checkpoints.snapshot(model, optimizer)
    theirs = {key: loaded[key] for key in loaded.keys() & expected["saved"].keys()}
    if optimizer_name == "TAM" and step_size == "paper":  # whose m is half of SGD's buffer
        theirs = {key: value * 2 if key.endswith(".momentum_buffer") else value for key, value in theirs.items()}
    ours = sorted({(key.rpartition(".")[2], loaded[key].item()) for key in loaded.keys() - expected["saved"].keys()})
    checkpoints.train(model, optimizer, SAVED_AT, STOPPED_AT)
    return checkpoints.differences(theirs, expected["saved"]), ours, checkpoints.disagreements(optimizer)


@pytest.mark.parametrize(("key", "optimizer_name", "step_size", "format", "scalars"), FOREIGN)
def test_a_checkpoint_of_torchs_optimizer_loads_exactly(
    worlds, saved_run, key, optimizer_name, step_size, format, scalars
):
    """Parameters and moments to the last bit, the torque at 0, and a scale that makes the moment torch's."""
    name, size, _, options, _ = RUNS[key]
    for different, ours, disagreements in worlds(size, "resumed").run(
        load_foreign, saved_run(key), name, optimizer_name, step_size, options, format
    ):
        assert different == []
        assert ours == scalars
        assert disagreements == []
