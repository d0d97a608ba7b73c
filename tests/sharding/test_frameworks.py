"""The real Trainer, and a loop around `Accelerator.prepare`, under every strategy: the numbers of one process."""

import functools
import itertools
import json

import pytest
import torch

from tests.integrations.untouched import tiny_llama
from tests.sharding import framework_runs as runs

pytestmark = pytest.mark.distributed
# Torques are fp64 sums of gradients that fp32 all-reduces and shorter batches have summed in another order.
TORQUE = 1e-6
PARAMETERS = 1e-5


def pairwise():
    """Every way through both frameworks, and between them every pair of optimizer, scope and full or LoRA."""
    choices = itertools.cycle(itertools.product((True, False), ("adatamw", "adatam", "tam"), ("tensor", "model")))
    for name in runs.WAYS:
        for framework in ("trainer", "accelerator"):
            lora, optim, scope = next(choices)
            if name.startswith("zero") and framework == "trainer":
                scope = "tensor"  # the Trainer makes two param groups: model is refused, see below
            # On four ranks the gate has the loop, which takes half as long as the Trainer.
            marks = pytest.mark.slow if framework == "trainer" and name in ("hsdp", "fsdp2-tp") else ()
            where = f"{framework}-{name}-{optim}-{scope}-{lora}"
            yield pytest.param(framework, name, optim, scope, lora, id=where, marks=marks)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return str(folder)


@functools.cache
def twin(framework, folder, optim, scope, lora):
    torch.set_num_threads(1)
    if framework == "trainer":
        return runs.trainer_twin(folder, optim, scope, lora)
    return runs.accelerator_twin(optim, scope, lora)


@pytest.mark.parametrize(("framework", "name", "optim", "scope", "lora"), list(pairwise()))
def test_the_numbers_are_those_of_one_process(worlds, saved_model, framework, name, optim, scope, lora):
    way = runs.WAYS[name]
    if way.stage:
        pytest.importorskip("deepspeed")
    expected = twin(framework, saved_model, optim, scope, lora)
    assert max(abs(torque) for torque in expected["torque"].values()) > 0.02
    run = runs.trainer_run if framework == "trainer" else runs.accelerator_run
    for result in worlds(way.world).run(run, saved_model, name, optim, scope, lora):
        assert result["kind"] == way.kind
        assert result["torque"].keys() == expected["torque"].keys()
        for parameter, torque in expected["torque"].items():
            assert result["torque"][parameter] == pytest.approx(torque, abs=TORQUE), parameter
        for parameter, values in expected["parameters"].items():
            actual, whole = torch.tensor(result["parameters"][parameter]), torch.tensor(values)
            assert (actual.reshape(-1) - whole.reshape(-1)).abs().max() <= PARAMETERS * whole.abs().max(), parameter


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_the_torque_log_is_that_of_one_process(worlds, saved_model, tmp_path, name):
    """The same layer groups, and angles, dampings, learning rates and gradient norms of whole tensors."""
    if runs.WAYS[name].stage:
        pytest.importorskip("deepspeed")
    alone = runs.torque_rows(saved_model, str(tmp_path / "alone"), None, True)
    results = worlds(2).run(runs.torque_rows, saved_model, str(tmp_path / "shared"), name, True)
    assert [result["kind"] for result in results] == [runs.WAYS[name].kind] * 2
    expected, actual = ([json.loads(line) for line in found["lines"]] for found in (alone, results[0]))
    groups = [f"model.layers.0.{part}.{side}" for part in ("self_attn", "mlp") for side in ("lora_A", "lora_B")]
    assert [(row["step"], row["group"]) for row in expected] == [
        (at, group) for at in range(4, 21, 4) for group in groups
    ]
    for left, right in zip(expected, actual, strict=True):
        assert right == pytest.approx(left, rel=1e-4, abs=1e-5), left["step"]
    for result in results:
        for left, right in zip(alone["logs"], result["logs"], strict=True):
            assert {key: value for key, value in right.items() if key.startswith("torque/")} == pytest.approx(
                {key: value for key, value in left.items() if key.startswith("torque/")}, rel=1e-4, abs=1e-5
            )


@pytest.mark.parametrize("run", [runs.trainer_with_deepspeed, runs.accelerator_with_deepspeed])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_is_resumed_bit_for_bit(worlds, tmp_path, run, name):
    pytest.importorskip("deepspeed")
    saved = worlds(2).run(run, str(tmp_path), name, False)
    resumed = worlds(2, "resumed").run(run, str(tmp_path), name, True)
    for expected, actual in zip(saved, resumed, strict=True):
        assert any("torque" in key for key in expected)
        assert actual == expected


def test_a_lost_shard_is_named(worlds, tmp_path):
    pytest.importorskip("deepspeed")
    worlds(2).run(runs.accelerator_with_deepspeed, str(tmp_path), "zero2", False)
    (lost,) = (tmp_path / "state").glob("*/*zero_pp_rank_1*optim_states.pt")
    lost.unlink()
    for message in worlds(2, "resumed").run(runs.load_damaged, str(tmp_path), "zero2"):
        assert message.startswith(f"{lost} is missing. This checkpoint was not written to its end")
