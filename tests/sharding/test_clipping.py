"""`max_grad_norm` inside a sharded step, and `fused_clip` in a sharded Trainer: the norm of whole gradients."""

import contextlib
import functools

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback

import hf_tam
from tests.integrations.test_trainer import make_trainer
from tests.integrations.untouched import tiny_llama
from tests.sharding import comparing, strategies
from tests.sharding import framework_runs as runs
from tests.sharding.test_equivalence import PARAMETERS, TORQUE
from tests.sharding.trained import CLIP, Model, batches_of_steps

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("name", "optimizer_name", "scope"),
    [
        ("fsdp1-full_shard-2", "AdaTAMW", "tensor"),
        ("fsdp2-reshard-True-2", "TAM", "tensor"),
        ("tp-2", "AdaTAMW", "tensor"),
        pytest.param("hsdp-4", "AdaTAMW", "tensor", marks=pytest.mark.slow),
        pytest.param("fsdp2-reshard-True-2", "AdaTAMW", "model", marks=pytest.mark.slow),
        pytest.param("fsdp2-reshard-True-3", "AdaTAM", "tensor", marks=pytest.mark.slow),
        pytest.param("fsdp2-tp-4", "TAM", "tensor", marks=pytest.mark.slow),
    ],
)
def test_sharded_is_unsharded(worlds, name, optimizer_name, scope):
    """The twin is clipped by clip_grad_norm_; the norm comes with the sums of the angles, in no collective more."""
    sharding = strategies.SHARDINGS[name]
    options = {"weight_decay": 0.1 if optimizer_name == "AdaTAMW" else 0.0, "scope": scope, "max_grad_norm": CLIP}
    results = worlds(sharding.world).run(comparing.compare, name, optimizer_name, options, False)
    for result in results:
        assert result["kinds"] == set(sharding.kinds)
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result
        assert result["grad_norm"] <= PARAMETERS, result
        for calls in result["calls"]:
            assert [called for called, _ in calls] == ["all_reduce"] * result["reduces"]
    for missed in ("grad_norm", "parameters"):  # without the reduction each rank takes the norm of what it holds
        assert max(result["cut"][missed] for result in results) > 10 * PARAMETERS, results


@pytest.mark.parametrize("optimizer_name", ["AdaTAM", pytest.param("TAM", marks=pytest.mark.slow)])
def test_a_coupled_decay_takes_the_norm_first(worlds, optimizer_name):
    name = "fsdp2-reshard-True-2"
    options = {"weight_decay": 0.1, "max_grad_norm": CLIP}
    for result in worlds(2).run(comparing.compare, name, optimizer_name, options, False):
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result
        assert result["grad_norm"] <= PARAMETERS, result
        assert {len(calls) for calls in result["calls"]} == {2}


def step_without_gradients():
    """A step that no rank has a gradient for, with a decay on a tensor that one rank holds and the other has not."""
    module = strategies.SHARDINGS["fsdp1-full_shard-2"].start(Model(False), "AdaTAM", {}, 1).module
    first, *others = module.parameters()
    groups = [{"params": [first], "weight_decay": 0.1}, {"params": others}]
    optimizer = hf_tam.AdaTAM(groups, max_grad_norm=CLIP)
    optimizer.attach(module)
    module(torch.ones(2, 5), 1).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    calls = []
    with comparing.counted(calls, optimizer):
        optimizer.step()
    return first.numel(), [name for name, _ in calls]


def test_every_rank_takes_as_many_norms(worlds):
    (held, calls), (not_held, others) = worlds(2, "norms").run(step_without_gradients)
    assert held > not_held == 0
    assert calls == others == ["all_reduce"] * 2


def refused_step(name):
    trained = strategies.SHARDINGS[name].start(Model(False), "AdaTAMW", {"max_grad_norm": CLIP}, 1)
    try:
        trained.step(batches_of_steps()[0], 0, use=0)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", ["zero2-2", pytest.param("zero3-2", marks=pytest.mark.slow)])
def test_deepspeed_has_a_clipping_of_its_own(worlds, name):
    pytest.importorskip("deepspeed")
    for message in worlds(2).run(refused_step, name):
        assert message.startswith(f"max_grad_norm={CLIP} cannot be used with DeepSpeed ZeRO")
        assert message.endswith("set gradient_clipping in its config")


# By which a Trainer takes the norm of gradients: the last where parts of the model lie on different meshes.
CLIPPING = [
    (Accelerator, "clip_grad_norm_"),
    (FullyShardedDataParallel, "clip_grad_norm_"),
    *([(Trainer, "_mixed_mesh_grad_norm")] if hasattr(Trainer, "_mixed_mesh_grad_norm") else []),
]


class Counting(TrainerCallback):
    """Notes the collectives inside the steps of the optimizer."""

    def __init__(self):
        self.calls, self.stack = [], contextlib.ExitStack()

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.optimizer = runs.unwrapped_twice(optimizer)
        self.stack.enter_context(comparing.counted(self.calls, self.optimizer))

    def on_train_end(self, args, state, control, **kwargs):
        self.stack.close()


def trainer_run(folder, name, inside, lora):
    """Train, clipping inside the step or as the Trainer does by itself; and how often the latter happened."""
    way, counting, clipped = runs.WAYS[name], Counting(), []
    options = {**runs.OPTIONS, "per_device_train_batch_size": runs.GLOBAL_BATCH // (way.world // way.tensor)}
    options |= {"optim_args": f"fused_clip={str(inside).lower()}", "logging_steps": 1, "callbacks": [counting]}
    options["max_grad_norm"] = limit_of(lora)
    with runs.strategy(way), contextlib.ExitStack() as stack:
        for owner, method in CLIPPING:
            stack.enter_context(noted(owner, method, clipped))
        trainer = make_trainer(folder, model=runs.model_of(lora, folder, way), **options, **runs.trainer_options(way))
        trainer.train()
        return {
            **runs.outcome(counting.optimizer, trainer.model_wrapped, way),
            "limits": {group["max_grad_norm"] for group in counting.optimizer.param_groups},
            "calls": [called for called, _ in counting.calls],
            "clipped": len(clipped),
            "norms": norms_of(trainer),
        }


def limit_of(lora):
    """One that every step exceeds: the gradients of these adapters are small."""
    return 1e-4 if lora else runs.OPTIONS["max_grad_norm"]


def norms_of(trainer):
    return [float(row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row]


@contextlib.contextmanager
def noted(owner, method, calls):
    original = getattr(owner, method)

    @functools.wraps(original)
    def noting(self, *args, **kwargs):
        calls.append(method)
        return original(self, *args, **kwargs)

    setattr(owner, method, noting)
    try:
        yield
    finally:
        setattr(owner, method, original)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("fsdp2", False),
        pytest.param("fsdp1", False, marks=pytest.mark.slow),
        pytest.param("fsdp2", True, marks=pytest.mark.slow),
        pytest.param("ddp", True, marks=pytest.mark.slow),
        pytest.param("hsdp", False, marks=pytest.mark.slow),
        pytest.param("tp", False, marks=pytest.mark.slow),
    ],
)
def test_the_trainer_leaves_clipping_to_the_step(worlds, saved_model, name, lora):
    way = runs.WAYS[name]
    own = worlds(way.world).run(trainer_run, saved_model, name, False, lora)
    inside = worlds(way.world).run(trainer_run, saved_model, name, True, lora)
    for theirs, ours in zip(own, inside, strict=True):
        assert theirs["kind"] == ours["kind"] == way.kind
        assert (theirs["limits"], ours["limits"]) == ({None}, {limit_of(lora)})
        assert theirs["clipped"] >= runs.STEPS
        assert ours["clipped"] == 0
        assert ours["calls"] == theirs["calls"]
        assert len(ours["norms"]) == runs.STEPS
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-4)
        assert min(ours["norms"]) > limit_of(lora)
        assert_close(ours, theirs)


def assert_close(ours, theirs):
    assert ours["torque"] == pytest.approx(theirs["torque"], abs=TORQUE)
    for name, values in theirs["parameters"].items():
        actual, expected = torch.tensor(ours["parameters"][name]), torch.tensor(values)
        assert (actual - expected).abs().max() <= PARAMETERS * expected.abs().max(), name


@pytest.mark.parametrize("name", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_engine_of_deepspeed_clips(worlds, saved_model, name):
    """The option changes nothing there: the same run bit for bit."""
    pytest.importorskip("deepspeed")
    own = worlds(2).run(trainer_run, saved_model, name, False, True)
    inside = worlds(2).run(trainer_run, saved_model, name, True, True)
    for theirs, ours in zip(own, inside, strict=True):
        assert ours["kind"] == "flat"
        assert ours["limits"] == {None}
        assert ours == theirs
