"""Every file of recipes/accelerate, launched with sft.py, is the strategy it names, and trains one adapter."""

import functools
import json
import math
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version

import pytest
import torch
import yaml
from packaging.version import Version
from safetensors.torch import load_file

from tests.recipes.conftest import EVALUATED, EXACT, LORA, ROOT

CONFIGS = ROOT / "recipes" / "accelerate"
NUM_STEPS, SAVED_AT = 4, 2
RECORDS_A_STEP = 8
COLUMN_WISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class Strategy:
    """A file of recipes/accelerate, and what the CPU forces on its launch."""

    name: str
    description: str  # as results.json has it
    num_processes: int = 2
    num_replicas: int = 2
    config: tuple[str, ...] = ()  # by default the file of this name
    launch: tuple[str, ...] = ()
    script: tuple[str, ...] = ("--save_strategy=steps", f"--save_steps={SAVED_AT}")
    environment: dict[str, str] = field(default_factory=lambda: {"ACCELERATE_USE_CPU": "true"})

    def __str__(self):
        return self.name


# FSDP1 broadcasts the weights of one process on accelerators only.
NO_BROADCAST = ("--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_sync_module_states", "false")
TWO_BY_TWO = ("--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2")
STRATEGIES = [
    Strategy("single", "single process", 1, 1),
    Strategy("ddp", "DDP, 2 processes"),
    Strategy("fsdp1", "FSDP1, 2 processes", launch=NO_BROADCAST),
    Strategy("fsdp2", "FSDP2, 2 processes"),
    Strategy("hsdp", "HSDP, 4 processes", 4, 4, launch=("--num_machines", "1", *TWO_BY_TWO)),
    Strategy(
        "tp",
        "tensor parallelism, 2 processes",
        num_replicas=1,
        launch=("--parallelism_config_tp_size", "2"),
        script=("--save_strategy=no", "--lora_target_modules", *COLUMN_WISE),
    ),
    *(Strategy(f"zero{stage}", f"ZeRO-{stage}, 2 processes", environment={}) for stage in (1, 2, 3)),
]
PARAMETERS = {
    "single": {"kind": "tensor"},
    "ddp": {"kind": "tensor"},
    "fsdp1": {"kind": "FSDP1 slice"},
    "fsdp2": {"kind": "DTensor", "mesh": [2], "placements": ["S(0)"]},
    "hsdp": {"kind": "DTensor", "mesh": [2, 2], "placements": ["R", "S(0)"]},
}
WRAPPERS = {
    "fsdp1": "FullyShardedDataParallel",
    "fsdp2": "FSDPModule",
    "hsdp": "FSDPModule",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


@dataclass
class Run:
    """What a launch left behind."""

    folder: object
    reports: list[dict]

    @property
    def adapter(self):
        return load_file(self.folder / "adapter_model.safetensors")

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture(scope="session")
def launch(fork_server, tiny_model, tmp_path_factory):
    """Launch a script with a file of recipes/accelerate; returns its Run."""

    def run(strategy, script, *more, output_dir=None, precision="no"):
        if strategy.name.startswith("zero"):
            pytest.importorskip("deepspeed")
        folder = output_dir or tmp_path_factory.mktemp(f"{script}-{strategy}") / "out"
        reports = tmp_path_factory.mktemp("reports")
        launcher = [*(strategy.config or ("--config_file", f"recipes/accelerate/{strategy}.yaml")), *strategy.launch]
        launcher += ["--num_processes", strategy.num_processes, "--mixed_precision", precision]
        launcher += ["--main_process_port", 0] if strategy.num_processes > 1 else []
        options = {
            "model_name_or_path": tiny_model,
            "dataset_name": "demo",
            "output_dir": folder,
            "max_steps": NUM_STEPS,
            "learning_rate": 3e-3,
            "warmup_steps": 1,
            "per_device_train_batch_size": RECORDS_A_STEP // strategy.num_replicas,
            "max_eval_samples": 7,
            "per_device_eval_batch_size": 3,
            "num_sample_generations": 1,
            "logging_steps": 1,
            "disable_tqdm": "true",
        }
        flags = [*LORA, *EVALUATED, "--gradient_checkpointing=false"] if script == "sft" else []
        flags += ["--bf16=false"] if script == "sft" and precision == "no" else []
        flags += [f"--{name}={value}" for name, value in options.items()]
        completed = fork_server.run(
            ["-m", "accelerate.commands.launch", *launcher, f"recipes/{script}.py", *flags, *strategy.script, *more],
            timeout=400,
            STRATEGY_REPORTS=str(reports),
            ACCELERATE_TORCH_DEVICE="cpu",
            **strategy.environment,
        )
        assert completed.returncode == 0, completed.stdout[-8000:]
        ranks = range(strategy.num_processes)
        return Run(folder, [json.loads((reports / f"rank-{rank}.json").read_text()) for rank in ranks])

    return run


@pytest.fixture(scope="session")
def whole(launch):
    """The run that the others must equal: sft.py in one process."""
    return launch(STRATEGIES[0], "sft")


needs_tensor_parallel_adapters = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.17"), reason="peft needs transformers 5.17 for these"
)
# accelerate 1.12 asks a fresh optimizer what there is to load of its shards, and finds nothing.
LOADS_SHARDS = Version(version("accelerate")) >= Version("1.13")


# One of each kind; tests/sharding trains under all of them, and the others are slow.
IN_GATE = ("single", "fsdp2", "zero3")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(
            each,
            id=f"{each.name}-sft",
            marks=[
                *[needs_tensor_parallel_adapters] * (each.name == "tp"),
                *[pytest.mark.slow] * (each.name not in IN_GATE),
            ],
        )
        for each in STRATEGIES
    ],
)
def test_launch(strategy, launch, whole, tmp_path):
    run = launch(strategy, "sft")
    assert_strategy(strategy, run.reports)
    assert_torques(run.reports)
    assert run.results["strategy"] == strategy.description
    assert run.results["optimizer"] == "AdaTAMW"
    if strategy.name in ("single", "tp"):
        assert_result_loads(run)
    if strategy.name == "tp":  # its adapter starts from other numbers, because lora_B is made in pieces
        return
    assert_same_run(run, whole)
    if strategy.name in ("fsdp1", "fsdp2", "hsdp") and not LOADS_SHARDS:
        return
    resumed_folder = tmp_path / "resumed"
    shutil.copytree(run.folder / f"checkpoint-{SAVED_AT}", resumed_folder / f"checkpoint-{SAVED_AT}")
    shutil.copy(run.folder / "metrics.jsonl", resumed_folder)
    resumed = launch(strategy, "sft", "--resume_from_checkpoint=true", output_dir=resumed_folder)
    assert len(resumed.reports[0]["torques"]) < len(run.reports[0]["torques"])
    assert_equal_adapters(resumed.adapter, run.adapter, atol=0)


@pytest.mark.distributed
@needs_tensor_parallel_adapters
def test_tensor_parallelism_by_the_flag_alone(fork_server, tiny_model, tmp_path):
    """torchrun says nothing of it."""
    flags = [f"--model_name_or_path={tiny_model}", "--dataset_name=demo", f"--output_dir={tmp_path / 'out'}"]
    flags += [*LORA[::2], *EXACT, "--tp_size=2", "--max_steps=3", "--max_eval_samples=4", "--num_sample_generations=0"]
    flags += ["--save_strategy=no", "--lora_target_modules", *COLUMN_WISE]
    completed = fork_server.run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "recipes/sft.py", *flags],
        timeout=400,
        ACCELERATE_USE_CPU="true",
        STRATEGY_REPORTS=str(tmp_path),
        ACCELERATE_TORCH_DEVICE="cpu",
    )
    assert completed.returncode == 0, completed.stdout[-4000:]
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert_strategy(next(strategy for strategy in STRATEGIES if strategy.name == "tp"), reports)


@pytest.mark.slow
@pytest.mark.distributed
def test_offloaded_states_are_those_of_our_optimizer(launch, whole):
    """DeepSpeed puts its own CPU optimizer in the place of one whose states are offloaded, unless told not to."""
    file = "recipes/accelerate/zero3-offload.json"
    config = ("--use_deepspeed", "--deepspeed_config_file", file, "--num_machines", "1")
    run = launch(Strategy("zero3", "ZeRO-3, 2 processes", config=config, environment={}), "sft")
    assert run.results["optimizer"] == "AdaTAMW"
    assert_torques(run.reports)
    assert_same_run(run, whole)


@pytest.mark.distributed
def test_bf16_as_the_files_say_reaches_deepspeed(launch):
    """The Trainer must be told too; and the weights are cut while they are read."""
    run = launch(
        next(each for each in STRATEGIES if each.name == "zero3"), "sft", "--dtype=bfloat16", precision="bf16"
    )
    assert run.reports[0]["zero_stage"] == 3
    assert_torques(run.reports)
    assert run.results["settings"]["SFTConfig"]["bf16"] is True
    assert run.results["eval_perplexity"] < 0.8 * run.results["eval_perplexity_before"]


@pytest.mark.distributed
def test_a_classifier_whose_head_is_new(fork_server, tmp_path):
    """BERT, whose embeddings accelerate would cut twice, and a head that only the first process has."""
    from recipes.data import help_desk
    from recipes.support.encoder_demo import build_encoder, build_tokenizer

    tokenizer = build_tokenizer([row["text"] for row in help_desk.make_records(help_desk.TRAIN, per_intent=4, seed=3)])
    build_encoder(tokenizer, ["of another", "task"]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"model_name_or_path": tmp_path / "model", "dataset_name": "demo", "max_steps": 4}
    options |= {"learning_rate": 3e-3, "save_strategy": "no", "disable_tqdm": "true"}

    def run(strategy):
        reports = tmp_path / f"reports-{strategy}"
        reports.mkdir()
        launcher = ["--config_file", f"recipes/accelerate/{strategy}.yaml", "--num_processes", 2]
        launcher += ["--mixed_precision", "no", "--main_process_port", 0]
        flags = [f"--{key}={value}" for key, value in {**options, "output_dir": tmp_path / strategy}.items()]
        completed = fork_server.run(
            ["-m", "accelerate.commands.launch", *launcher, "recipes/classify.py", *flags],
            timeout=150,
            STRATEGY_REPORTS=str(reports),
            ACCELERATE_TORCH_DEVICE="cpu",
            ACCELERATE_USE_CPU="true",
        )
        assert completed.returncode == 0, completed.stdout[-8000:]
        ranks = [json.loads((reports / f"rank-{rank}.json").read_text()) for rank in range(2)]
        return ranks, json.loads((tmp_path / strategy / "results.json").read_text())

    replicated, expected = run("ddp")
    sharded, results = run("fsdp2")
    assert results["strategy"] == "FSDP2, 2 processes"
    for whole, cut in zip(replicated, sharded, strict=True):
        assert cut["parameters"] == [PARAMETERS["fsdp2"]] * len(whole["parameters"])
        differences = [abs(left - right) for left, right in zip(cut["torques"][-1], whole["torques"][-1], strict=True)]
        # a softmax ignores the biases of the keys: their gradients are rounding errors, one tensor in each layer
        assert sum(difference > 1e-5 for difference in differences) <= 2
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


OPTIONS = {
    "4 bits": ["--load_in_4bit"],
    "4 bits, packed": ["--load_in_4bit", "--packing"],
    "dora": ["--use_dora"],
    "rslora": ["--use_rslora"],
    "lora plus": ["--loraplus_lr_ratio=4"],
    "packed": ["--packing"],
}


@pytest.fixture(scope="session")
def whole_with(launch):
    """The run in one process with some options."""
    return functools.cache(lambda name: launch(STRATEGIES[0], "sft", *OPTIONS[name], "--save_strategy=no"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        # The gate has the one in which DeepSpeed steps the A matrices, whose first gradients are 0, apart.
        pytest.param(
            name,
            each,
            marks=[] if (name, each.name) in (("lora plus", "zero2"), ("4 bits", "fsdp2")) else pytest.mark.slow,
            id=f"{name}-{each}",
        )
        for name in OPTIONS
        for each in STRATEGIES
        if each.name in ("ddp", "fsdp2", "zero2", "zero3") or (each.name == "fsdp1" and name == "4 bits")
    ],
)
def test_options_of_adapters_under_a_strategy(name, strategy, launch, whole_with):
    """The run of one process, or, with weights of 4 bits under ZeRO-3, an error that names it."""
    if "--load_in_4bit" in OPTIONS[name]:
        pytest.importorskip("bitsandbytes")
        if strategy.name == "zero3":
            with pytest.raises(AssertionError, match=r"error: load_in_4bit does not work under ZeRO-3"):
                launch(strategy, "sft", *OPTIONS[name])
            return
    run = launch(strategy, "sft", *OPTIONS[name], "--save_strategy=no")
    assert run.results["strategy"] == strategy.description
    assert_torques(run.reports)
    if "--packing" not in OPTIONS[name]:  # else other records stand in a row of every process
        assert_same_run(run, whole_with(name))
    assert run.results["eval_perplexity"] < 0.8 * run.results["eval_perplexity_before"]


def assert_strategy(strategy, reports):
    """accelerate silently falls back to DDP on the CPU: what the processes held tells."""
    assert [report["world_size"] for report in reports] == [strategy.num_processes] * strategy.num_processes
    for report in reports:
        assert report["model"].count(WRAPPERS.get(strategy.name, "PeftModel")) == 1
        assert report["replicated"] == (strategy.name == "ddp")
        if strategy.name.startswith("zero"):
            assert report["zero_stage"] == int(strategy.name[-1])
        elif strategy.name == "tp":
            cut = {"kind": "DTensor", "mesh": [2], "placements": ["S(0)"]}
            of_each = len(report["parameters"]) // 2
            assert sorted(map(str, report["parameters"])) == sorted(map(str, [cut, {"kind": "tensor"}] * of_each))
        else:
            assert report["parameters"] == [PARAMETERS[strategy.name]] * len(report["parameters"])


def assert_torques(reports):
    first, *others = [report["torques"] for report in reports]
    assert all(torques == first for torques in others)
    assert max(first[-1]) - min(first[-1]) > 0.01


def assert_same_run(run, whole):
    """The same records make the same steps, however they are split: angles, adapter, and what is measured."""
    torques, expected = (torch.tensor(each.reports[0]["torques"][-1]) for each in (run, whole))
    torch.testing.assert_close(torques, expected, rtol=0, atol=1e-5)
    assert_equal_adapters(run.adapter, whole.adapter, atol=3e-5)
    for name in ("eval_perplexity", "eval_token_accuracy", "eval_perplexity_before"):
        assert run.results[name] == pytest.approx(whole.results[name], rel=1e-4), name
    assert run.results["trained_parameters"] == whole.results["trained_parameters"]


def assert_equal_adapters(adapter, expected, *, atol):
    assert adapter.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = float((adapter[name] - tensor).abs().max())
        assert difference <= atol, f"{name} differs by {difference}"


def assert_result_loads(run):
    """The saved adapter, on its base in one process, has the perplexity that was reported."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from recipes.support import causal_demo, records

    model = AutoPeftModelForCausalLM.from_pretrained(run.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    _, held_out = causal_demo.demo_records()
    losses, count = 0.0, 0
    for record in records.at_most(held_out, 7, seed=42).dataset:
        prompt = tokenizer(record["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(record["completion"] + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += ids.shape[1] - len(prompt)
    assert math.exp(losses / count) == pytest.approx(run.results["eval_perplexity"], rel=1e-4)


def test_every_file_is_launched():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {strategy.name for strategy in STRATEGIES}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_header_says_what_a_user_needs(path):
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert [label for label in ("Purpose", "Launch", "Override", "Hardware") if f"# {label}:" not in header] == []
    assert f"accelerate launch --config_file recipes/accelerate/{path.name} recipes/sft.py" in header


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    load_config_from_file(str(path))
    options = {action.dest for action in launch_command_parser()._actions}
    handled_apart = {"compute_environment", "distributed_type"}
    for name, value in yaml.safe_load(path.read_text()).items():
        assert set(value if isinstance(value, dict) else [name]) <= options | handled_apart
