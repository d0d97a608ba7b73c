"""Settings and ways of DeepSpeed that move, pad or share parameters: the numbers of one process, or a refusal."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import hf_tam
from tests.field.deepspeed_alone import deepspeed_alone
from tests.sharding import comparing, framework_runs, strategies, zero_engine
from tests.sharding.trained import CLIP

pytest.importorskip("deepspeed")
TORQUE, PARAMETERS = 1e-6, 1e-5

EXACT = {
    "parameter_alignment": (2, {"parameter_alignment": True}),
    "no contiguous gradients, overlapped": (1, {"contiguous_gradients": False, "overlap_comm": True}),
    # every parameter a sub-group of its own, none kept whole, offloaded, with a second partition inside a node
    "offloaded parameters": (
        3,
        {
            "offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0, "sub_group_size": 0,
            "zero_hpz_partition_size": 2,
        },
    ),
    "a setting of ZeRO-2's under ZeRO-3": (3, {"round_robin_gradients": True}),
}  # fmt: skip


def compare(stage, config):
    sharding = strategies.of_zero(stage, 2, label="setting", **config)
    with mock.patch.dict(strategies.SHARDINGS, {"setting": sharding}):
        return comparing.compare("setting", "AdaTAMW", {"weight_decay": 0.1}, False)


@pytest.mark.distributed
@pytest.mark.parametrize("name", EXACT)
def test_the_numbers_are_those_of_one_process(worlds, name):
    for result in worlds(2).run(compare, *EXACT[name]):
        assert result["kinds"] == {"Tensor"}
        assert result["torque"] <= TORQUE
        assert result["parameters"] <= PARAMETERS
        assert result["cut"]["torque"] > 100 * TORQUE


def layers():
    torch.manual_seed(0)
    return [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)]


def batches(step):
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)) for _ in range(2)]


def loss_of(outputs, targets):
    return (outputs - targets).square().mean()


STEPS = 6


def twin(*, clip, parameters=None):
    module = nn.Sequential(*layers())
    for name, parameter in module.named_parameters() if parameters else ():
        parameter.data.copy_(parameters[name].reshape(parameter.shape))
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.02)
    for step in range(STEPS):
        optimizer.zero_grad()
        for inputs, targets in batches(step):
            (loss_of(module(inputs), targets) / 2).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
    return module, optimizer


def furthest(parameters, module):
    expected = dict(module.named_parameters())
    return max((value.reshape(-1) - expected[name].reshape(-1)).abs().max().item() for name, value in parameters)


def under_zero_init():
    """The model's parameters are cut while it is built: the optimizer never sees one whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed = zero_engine.import_deepspeed()
    config = zero_engine.configuration(3, stage3_param_persistence_threshold=0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = nn.Sequential(*layers())
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.02)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    start = {name: safe_get_full_fp32_param(value).clone() for name, value in module.named_parameters()}
    for step in range(STEPS):
        for inputs, targets in batches(step):
            engine.backward(loss_of(engine(inputs), targets))
            engine.step()
    alone, expected = twin(clip=True, parameters=start)
    stats, expected = optimizer.torque_stats(), expected.torque_stats()
    trained = [(name, safe_get_full_fp32_param(value)) for name, value in module.named_parameters()]
    return stats["names"], (stats["torque"] - expected["torque"]).abs().max().item(), furthest(trained, alone)


@pytest.mark.distributed
def test_a_model_built_under_zero_init(worlds):
    for names, torque, parameters in worlds(2).run(under_zero_init):
        assert names == [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
        assert torque <= TORQUE
        assert parameters <= PARAMETERS


def pipeline(stage, options):
    """Two pipeline stages; how far the parameters of this rank's end from one process, or what was refused."""
    deepspeed = zero_engine.import_deepspeed()
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")

    module = PipelineModule(layers=layers(), num_stages=2, loss_fn=loss_of, partition_method="uniform")
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.02, **options)
    config = zero_engine.configuration(stage) | {"gradient_clipping": 0.0}
    try:
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    except ValueError as error:
        return str(error)
    for step in range(STEPS):
        engine.train_batch(iter(batches(step)))
    names = [name for name, _ in module.named_parameters()]
    return names, furthest(module.named_parameters(), twin(clip=False)[0])


@pytest.mark.distributed
def test_pipeline_stages(worlds):
    results = worlds(2, "pipeline").run(pipeline, 0, {})
    assert [len(result[0]) for result in results] == [4, 2], results
    assert max(distance for _, distance in results) <= PARAMETERS
    for stage, options, words in (
        (0, {"scope": "model"}, "scope='model' would be taken over the parameters of one"),
        (0, {"max_grad_norm": 1.0}, "max_grad_norm=1.0 would be taken over the parameters of one pipeline stage"),
        (1, {}, "ZeRO-1 under DeepSpeed's pipeline cuts the tensors of a stage over some of the ranks only"),
    ):
        assert all(words in message for message in worlds(2, "pipeline").run(pipeline, stage, options))


def ulysses():
    """DeepSpeed's sequence parallelism as accelerate sets it up, with ZeRO-3 over both ranks of one sequence."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, ParallelismConfig
    from accelerate.utils.dataclasses import DeepSpeedSequenceParallelConfig
    from torch.distributed.nn.functional import all_gather

    way = framework_runs.Way(2, "flat", stage=3)
    rows, length, steps = framework_runs.TokenRows(32).rows, 12, 4
    alone = framework_runs.model_of(False)  # before attention is replaced, in every model
    expected = framework_runs.loop_optimizer(alone, "adatamw", "tensor")
    for step in range(steps):
        expected.zero_grad()
        batch = rows[2 * step : 2 * step + 2]
        alone(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        expected.step()
    with framework_runs.strategy(way):
        config = framework_runs.deepspeed_config(way) | {"gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length=length, sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        )
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            parallelism_config=ParallelismConfig(sp_backend="deepspeed", sp_size=2, sp_handler=handler),
        )
        model = framework_runs.model_of(False)
        optimizer = framework_runs.loop_optimizer(model, "adatamw", "tensor")
        items = [{"input_ids": row, "labels": row, "position_ids": torch.arange(length)} for row in rows[: 2 * steps]]
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(items, batch_size=2)
        )
        for batch in loader:
            labels = batch.pop("shift_labels")
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            counts = all_gather((labels != -100).sum())
            losses = all_gather(loss)
            accelerator.backward(sum(part * count for part, count in zip(losses, counts, strict=True)) / sum(counts))
        inner = framework_runs.unwrapped_twice(optimizer)
        shared = batch["input_ids"].shape[1]
        torques = inner.torque_stats()["torque"] - expected.torque_stats()["torque"]
        trained = framework_runs.whole_parameters(model).items()
        kind = framework_runs.kind_of(inner, way)
        return kind, shared, torques.abs().max().item(), furthest(trained, alone)


@pytest.mark.distributed
def test_sequence_parallelism_of_accelerate(worlds):
    """In processes of its own: it replaces the attention of every model in a process."""
    for kind, length, torque, parameters in worlds(2, "ulysses").run(ulysses):
        assert (kind, length) == ("flat", 6)
        assert torque <= TORQUE
        assert parameters <= PARAMETERS


@pytest.mark.parametrize("name", ["get_tensor_model_parallel_world_size", "get_model_parallel_world_size"])
def test_an_mpu_that_cuts_tensors_is_refused(name):
    """Megatron's convention: a model-parallel unit is handed to DeepSpeed."""
    mpu = SimpleNamespace(**{name: lambda: 2, "get_data_parallel_world_size": lambda: 1})
    with deepspeed_alone() as deepspeed:
        module = nn.Sequential(*layers())
        optimizer = hf_tam.AdaTAMW(module.parameters())
        with pytest.raises(ValueError, match="mpu that DeepSpeed is given cuts tensors over 2 tensor-parallel ranks"):
            deepspeed.initialize(model=module, optimizer=optimizer, config=zero_engine.configuration(0), mpu=mpu)
