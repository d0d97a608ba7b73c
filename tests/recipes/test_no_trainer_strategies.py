"""Each file of recipes/accelerate trains the adapter that one process trains, and a resumed run ends with its bits."""

import shutil

import pytest

from tests.recipes.loop_runs import (
    OPTIONS,
    adapter_of,
    assert_same_adapter,
    assert_same_rows,
    build_inputs,
    launch,
    rows_of,
    run_here,
)
from tests.recipes.test_strategies import (
    COLUMN_WISE,
    LOADS_SHARDS,
    STRATEGIES,
    assert_strategy,
    assert_torques,
    needs_tensor_parallel_adapters,
)

RECORDS_A_STEP, RESUMED_AFTER = 8, 2
# One of each kind; the others are slow.
IN_GATE = ("ddp", "fsdp2", "zero3", "tp")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return build_inputs(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The run of one process, in one pass a step."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run_here({**inputs, **OPTIONS, "per_device_train_batch_size": RECORDS_A_STEP, "output_dir": folder})
    return folder


@pytest.fixture
def run(fork_server, inputs, tmp_path):
    """Launch the script with the file of a strategy; returns its folder and what the processes report."""

    def start(strategy, name, *more, precision="no", **options):
        if strategy.name.startswith("zero"):
            pytest.importorskip("deepspeed")
        passes = 2 if strategy.num_processes < 4 else 1
        options = {
            **inputs,
            **OPTIONS,
            "per_device_train_batch_size": RECORDS_A_STEP // strategy.num_replicas // passes,
            "gradient_accumulation_steps": passes,
            "output_dir": tmp_path / name,
            **options,
        }
        reports = launch(fork_server, strategy, options, tmp_path / f"{name}-reports", *more, precision=precision)
        return tmp_path / name, reports

    return start


def named(name):
    return next(strategy for strategy in STRATEGIES if strategy.name == name)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(each, id=each.name, marks=[] if each.name in IN_GATE else pytest.mark.slow)
        for each in STRATEGIES
        if each.name != "tp"
    ],
)
def test_a_strategy_trains_what_one_process_trains(strategy, run, whole, tmp_path):
    """More steps than an epoch has: the last of each has fewer records, and some processes have none of them."""
    folder, reports = run(strategy, "out")
    assert_strategy(strategy, reports)
    assert_torques(reports)
    assert_same_rows(folder, whole, tolerance=1e-5)
    assert_same_adapter(folder, whole, tolerance=1e-5)
    if strategy.name in ("fsdp1", "fsdp2", "hsdp") and not LOADS_SHARDS:
        return
    shutil.copytree(folder / f"checkpoint-{RESUMED_AFTER}", tmp_path / "parts" / f"checkpoint-{RESUMED_AFTER}")
    shutil.copy(folder / "metrics.jsonl", tmp_path / "parts")
    parts, resumed = run(strategy, "parts", resume_from_checkpoint="auto")
    assert len(resumed[0]["torques"]) < len(reports[0]["torques"])
    assert_same_adapter(parts, folder, tolerance=0)
    assert rows_of(parts) == rows_of(folder)


@needs_tensor_parallel_adapters
def test_tensor_parallelism(run):
    """Its adapter starts from other numbers: lora_B is made in pieces. The processes see the same records."""
    strategy = named("tp")
    folder, reports = run(strategy, "out", "--lora_target_modules", *COLUMN_WISE, save_steps=0)
    assert_strategy(strategy, reports)
    assert_torques(reports)
    losses = [row["eval_loss"] for row in rows_of(folder) if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert adapter_of(folder)


@pytest.mark.slow
def test_bf16_as_the_files_say(run, whole):
    folder, reports = run(named("zero3"), "out", precision="bf16")
    assert_torques(reports)
    assert_same_rows(folder, whole, tolerance=0.05)
