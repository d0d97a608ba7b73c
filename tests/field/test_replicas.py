"""Where `Accelerator.prepare` brings the ranks together: parameters that each of them keeps whole must be the same."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import hf_tam
from hf_tam.sharding.replicas import compare_replicas, is_plain
from tests.sharding.framework_runs import WAYS, strategy

pytestmark = pytest.mark.distributed


def rank():
    return torch.distributed.get_rank()


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def outcome(function, *args, **kwargs):
    """What a rank was told, and whether it can still talk to the others."""
    try:
        function(*args, **kwargs)
        told = None
    except ValueError as error:
        told = str(error)
    count = torch.ones(())
    torch.distributed.all_reduce(count)
    assert count == torch.distributed.get_world_size()
    return told


def compared(case):
    """`compare_replicas` with tensors of this rank."""
    named = {name: make(rank()) for name, make in CASES[case].items()}
    return compare_replicas(named)


CASES = {
    "equal": {"a": lambda rank: torch.arange(60.0).reshape(5, 12), "b": lambda rank: torch.zeros(0, 3)},
    "equal though not numbers": {"a": lambda rank: torch.full((4,), float("nan"))},
    "equal in other strides": {"a": lambda rank: (torch.ones(6, 4) * torch.arange(4)).t() if rank else
                               (torch.ones(6, 4) * torch.arange(4)).t().contiguous()},
    "bf16, complex, 0-d": {"a": lambda rank: torch.arange(9, dtype=torch.bfloat16),
                           "b": lambda rank: torch.complex(torch.ones(3), torch.ones(3)),
                           "c": lambda rank: torch.tensor(2.0)},
    "one rank has one more": {"a": lambda rank: torch.ones(2)},
    "values": {"a": lambda rank: torch.ones(2), "b": lambda rank: torch.arange(300.0) + rank},
    "the sign of a zero": {"a": lambda rank: torch.zeros(3) * (-1 if rank else 1)},
    "0-d values": {"c": lambda rank: torch.tensor(float(rank))},
    "shapes": {"a": lambda rank: torch.ones(2, 3 + rank)},
    "dtypes": {"a": lambda rank: torch.zeros(2, dtype=torch.float32 if rank else torch.float64)},
}  # fmt: skip
DIFFERENT = {
    "values": {"b": "other values, of shape (300,) torch.float32, on ranks 0 and 1"},
    "the sign of a zero": {"a": "other values, of shape (3,) torch.float32, on ranks 0 and 1"},
    "0-d values": {"c": "other values, of shape () torch.float32, on ranks 0 and 1"},
    "shapes": {"a": "(2, 3) torch.float32 and (2, 4) torch.float32 on ranks 0 and 1"},
    "dtypes": {"a": "(2,) torch.float64 and (2,) torch.float32 on ranks 0 and 1"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(worlds, case):
    assert worlds(2).run(compared, case) == [DIFFERENT.get(case, {})] * 2


def compared_with_an_extra():
    return compare_replicas({"a": torch.ones(2)} | ({"b": torch.ones(3)} if rank() == 1 else {}))


def test_what_one_rank_alone_has_is_not_compared(worlds):
    assert worlds(2).run(compared_with_an_extra) == [{}, {}]


def with_a_problem():
    return outcome(compare_replicas, {"a": torch.ones(2)}, problem="it is lost" if rank() == 1 else None)


def test_a_problem_of_one_rank_is_told_to_all(worlds):
    assert worlds(2).run(with_a_problem) == ["rank 1: it is lost", "it is lost"]


def test_what_counts_as_plain():
    assert is_plain(nn.Parameter(torch.ones(2)))
    assert not is_plain(nn.Parameter(torch.ones(2, device="meta")))
    for mark in ("_fsdp_flattened", "_is_flat_param", "ds_tensor"):
        marked = nn.Parameter(torch.ones(2))
        setattr(marked, mark, True)
        assert not is_plain(marked)


def accelerator_of(name, **plugin):
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    way = WAYS[name]
    if not way.fsdp:
        return Accelerator(cpu=True)
    return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=way.fsdp, **plugin))


def under_ddp(case):
    with strategy(WAYS["ddp"]):
        return outcome(LEGITIMATE[case], accelerator_of("ddp"))


def other_weights_on_each_rank(accelerator):
    """DDP broadcasts those of the first."""
    model = small_model(seed=rank())
    accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters()))


def buffers_of_each_rank(accelerator):
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(rank())
    accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters()))


def adapters(accelerator):
    from peft import LoraConfig, get_peft_model

    from tests.integrations.untouched import tiny_llama

    torch.manual_seed(rank())
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    accelerator.prepare(model, hf_tam.AdaTAMW([param for param in model.parameters() if param.requires_grad]))


def tied_weights(accelerator):
    model = small_model()
    model[1] = nn.Linear(4, 3)
    model[1].weight = model[0].weight
    accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters()))


def two_models(accelerator):
    """With parameters of the same names."""
    first, second = small_model(seed=rank()), nn.Sequential(nn.Linear(2, 2))
    accelerator.prepare(first, second, hf_tam.AdaTAMW(first.parameters()), hf_tam.TAM(second.parameters()))


def models_before_optimizers(accelerator):
    model = accelerator.prepare(small_model(seed=rank()))
    accelerator.prepare(hf_tam.AdaTAMW(model.parameters()))


def one_rank_with_an_optimizer_more(accelerator):
    model, latent = small_model(), torch.full((3,), float(rank()), requires_grad=True)
    more = [hf_tam.TAM([latent])] if rank() == 0 else []
    accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters()), *more)


def ours_on_one_rank_alone(accelerator):
    """Nobody would train like that, and nobody may wait for ever."""
    model = small_model()
    kind = hf_tam.AdaTAMW if rank() == 0 else torch.optim.AdamW
    accelerator.prepare(model, kind(model.parameters()))


def an_optimizer_prepared_by_one_rank_alone(accelerator):
    if rank() == 0:
        accelerator.prepare(hf_tam.AdaTAMW([torch.zeros(2, requires_grad=True)]))


def local_steps(accelerator):
    from accelerate.local_sgd import LocalSGD

    model = small_model(seed=rank())
    model, optimizer = accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters(), lr=0.1))
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local_sgd:
        for _ in range(4):
            accelerator.backward(model(torch.full((2, 4), 1.0 + rank())).sum())
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()


def another_optimizer_beside_parts(accelerator):
    model = with_parts()
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


LEGITIMATE = {
    function.__name__: function
    for function in (
        other_weights_on_each_rank,
        buffers_of_each_rank,
        adapters,
        tied_weights,
        two_models,
        models_before_optimizers,
        one_rank_with_an_optimizer_more,
        ours_on_one_rank_alone,
        an_optimizer_prepared_by_one_rank_alone,
        local_steps,
        another_optimizer_beside_parts,
    )
}


@pytest.mark.parametrize("case", LEGITIMATE)
def test_under_ddp_nobody_complains(worlds, case):
    def unexpected(told):
        return [message for message in told if message is not None]

    assert unexpected(worlds(2).run(under_ddp, case)) == []


def with_parts():
    """A model whose second weight DDP is told to leave alone, as hand-written tensor or expert parallelism does."""
    model = small_model()
    model[1].weight = nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(rank())))
    model._ddp_params_and_buffers_to_ignore = ["1.weight"]
    return model


def parts_under_ddp(together):
    with strategy(WAYS["ddp"]):
        accelerator = accelerator_of("ddp")
        model = with_parts()
        optimizer = hf_tam.AdaTAMW(model.parameters())
        if together:
            return outcome(accelerator.prepare, model, optimizer)
        accelerator.prepare(model)
        return outcome(accelerator.prepare, optimizer)


@pytest.mark.parametrize("together", [True, False])
def test_parts_that_ddp_leaves_alone_are_refused(worlds, together):
    """Control: AdamW takes them, above."""
    for told in worlds(2).run(parts_under_ddp, together):
        assert told.startswith(
            "1.weight of Sequential is not marked as a part of a tensor, but is other values, of shape (2, 3) torch.fl"
        )


def ignored_by_fsdp2(seed_of_rank):
    with strategy(WAYS["fsdp2"]):
        model = small_model()
        torch.manual_seed(seed_of_rank[rank()])
        model.append(nn.Linear(2, 2))
        accelerator = accelerator_of("fsdp2", ignored_modules=[model[2]], cpu_ram_efficient_loading=False)
        told = outcome(accelerator.prepare, model, hf_tam.AdaTAMW(model.parameters()))
        return told, isinstance(model[0].weight, DTensor), isinstance(model[2].weight, DTensor)


def test_what_fsdp2_is_told_to_ignore(worlds):
    assert worlds(2).run(ignored_by_fsdp2, [5, 5]) == [(None, True, False)] * 2
    for told, *kinds in worlds(2).run(ignored_by_fsdp2, [5, 6]):
        assert kinds == [True, False]
        assert told.startswith("2.weight of FSDPSequential is not marked as a part of a tensor, but is other values")


def with_states_on_one_rank():
    with strategy(WAYS["fsdp2"]):
        model = small_model()
        optimizer = hf_tam.AdaTAMW(model.parameters())
        if rank() == 1:
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        accelerator = accelerator_of("fsdp2", cpu_ram_efficient_loading=False)
        return outcome(accelerator.prepare, model, optimizer)


def test_states_that_one_rank_alone_would_lose(worlds):
    first, second = worlds(2).run(with_states_on_one_rank)
    assert second.startswith("AdaTAMW had states before Accelerator.prepare (of a parameter of shape (3, 4)")
    assert first == f"rank 1: {second}"
