"""The same angles however a tensor is cut: 20 steps of a sharded model against its unsharded twin."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sharding import comparing, strategies
from tests.sharding.trained import Model, batches_of_steps

# One worker runs them all, so that the worlds are started once.
pytestmark = pytest.mark.distributed

# Torques are sums in fp64, rounded to fp32 once a step; parameters differ by the order in which gradients are summed.
TORQUE = 1e-6
PARAMETERS = 1e-5
# They hold in bf16 too: the optimizer's parameters are fp32 there, and the twin is given the engine's gradients.
# Where parameters and moments are kept in bf16, the last fp32 bit of a torque may turn the rounding of an element. It
# then is 2^-8 off, and the angle of a tensor of a dozen elements a fraction of that; it happens about once in a run.
BF16_TORQUE = 1e-3
BF16_PARAMETERS = 2**-6  # a turned moment turns parameters in later steps
OPTIMIZERS = ("AdaTAMW", "AdaTAM", "TAM")
SCOPES = ("tensor", "model")


# With fewer ranks the same strategy is in the gate; three ranks cut unevenly, four are two dimensions.
SLOW = {
    "fsdp2-reshard-True-4", "fsdp2-reshard-False-3", "fsdp2-reshard-False-4", "fsdp1-full_shard-4",
    "fsdp1-shard_grad_op-4", "tp-4", "ddp-4",
}  # fmt: skip


def full_product(shardings):
    """All combinations; what `pairwise` leaves out is slow."""
    in_gate = {parameters.id for parameters in pairwise([each for each in shardings if each.name not in SLOW])}
    for sharding, optimizer_name, scope, lora in itertools.product(shardings, OPTIMIZERS, SCOPES, (False, True)):
        if is_possible(sharding, scope, lora):
            parameters = case(sharding, optimizer_name, scope, lora)
            marks = () if parameters.id in in_gate else pytest.mark.slow
            yield pytest.param(*parameters.values, id=parameters.id, marks=marks)


def pairwise(shardings):
    """AdaTAMW on the full model everywhere, and under every second one another optimizer, scope or LoRA, in turn."""
    rest = itertools.cycle(
        combination
        for combination in itertools.product(OPTIMIZERS, SCOPES, (False, True))
        if combination != ("AdaTAMW", "tensor", False)
    )
    for place, sharding in enumerate(shardings):
        yield case(sharding, "AdaTAMW", "tensor", False)
        possible = (combination for combination in rest if is_possible(sharding, *combination[1:]))
        for combination in itertools.islice(possible, place % 2):
            yield case(sharding, *combination)


def is_possible(sharding, scope, lora):
    # The tensor-parallel plan of this model does not touch its adapters.
    return scope in sharding.scopes and not (lora and "tp-" in sharding.name)


def case(sharding, optimizer_name, scope, lora):
    name = "-".join([sharding.name, optimizer_name, scope, *["lora"] * lora])
    return pytest.param(sharding, optimizer_name, scope, lora, id=name)


def check(worlds, sharding, optimizer_name, scope, lora, **kept):
    options = {"weight_decay": 0.1, "scope": scope, **kept}
    exact = sharding.stored == torch.float32 or kept
    torque, parameters = (TORQUE, PARAMETERS) if exact else (BF16_TORQUE, BF16_PARAMETERS)
    results = worlds(sharding.world).run(comparing.compare, sharding.name, optimizer_name, options, lora)
    for result in results:
        assert result["kinds"] == set(sharding.kinds)
        assert result["same_order"]
        assert result["torque"] <= torque, result
        assert result["parameters"] <= parameters, result
        assert result["grad_norm"] <= PARAMETERS, result
        assert max(abs(damping - 0.5) for damping in result["damping"]) > 0.01
        for calls in result["calls"]:
            assert [name for name, _ in calls] == ["all_reduce"] * result["reduces"]
            # In each a row more, in which a rank asks to compare lists.
            rows = len(result["damping"]) * max(1, sharding.axes) + result["reduces"]
            assert sum(size for _, size in calls) <= 32 * rows
    if results[0]["reduces"]:
        assert max(result["cut"]["torque"] for result in results) > max(100 * TORQUE, 3 * torque), results
        # In the few steps that are taken without it, TAM's small learning rate does not lead far.
        assert max(result["cut"]["parameters"] for result in results) > min(10 * PARAMETERS, parameters), results


@pytest.mark.parametrize(("sharding", "optimizer_name", "scope", "lora"), list(full_product(strategies.WRAPPERS)))
def test_sharded_is_unsharded(worlds, sharding, optimizer_name, scope, lora):
    check(worlds, sharding, optimizer_name, scope, lora)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_corrected_weights(worlds, optimizer_name):
    """bfloat16 weights with their corrections, and fp32 moments: nothing is left to a rounding that may turn."""
    sharding = strategies.SHARDINGS["fsdp2-bf16-2"]
    check(worlds, sharding, optimizer_name, "tensor", False, param_correction="bits16", state_bits=32)


def zero_in_gate():
    """`pairwise`; of the engines of four ranks, which take 7 s each, all but one are slow."""
    for parameters in pairwise(strategies.ZERO):
        sharding = parameters.values[0]
        is_slow = sharding.world == 4 and parameters.id != "zero3-subgroups-4-AdaTAMW-tensor"
        yield pytest.param(*parameters.values, id=parameters.id, marks=[pytest.mark.slow] * is_slow)


@pytest.mark.parametrize(("sharding", "optimizer_name", "scope", "lora"), list(zero_in_gate()))
def test_zero_is_unsharded(worlds, sharding, optimizer_name, scope, lora):
    pytest.importorskip("deepspeed")
    check(worlds, sharding, optimizer_name, scope, lora)


def different_parameters():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    width = 4 + torch.distributed.get_rank()
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, width))
    local = torch.distributed.tensor.DTensor.from_local
    from torch.distributed.tensor import Shard

    parameters = [torch.nn.Parameter(local(p.detach(), mesh, [Shard(0)], run_check=False)) for p in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    import hf_tam

    try:
        hf_tam.AdaTAMW(parameters).step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree_get_the_first_difference(worlds):
    for message in worlds(2).run(different_parameters):
        assert "number 2 is parameter 2 (8, 4)" in message
        assert "(10, 4)" in message


def dcp_state(name):
    """Bits of a model trained after its state_dict was asked for, and of one that was left alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    trained = []
    for asked in (True, False):
        trained_model = strategies.SHARDINGS[name].start(Model(False), "AdaTAMW", {}, 1)
        model, optimizer = trained_model.module, trained_model.optimizer
        if asked:
            get_optimizer_state_dict(model, optimizer)
        for step in range(4):
            model(torch.ones(2, 5), step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([parameter.full_tensor() for parameter in model.parameters()])
    return all(torch.equal(left, right) for left, right in zip(*trained, strict=True))


@pytest.mark.parametrize("name", ["fsdp2-reshard-True-2", "hsdp-4"])
def test_asking_for_a_state_dict_changes_nothing(worlds, name):
    world = strategies.SHARDINGS[name].world
    assert worlds(world).run(dcp_state, name) == [True] * world


def steps_without_gradients(name):
    """A step that some ranks, or all, have no gradient for; every rank must come back from it."""
    trained = strategies.SHARDINGS[name].start(Model(False), "AdaTAMW", {}, 1)
    model, optimizer = trained.module, trained.optimizer
    model(torch.ones(2, 5), 1).square().sum().backward()
    optimizer.step()
    counts = [state["step"].item() for state in optimizer.state.values()]
    optimizer.zero_grad()
    optimizer.step()
    return counts == [state["step"].item() for state in optimizer.state.values()]


@pytest.mark.parametrize("name", ["fsdp1-full_shard-2", "fsdp1-full_shard-4", "fsdp2-reshard-True-2"])
def test_a_step_without_any_gradient(worlds, name):
    world = strategies.SHARDINGS[name].world
    assert worlds(world).run(steps_without_gradients, name) == [True] * world


def nan_on_one_rank(name):
    """What each rank did with a NaN that only rank 1 has seen."""
    trained = strategies.SHARDINGS[name].start(Model(False), "AdaTAMW", {}, 1)
    model, optimizer = trained.module, trained.optimizer
    model(torch.ones(2, 5), 1).square().sum().backward()
    if torch.distributed.get_rank() == 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                if local.numel():
                    local.view(-1)[0] = float("nan")
                    break
    optimizer.step()
    steps = [optimizer.state[p]["step"].item() if p in optimizer.state else 0.0 for p in model.parameters()]
    return optimizer.skipped, steps


@pytest.mark.filterwarnings("ignore:.*were skipped")
@pytest.mark.parametrize("name", ["fsdp1-full_shard-2", "fsdp2-reshard-True-2", "hsdp-4"])
def test_nan_on_one_rank_is_one_decision(worlds, name):
    world = strategies.SHARDINGS[name].world
    decisions = worlds(world).run(nan_on_one_rank, name)
    sharing = decisions if not name.startswith("hsdp") else decisions[:2]  # replicas are not summed
    assert sharing[0][0] == 1
    assert all(decision == sharing[0] for decision in sharing)


class Dispatched(TorchDispatchMode):
    """Notes every operator that lets the host read a number, and the collectives."""

    def __init__(self):
        super().__init__()
        self.reads, self.collectives = [], []

    def begin(self):
        self.__enter__()  # a hook must return nothing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "is_nonzero", "aten.nonzero", "aten.equal")):
            self.reads.append(name)
        if "c10d" in name:
            self.collectives.append(name)
        return func(*args, **(kwargs or {}))


def host_reads(name):
    """What a later step of a capturable optimizer lets the host read."""
    sharding = strategies.SHARDINGS[name]
    trained = sharding.start(Model(False), "AdaTAMW", {"capturable": True}, sharding.num_groups)
    dispatched = Dispatched()
    for step, batches in enumerate(batches_of_steps()[:3]):
        if step == 2:
            trained.optimizer.register_step_pre_hook(lambda *_: dispatched.begin())
            trained.optimizer.register_step_post_hook(lambda *_: dispatched.__exit__(None, None, None))
        trained.step(batches, step, use=0)
    return dispatched.reads, dispatched.collectives


@pytest.mark.parametrize("name", ["fsdp1-full_shard-2", "fsdp2-reshard-True-2", "tp-2", "zero2-2", "zero3-2"])
def test_no_number_of_a_sharded_step_is_read_by_the_host(worlds, name):
    """As on an accelerator, where reading one would wait for the device; the CPU is made to behave so."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    for reads, collectives in worlds(2).run(host_reads, name):
        assert reads == []
        assert len(collectives) == 1
