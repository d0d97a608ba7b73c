"""Optimizers that hold a part of the model: exact with scope "tensor", refused where they would need all of it."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import hf_tam
from hf_tam.sharding import peers
from tests.field.test_ranks_that_disagree import SOON_S, assert_all_refused, outcome
from tests.sharding.zero_engine import import_deepspeed

# One worker runs all distributed tests.
pytestmark = pytest.mark.distributed

STEPS = 8
TORQUE, PARAMETERS = 1e-6, 1e-5
"""As for sharded models: sums of gradients in another order."""
TOGETHER = [{"scope": "model"}, {"max_grad_norm": 0.05}]
"""What takes all parameters of an optimizer together."""


class Model(nn.Module):
    """Four layers of different sizes, which may be stages, with a norm that clipping always cuts."""

    def __init__(self, first=0, last=4, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 6), nn.Linear(6, 2)]
        self.layers = nn.ModuleDict({str(number): layers[number] for number in range(first, last)})

    def forward(self, inputs):
        for layer in self.layers.values():
            inputs = torch.tanh(layer(inputs))
        return inputs


def batch_of(step):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def loss_of(outputs, targets):
    return (outputs - targets).square().mean()


def target_of(batch):
    return batch[:, :2].sin()


def twin(options, clip=None, groups=nn.Module.parameters):
    """One process with the whole model: parameters and torques by name."""
    model = Model()
    optimizer = hf_tam.AdaTAMW(groups(model), lr=0.05, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(batch_of(step)), target_of(batch_of(step))).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return numbers(model, [optimizer])


def numbers(model, optimizers):
    """Parameters and torques by the names that the model gives them."""
    names = {param: name.removeprefix("module.") for name, param in model.named_parameters()}
    parameters = {name: param.detach().clone() for param, name in names.items()}
    torques = {}
    for optimizer in optimizers:
        for param, state in optimizer.state.items():
            torques[names[param]] = float(state["torque"])
    return parameters, torques


def distance(found, expected):
    parameters, torques = found
    return {
        "parameters": max(
            ((value - expected[0][name]).abs().max() / expected[0][name].abs().max()).item()
            for name, value in parameters.items()
        ),
        "torque": max(abs(value - expected[1][name]) for name, value in torques.items()),
        "tensors": len(torques),
    }


def zero_redundancy(options, clip=None):
    """Data parallelism whose ranks share the states of the optimizer among them."""
    model = DistributedDataParallel(Model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), hf_tam.AdaTAMW, lr=0.05, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = batch_of(step).chunk(dist.get_world_size())[dist.get_rank()]
        loss_of(model(rows), target_of(rows)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return distance(numbers(model, [optimizer.optim]), twin(options, clip))


def test_zero_redundancy_optimizer_with_an_angle_a_tensor(worlds):
    results = worlds(2, "parts").run(zero_redundancy, {}, 0.05)
    assert sum(result["tensors"] for result in results) == 8
    for result in results:
        assert 0 < result["tensors"] < 8
        assert result["torque"] <= TORQUE, results
        assert result["parameters"] <= PARAMETERS, results


@pytest.mark.parametrize("options", TOGETHER)
def test_zero_redundancy_optimizer_with_all_parameters_together(worlds, options):
    results = worlds(2, "parts").run(outcome, zero_redundancy, options)
    assert_all_refused(results, "ZeroRedundancyOptimizer hands each rank a part", "use scope='tensor'",
                       "torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before the step")  # fmt: skip


def with_decay(model):
    """Two param groups whose parameters come in turns."""
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": 0.1},
        {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
    ]


def resumed_zero_redundancy(folder):
    """Stopped after four steps and taken up by other objects, through `consolidate_state_dict`."""

    def start(seed):
        model = DistributedDataParallel(Model(seed=seed))
        return model, ZeroRedundancyOptimizer(with_decay(model), hf_tam.AdaTAMW, lr=0.05)

    def train(first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(model(batch_of(step)), target_of(batch_of(step))).backward()
            optimizer.step()

    model, optimizer = start(3)
    train(0, 4)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save([model.state_dict(), optimizer.state_dict()], f"{folder}/saved.pt")
    dist.barrier()
    model, optimizer = start(4)
    weights, states = torch.load(f"{folder}/saved.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(states)
    train(4, STEPS)
    return distance(numbers(model, [optimizer.optim]), twin({}, groups=with_decay))


def test_zero_redundancy_optimizer_resumed(worlds, tmp_path):
    for result in worlds(2, "parts").run(resumed_zero_redundancy, str(tmp_path)):
        assert result["torque"] <= TORQUE
        assert result["parameters"] <= PARAMETERS


def pipeline(options, replicas=1):
    """torch's pipelining: two stages, each with its optimizer; with replicas also data parallel."""
    mesh = init_device_mesh("cpu", (2, replicas), mesh_dim_names=("stage", "replica"))
    index, replica = mesh.get_coordinate()
    module = Model(2 * index, 2 * index + 2)
    if replicas > 1:
        fully_shard(module, mesh=mesh["replica"])
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=mesh.get_group("stage"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda found, rows: loss_of(found, target_of(rows)))
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.05, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = batch_of(step).chunk(replicas)[replica]
        schedule.step(*([rows] if index == 0 else []), **({} if index == 0 else {"target": rows}))
        optimizer.step()
    return distance(whole(numbers(module, [optimizer])), twin(options))


def whole(found):
    parameters, torques = found
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in parameters.items()}, torques  # fmt: skip


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_stages_of_a_pipeline_with_an_angle_a_tensor(worlds, replicas):
    for result in worlds(2 * replicas, "parts").run(pipeline, {}, replicas):
        assert result["tensors"] == 4
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result


@pytest.mark.parametrize("options", TOGETHER)
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_stages_of_a_pipeline_with_all_parameters_together(worlds, options, replicas):
    results = worlds(2 * replicas, "parts").run(outcome, pipeline, options, replicas)
    assert_all_refused(results, "step different parameters", "stages of a pipeline", "use scope='tensor'",
                       "optimizer.attach(model, whole=True)")  # fmt: skip


class Experts(nn.Module):
    """An expert on each rank, and a router on all, by hand: what every rank holds has the same names and shapes."""

    def __init__(self, alike):
        super().__init__()
        torch.manual_seed(3)
        self.router = nn.Linear(5, 5)
        torch.manual_seed(3 if alike else dist.get_rank())
        self.expert = nn.Linear(5, 2)

    def forward(self, inputs):
        return self.expert(self.router(inputs))


def experts_by_hand(options, alike):
    """Each rank has rows of its own, as if its router had chosen them for its expert."""
    model = Experts(alike)
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05, **options)
    for step in range(2):
        optimizer.zero_grad()
        rows = batch_of(step).chunk(2)[dist.get_rank()]
        loss_of(model(rows), target_of(rows)).backward()
        for param in model.router.parameters():
            dist.all_reduce(param.grad)
        optimizer.step()


@pytest.mark.parametrize("options", TOGETHER)
@pytest.mark.parametrize("alike", [False, True])
def test_experts_of_the_same_shapes(worlds, options, alike):
    """Their values tell them apart; or, where all begin as copies of one, their gradients."""
    results = worlds(2, "parts").run(outcome, experts_by_hand, options, alike)
    assert_all_refused(results, "experts", "use scope='tensor'")


def test_experts_with_an_angle_a_tensor(worlds):
    assert [message for message, _ in worlds(2, "parts").run(outcome, experts_by_hand, {}, False)] == [None, None]


def trained(model, options, *, steps=3, attach=None):
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05, **options)
    if attach is not None:
        optimizer.attach(model, whole=attach)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(batch_of(step)), target_of(batch_of(step))).backward()
        optimizer.step()
    return optimizer.torque_stats()["torque"].tolist()


def actor_and_critic(options, attach):
    return trained(Model() if dist.get_rank() == 0 else nn.Linear(5, 2), options, attach=attach)


@pytest.mark.parametrize("options", TOGETHER)
def test_an_actor_here_and_a_critic_there(worlds, options):
    """They look like two stages until the user says what they are."""
    for attach in (None, False):
        results = worlds(2, "parts").run(outcome, actor_and_critic, options, attach)
        assert_all_refused(results, "a model of its own, say so: optimizer.attach(model, whole=True)")
    worlds(2, "parts").run(actor_and_critic, options, True)


def test_an_actor_here_and_a_critic_there_with_an_angle_a_tensor(worlds):
    worlds(2, "parts").run(actor_and_critic, {}, None)


def two_models(options, attach):
    """Four ranks, two models, each sharded over the two ranks that train it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))
    model = fully_shard(Model() if mesh.get_local_rank("model") == 0 else nn.Linear(5, 2), mesh=mesh["shard"])
    return trained(model, options, attach=attach)


def test_two_models_on_two_halves_of_the_ranks(worlds):
    """They share no tensor and no group."""
    first, second, *others = worlds(4, "parts").run(two_models, {}, None)
    assert first == second != others[0] == others[1]
    results = worlds(4, "parts").run(outcome, two_models, TOGETHER[0], None)
    assert_all_refused(results, "step different parameters", "optimizer.attach(model, whole=True)")
    first, second, *others = worlds(4, "parts").run(two_models, TOGETHER[0], True)
    assert first == second != others[0] == others[1]


def other_options_for_the_same_model(options):
    return trained(DistributedDataParallel(Model()), options[dist.get_rank()])


@pytest.mark.parametrize(
    ("mine", "others", "name"),
    [
        ({"scope": "model"}, {}, "scope"),
        ({}, {"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"max_grad_norm": 2.0}, {"max_grad_norm": 1.0}, "max_grad_norm"),
    ],
)
def test_other_arguments_on_one_replica(worlds, mine, others, name):
    """Nothing is communicated, and the replicas would drift apart."""
    results = worlds(2, "parts").run(outcome, other_options_for_the_same_model, [mine, others])
    assert_all_refused(results, f"step the same parameters with different values of {name}")


def replicas(options, count):
    """Several optimizers under DistributedDataParallel, as generative adversarial networks have."""
    return [trained(DistributedDataParallel(Model(seed=seed)), options) for seed in range(count)]


@pytest.mark.parametrize("options", TOGETHER)
def test_replicas(worlds, options):
    """They hold the same, whatever rank comes first; and it costs them nothing but a moment."""
    began = time.monotonic()
    first, second = worlds(2, "parts").run(replicas, options, 2)
    assert first == second
    assert time.monotonic() - began < peers.PATIENCE_S


def some_ranks(options, training):
    """Some ranks train together, the others have something else to do: no rank waits for long."""
    peers.PATIENCE_S = 1.0
    group = dist.new_group(training)
    began = time.monotonic()
    result = None
    if dist.get_rank() in training:
        result = trained(DistributedDataParallel(Model(), process_group=group), options)
    peers.PATIENCE_S = 10.0
    seconds = time.monotonic() - began
    dist.barrier()
    return result, seconds


@pytest.mark.parametrize("options", TOGETHER)
@pytest.mark.parametrize("training", [[0], [1], [0, 1], [1, 3]])
def test_ranks_that_never_step(worlds, options, training):
    """A reward model, an evaluation, a sampler: torch.distributed is there for more than one purpose."""
    world = 4 if max(training) > 1 else 2
    results = [result for result in worlds(world, "parts").run(some_ranks, options, training) if result[0] is not None]
    assert len(results) == len(training)
    assert all(torques == results[0][0] and any(torques) for torques, _ in results)
    assert max(seconds for _, seconds in results) < SOON_S


def local_steps(options):
    """Each rank takes steps of its own, and the weights are averaged now and then."""
    model = Model()
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05, **options)
    for step in range(4):
        optimizer.zero_grad()
        rows = batch_of(step).chunk(2)[dist.get_rank()]
        loss_of(model(rows), target_of(rows)).backward()
        optimizer.step()
        for param in model.parameters() if step % 2 else ():
            dist.all_reduce(param.data)
            param.data /= 2


@pytest.mark.parametrize("options", TOGETHER)
def test_replicas_that_are_averaged_now_and_then(worlds, options):
    worlds(2, "parts").run(local_steps, options)


def backward_hooks():
    """An optimizer a parameter, stepped while the gradients are taken."""
    model = Model()
    _apply_optimizer_in_backward(hf_tam.AdaTAMW, model.parameters(), {"lr": 0.05})
    for step in range(STEPS):
        loss_of(model(batch_of(step)), target_of(batch_of(step))).backward()
    optimizers = [optimizer for param in model.parameters() for optimizer in param._in_backward_optimizers]
    return distance(numbers(model, optimizers), twin({}))


def hooks_of_sharded_parameters():
    """The same where the parameters are sharded: each optimizer sums over the ranks while the gradients are taken."""
    model = Model()
    for layer in model.layers.values():
        fully_shard(layer)
    fully_shard(model)
    optimizers = {param: hf_tam.AdaTAMW([param], lr=0.05) for param in model.parameters()}

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for number in range(STEPS):
        rows = batch_of(number).chunk(dist.get_world_size())[dist.get_rank()]
        loss_of(model(rows), target_of(rows)).backward()
    return distance(whole(numbers(model, optimizers.values())), twin({}))


def test_optimizers_in_backward_hooks_of_sharded_parameters(worlds):
    for result in worlds(2, "parts").run(hooks_of_sharded_parameters):
        assert result["tensors"] == 8
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result


def one_each(size):
    """An optimizer for each layer, or for each parameter, as layer-wise training has."""
    model = Model()
    parts = [[param] for param in model.parameters()]
    if size == "layer":
        parts = [[*layer.parameters()] for layer in model.layers.values()]
    optimizers = [hf_tam.AdaTAMW(part, lr=0.05) for part in parts]
    for step in range(STEPS):
        loss_of(model(batch_of(step)), target_of(batch_of(step))).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return distance(numbers(model, optimizers), twin({}))


@pytest.mark.parametrize(
    ("train", "arguments"), [(backward_hooks, ()), (one_each, ("layer",)), (one_each, ("tensor",))]
)
def test_several_optimizers_over_one_model(train, arguments):
    """Exact with an angle a tensor, and all that is taken together is over the parameters of each optimizer."""
    result = train(*arguments)
    assert result["tensors"] == 8
    assert result["torque"] <= TORQUE
    assert result["parameters"] <= PARAMETERS


def deepspeed_pipeline(options):
    """DeepSpeed's PipelineModule, two stages."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    layers = [nn.Sequential(layer, nn.Tanh()) for layer in Model().layers.values()]
    module = deepspeed.pipe.PipelineModule(layers, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.05, **options)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "train_batch_size": 8}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert engine.optimizer is optimizer
    halves = (half for step in range(STEPS) for half in batch_of(step).chunk(2))
    for _ in range(STEPS):
        engine.train_batch(data_iter=((half, target_of(half)) for half in halves))
    first = 2 * engine.stage_id
    stage = Model(first, first + 2)
    for mine, held in zip(stage.parameters(), module.parameters(), strict=True):
        mine.data, optimizer.state[mine] = held.data, optimizer.state.pop(held)
    return distance(numbers(stage, [optimizer]), twin(options))


def test_the_stages_of_deepspeed_with_an_angle_a_tensor(worlds):
    pytest.importorskip("deepspeed")
    for result in worlds(2, "parts").run(deepspeed_pipeline, {}):
        assert result["tensors"] == 4
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result


def replicas_that_round_differently(options):
    """What two kinds of accelerators may do to the last bits of a gradient."""
    model = DistributedDataParallel(Model())
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05, **options)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model(batch_of(step)), target_of(batch_of(step))).backward()
        for param in list(model.parameters())[:3]:
            param.grad.mul_(1 + dist.get_rank() * 1e-6)
        optimizer.step()


@pytest.mark.parametrize("options", TOGETHER)
def test_replicas_that_round_differently(worlds, options):
    worlds(2, "parts").run(replicas_that_round_differently, options)
