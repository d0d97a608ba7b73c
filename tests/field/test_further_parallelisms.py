"""Ways of sharding that are less often met, each beside its unsharded twin."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import hf_tam
from hf_tam.sharding import Reduced
from hf_tam.sharding.groups import ShardGroups
from tests.sharding import checkpoints, comparing, strategies
from tests.sharding import framework_runs as runs
from tests.sharding.test_equivalence import PARAMETERS, TORQUE
from tests.sharding.test_two_agents import free_port

# One worker runs all distributed tests.
pytestmark = pytest.mark.distributed


def fsdp1(strategy, shape=None):
    def shard(model):
        mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=strategy,
            device_mesh=mesh,
        )

    return shard


SHARDINGS = {
    "fsdp1-hybrid": strategies.of_wrapper(
        "fsdp1-hybrid", 4, fsdp1(ShardingStrategy.HYBRID_SHARD, (2, 2)), flat=True, kinds=("Parameter",)
    ),
    "fsdp1-hybrid-zero2": strategies.of_wrapper(
        "fsdp1-hybrid-zero2", 4, fsdp1(ShardingStrategy._HYBRID_SHARD_ZERO2, (2, 2)), flat=True, kinds=("Parameter",)
    ),
    "fsdp1-no-shard": strategies.of_wrapper(
        "fsdp1-no-shard", 2, fsdp1(ShardingStrategy.NO_SHARD), groups=0, flat=True, kinds=("Parameter",)
    ),
}


def compare(name, optimizer_name, options, lora):
    strategies.SHARDINGS[name] = SHARDINGS[name]
    return comparing.compare(name, optimizer_name, options, lora)


@pytest.mark.parametrize(
    ("name", "optimizer_name", "scope", "lora"),
    [
        ("fsdp1-hybrid", "AdaTAMW", "tensor", False),
        ("fsdp1-hybrid", "TAM", "model", True),
        ("fsdp1-hybrid-zero2", "AdaTAM", "model", False),
        ("fsdp1-hybrid-zero2", "AdaTAMW", "tensor", True),
        ("fsdp1-no-shard", "AdaTAMW", "model", False),
        ("fsdp1-no-shard", "TAM", "tensor", True),
    ],
)
def test_fsdp1_with_replicas(worlds, name, optimizer_name, scope, lora):
    sharding = SHARDINGS[name]
    options = {"weight_decay": 0.1, "scope": scope}
    results = worlds(sharding.world).run(compare, name, optimizer_name, options, lora)
    for result in results:
        assert result["kinds"] == {"Parameter"}
        assert result["same_order"]
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result
        assert max(abs(damping - 0.5) for damping in result["damping"]) > 0.01
        for calls in result["calls"]:
            assert [called for called, _ in calls] == ["all_reduce"] * sharding.groups
    if sharding.groups:
        assert max(result["cut"]["torque"] for result in results) > 100 * TORQUE, results
        assert max(result["cut"]["parameters"] for result in results) > 10 * PARAMETERS, results


@pytest.fixture(scope="module")
def saved_experts(tmp_path_factory):
    """A tiny model of transformers with four experts in each of two layers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
        decoder_sparse_step=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("experts")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


def expert_parallel(folder, sizes, options, cut):
    """Train sharded experts, and a whole twin on the gradients that they had; how far apart they end.

    The same gradients, because a weight whose gradient is next to nothing moves by its sign.
    """
    from transformers import AutoModelForCausalLM, DistributedConfig

    config = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    twin = AutoModelForCausalLM.from_pretrained(folder)
    optimizers = [hf_tam.AdaTAMW(module.parameters(), lr=2e-3, **options) for module in (model, twin)]
    for optimizer, module in zip(optimizers, (model, twin), strict=True):
        optimizer.attach(module)
    calls = []
    rows = torch.randint(0, 64, (40, 12), generator=torch.Generator().manual_seed(1))
    for batch in rows.chunk(10):
        mine = batch.chunk(config.fsdp_size)[dist.get_rank() // config.tp_size]
        model(input_ids=mine, labels=mine).loss.backward()
        twin(input_ids=batch, labels=batch).loss.backward()
        off = give_gradients(model, twin)
        calls.append([])
        with comparing.counted(calls[-1], optimizers[0]), reducing(not cut):
            optimizers[0].step()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    stats, expected = (optimizer.torque_stats() for optimizer in optimizers)
    wholes = dict(twin.named_parameters())
    return {
        "placements": {str(getattr(param, "placements", "")) for param in model.parameters()},
        "gradients": off,
        "calls": [[called for called, _ in step] for step in calls[1:]],
        "torque": (stats["torque"] - expected["torque"]).abs().max().item(),
        "moved": expected["torque"].abs().max().item(),
        "parameters": max(far(param, wholes[name]) for name, param in model.named_parameters()),
    }


def give_gradients(model, twin):
    """Put the whole gradients of `model` into `twin`; how far its own were from them."""
    off, wholes = 0.0, dict(twin.named_parameters())
    for name, param in model.named_parameters():
        whole = param.grad.full_tensor() if hasattr(param.grad, "full_tensor") else param.grad
        off = max(off, ((whole - wholes[name].grad).norm() / wholes[name].grad.norm()).item())
        wholes[name].grad = whole.clone()
    return off


def far(param, whole):
    found = param.detach().full_tensor() if hasattr(param, "full_tensor") else param.detach()
    return ((found - whole).abs().max() / whole.abs().max()).item()


@contextlib.contextmanager
def reducing(really):
    original = ShardGroups.reduce
    if not really:
        ShardGroups.reduce = lambda self, sums, rows, *, present: Reduced(sums)
    yield
    ShardGroups.reduce = original


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ({"tp_size": 2, "ep_size": 2}, 1),  # the same two ranks
        ({"fsdp_size": 2, "ep_size": 2}, 2),
        ({"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, 4),
    ],
)
def test_experts_on_several_ranks(worlds, saved_experts, sizes, axes):
    """As transformers' DistributedConfig lays them out: each axis over which anything is cut is summed over."""
    world = worlds(sizes.get("tp_size", 1) * sizes.get("fsdp_size", 1))
    results = world.run(
        expert_parallel, saved_experts, sizes, {"scope": "model" if "tp_size" in sizes else "tensor"}, False
    )
    for result in results:
        assert any("Shard" in placement for placement in result["placements"]), result
        assert result["gradients"] < 1e-3, result
        assert result["moved"] > 1000 * TORQUE, result
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result
        assert {tuple(calls) for calls in result["calls"]} == {("all_reduce",) * axes}, result
    results = world.run(expert_parallel, saved_experts, sizes, {}, True)
    assert max(result["torque"] for result in results) > 100 * TORQUE, results


def context_parallel(shards, optim, scope, cut=False):
    """Through `Accelerator.prepare`: parameters are cut over the ranks that share a sequence, too.

    Each rank is given rows of its own: torch 2.13 has no ring attention for the CPU.
    """
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    world = dist.get_world_size()
    with runs.strategy(runs.WAYS["fsdp2"]):
        accelerator = Accelerator(
            gradient_accumulation_steps=runs.ACCUMULATED,
            parallelism_config=ParallelismConfig(dp_shard_size=shards, cp_size=world // shards),
            fsdp_plugin=FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            ),
        )  # fmt: skip
        model = runs.model_of(False)
        model, optimizer = accelerator.prepare(model, runs.loop_optimizer(model, optim, scope))
        ours, calls = runs.unwrapped_twice(optimizer), []
        with comparing.counted(calls, ours), reducing(not cut):
            runs.loop(model, optimizer, accelerator=accelerator, shard=(dist.get_rank(), world))
        meshes = {param.device_mesh.mesh_dim_names for param in model.parameters()}
        return meshes, [called for called, _ in calls], runs.outcome(ours, model, runs.WAYS["fsdp2"])


@pytest.mark.parametrize(
    ("world", "shards", "optim", "scope"),
    [(2, 1, "adatamw", "tensor"), pytest.param(4, 2, "tam", "model", marks=pytest.mark.slow)],
)
def test_the_mesh_of_context_parallelism(worlds, world, shards, optim, scope):
    expected = runs.accelerator_twin(optim, scope, False)
    for meshes, calls, result in worlds(world).run(context_parallel, shards, optim, scope):
        assert meshes == {("dp_shard_cp",)}
        assert calls == ["all_gather_object"] + ["all_reduce"] * runs.STEPS
        assert result["kind"] == "DTensor"
        assert result["torque"] == pytest.approx(expected["torque"], abs=TORQUE)
        for name, values in expected["parameters"].items():
            whole, found = torch.tensor(values), torch.tensor(result["parameters"][name])
            assert (found - whole).abs().max() <= PARAMETERS * whole.abs().max(), name
    for _, _, result in worlds(world).run(context_parallel, shards, optim, scope, True):
        missed = max(abs(value - expected["torque"][name]) for name, value in result["torque"].items())
        assert missed > 100 * TORQUE


def saved_while_training(folder, name):
    """A checkpoint that is written in the background, while the next steps are taken; and a run resumed from it."""
    model, optimizer = checkpoints.build(name, "AdaTAMW", unused=False)
    checkpoints.train(model, optimizer, 0, checkpoints.SAVED_AT)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    # In a process group of its own: the thread that writes must not take part in the collectives of training.
    writing = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
    checkpoints.train(model, optimizer, checkpoints.SAVED_AT, checkpoints.STOPPED_AT)
    expected = checkpoints.snapshot(model, optimizer)
    writing.result()
    model, optimizer = checkpoints.build(name, "AdaTAMW", unused=False, moved=True)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    checkpoints.train(model, optimizer, checkpoints.SAVED_AT, checkpoints.STOPPED_AT)
    found = checkpoints.snapshot(model, optimizer)
    return sorted({name.rpartition(".")[2] for name in found}), checkpoints.differences(found, expected)


@pytest.mark.parametrize("name", ["fsdp2", "ddp", pytest.param("fsdp2-offload", marks=pytest.mark.slow)])
def test_an_asynchronous_save(worlds, tmp_path, name):
    """What the steps after it do to the states must not get into it."""
    for states, different in worlds(2).run(saved_while_training, str(tmp_path / "saved"), name):
        assert {"torque", "step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "value"} <= set(states)
        assert different == []


def trained_through(name):
    model, optimizer = checkpoints.build(name, "AdaTAMW")
    checkpoints.train(model, optimizer, 0, checkpoints.STOPPED_AT)
    return checkpoints.snapshot(model, optimizer)


@pytest.mark.slow
def test_a_job_that_torchrun_starts_again(worlds, tmp_path):
    """A rank is killed in the middle; the run that torchrun starts in its place ends as if nothing had happened."""
    rendezvous = [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_backend=c10d", "--rdzv_id=test", "--nnodes=1",
                  "--nproc_per_node=2", "--max-restarts=1", "--local_addr=127.0.0.1"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, str(Path(__file__).with_name("elastic.py"))]
    # The store that torchrun shares with the processes still holds the addresses of the dead ones after a restart, so
    # that none of torch's process groups starts (torch 2.13, https://github.com/pytorch/pytorch/issues/135712).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = subprocess.Popen(
        [*command, str(tmp_path), "fsdp2"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = agent.communicate(timeout=400)
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    assert agent.returncode == 0, output[-3000:]
    saved = torch.load(tmp_path / "found.pt", weights_only=True)
    assert saved["attempt"] == 1
    expected = worlds(2).run(trained_through, "fsdp2")[0]
    assert any(name.endswith("torque") for name in expected)
    assert checkpoints.differences(saved["tensors"], expected) == []
