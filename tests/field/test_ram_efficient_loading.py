"""FSDP2 where one process reads the weights: what the others start without is still trained, and as under DDP."""

import contextlib
import os
from importlib.metadata import version
from unittest import mock

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.distributed.tensor import DTensor

import hf_tam
from hf_tam.integrations.accelerate.prepare import FollowedParameters
from tests.integrations.test_trainer import training_arguments
from tests.sharding.framework_runs import WAYS, kind_of, strategy, unwrapped_twice

TORQUE = 1e-6
PARAMETERS = 1e-5
FAR = 1e-2
# Until 5.21 transformers gave these zeros, as it gave all that the first process reads.
ON_META = Version(version("transformers")) >= Version("5.23")
NEW = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]


class LabelledRows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, 64, (32, 12), generator=generator)
        self.labels = torch.randint(0, 5, (32,), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT without a pooler: those of a classifier are new, pooler and head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=64, max_position_embeddings=16, **sizes, **no_dropout)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def environment(way, ram_efficient):
    """What `accelerate launch` sets, by which transformers too knows that only the first process reads weights."""
    if not way.fsdp:
        return {}
    return {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": str(way.fsdp),
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": str(ram_efficient).lower(),
    }


def classifier(folder, lora):
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    torch.manual_seed(7)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=5)
    without = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lora:
        config = LoraConfig(r=3, target_modules=["query", "value"], modules_to_save=["classifier", "pooler"])
        model = get_peft_model(model, config)
    return model, without


def result_of(optimizer, model, way, without):
    inner = unwrapped_twice(optimizer) if hasattr(optimizer, "optimizer") else optimizer
    params = [param for group in inner.param_groups for param in group["params"]]
    names = {id(param): name.removeprefix("module.") for name, param in model.named_parameters()}
    result = {
        "without": without,
        "kind": kind_of(inner, way) if hasattr(inner, "torque_stats") else None,
        "names": [names.get(id(param)) for param in params],
        "parameters": {
            names[id(param)]: (param.full_tensor() if isinstance(param, DTensor) else param).tolist()
            for param in model.parameters()
            if param.requires_grad
        },
    }
    if hasattr(inner, "torque_stats"):
        stats = inner.torque_stats()
        result["torque"] = dict(zip(stats["names"], stats["torque"].tolist(), strict=True))
    return result


def trained(folder, output, name, ram_efficient, optim, lora):
    """The real Trainer."""
    from transformers import Trainer

    way = WAYS[name]
    with strategy(way), mock.patch.dict(os.environ, environment(way, ram_efficient)):
        options = {"optim": optim, "max_steps": 8, "per_device_train_batch_size": 2, "weight_decay": 0.1}
        if way.fsdp:
            layers = {"transformer_layer_cls_to_wrap": ["BertLayer"], "cpu_ram_efficient_loading": ram_efficient}
            options |= {"fsdp": True, "fsdp_config": {"version": way.fsdp, **layers}}
        arguments = training_arguments(output, **options)
        model, without = classifier(folder, lora)
        trainer = Trainer(model=model, args=arguments, train_dataset=LabelledRows())
        trainer.train()
        return result_of(trainer.optimizer.optimizer, trainer.model, way, without)


def looped(folder, name, ram_efficient, lora):
    """A loop as users write it, with two param groups."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    way = WAYS[name]
    with strategy(way), mock.patch.dict(os.environ, environment(way, ram_efficient)):
        plugins = {}
        if way.fsdp:
            plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=way.fsdp, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["BertLayer"], cpu_ram_efficient_loading=ram_efficient,
            )  # fmt: skip
        accelerator = Accelerator(cpu=not way.fsdp, **plugins)
        model, without = classifier(folder, lora)
        params = [param for param in model.parameters() if param.requires_grad]
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
        optimizer = hf_tam.AdaTAMW(groups, lr=1e-2, weight_decay=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        data = LabelledRows()
        for step in range(8):
            start = step * 4 + 2 * accelerator.process_index
            batch, labels = data.rows[start : start + 2], data.labels[start : start + 2]
            accelerator.backward(model(input_ids=batch, labels=labels).loss)
            optimizer.step()
            optimizer.zero_grad()
        return result_of(optimizer, model, way, without)


def distance(results, expected, key):
    """The largest difference between runs, of all but the keys' biases, which a softmax ignores: their gradients are
    rounding errors."""
    return max(
        (torch.tensor(value) - torch.tensor(twin[key][name])).abs().max().item()
        for result, twin in zip(results, expected, strict=True)
        for name, value in result[key].items()
        if "key.bias" not in name
    )


def assert_as_under_ddp(results, expected):
    assert [result["kind"] for result in results] == ["DTensor"] * 2
    assert [result["without"] for result in results] == [[], NEW if ON_META else []]
    for result in results:
        assert sorted(result["names"]) == sorted(result["parameters"])
        assert result["names"] == expected[0]["names"]
    assert max(abs(torque) for torque in expected[0]["torque"].values()) > 0.02
    assert distance(results, expected, "torque") < TORQUE
    assert distance(results, expected, "parameters") < PARAMETERS


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_new_head_in_the_trainer(worlds, encoder, tmp_path, lora):
    arguments = (encoder, str(tmp_path))
    expected = worlds(2).run(trained, *arguments, "ddp", False, "adatamw", lora)
    results = worlds(2).run(trained, *arguments, "fsdp2", True, "adatamw", lora)
    assert_as_under_ddp(results, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_new_head_in_a_loop(worlds, encoder, lora):
    expected = worlds(2).run(looped, encoder, "ddp", False, lora)
    assert_as_under_ddp(worlds(2).run(looped, encoder, "fsdp2", True, lora), expected)


def resumed(folder, output, resume):
    """Eight steps, or the last four of them, with a checkpoint in between."""
    from transformers import Trainer

    way = WAYS["fsdp2"]
    with strategy(way), mock.patch.dict(os.environ, environment(way, True)):
        layers = {"transformer_layer_cls_to_wrap": ["BertLayer"], "cpu_ram_efficient_loading": True}
        fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **layers}}
        options = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
        arguments = training_arguments(output, **options, **fsdp)
        model, without = classifier(folder, False)
        trainer = Trainer(model=model, args=arguments, train_dataset=LabelledRows())
        trainer.train(resume_from_checkpoint=os.path.join(output, "checkpoint-4") if resume else None)
        return result_of(trainer.optimizer.optimizer, trainer.model, way, without)


@pytest.mark.distributed
def test_a_run_with_a_new_head_is_resumed(worlds, encoder, tmp_path):
    """Control: AdamW cannot save, and waits: its ranks hold other parameters."""
    expected = worlds(2).run(resumed, encoder, str(tmp_path), False)
    results = worlds(2).run(resumed, encoder, str(tmp_path), True)
    assert [result["kind"] for result in results] == ["DTensor"] * 2
    assert [result["torque"] for result in results] == [result["torque"] for result in expected]
    assert [result["parameters"] for result in results] == [result["parameters"] for result in expected]


def on_meta(name, kind):
    """How many parameters of the model an optimizer holds that was built on a rank where all were on meta."""
    from accelerate import Accelerator, init_empty_weights
    from accelerate.utils import FullyShardedDataParallelPlugin

    way = WAYS[name]
    # FSDP1 broadcasts the weights on accelerators only; here the other rank starts with what was in memory
    plugin = {
        "fsdp1": {
            "use_orig_params": True,
            "sync_module_states": False,
            "param_init_fn": lambda module: module.to_empty(device="cpu", recurse=False),
        },
        "fsdp2": {"cpu_ram_efficient_loading": True},
    }[name]
    with strategy(way), mock.patch.dict(os.environ, environment(way, name == "fsdp2")):
        accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=way.fsdp, **plugin))
        with init_empty_weights() if accelerator.process_index else contextlib.nullcontext():
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = {"AdaTAMW": hf_tam.AdaTAMW, "AdamW": torch.optim.AdamW}[kind](model.parameters(), lr=0.1)
        model, prepared = accelerator.prepare(model, optimizer)
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if kind == "AdaTAMW":
            accelerator.backward(model(torch.ones(2, 4)).sum())
            prepared.step()
        return sum(id(param) in held for param in model.parameters()), kind_of(optimizer, way)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "kept"), [("fsdp1", 0), ("fsdp2", 1)])
def test_a_rank_that_starts_with_nothing(worlds, name, kept):
    """`init_empty_weights` on all ranks but the first. Control: AdamW's other ranks train no parameter, or one."""
    kind = WAYS[name].kind
    assert worlds(2).run(on_meta, name, "AdaTAMW") == [(4, kind)] * 2
    (first, _), (other, _) = worlds(2).run(on_meta, name, "AdamW")
    assert (first, other) == (4, kept)


@pytest.mark.distributed
@pytest.mark.skipif(not ON_META, reason="transformers puts zeros there")
def test_control_adamw_loses_parameters_there(worlds, encoder, tmp_path):
    """What accelerate 1.12 to 1.15 does to any optimizer; once it does not, nothing has to be put in place."""
    expected = worlds(2).run(trained, encoder, str(tmp_path), "ddp", False, "adamw_torch", False)
    results = worlds(2).run(trained, encoder, str(tmp_path), "fsdp2", True, "adamw_torch", False)
    assert [len(set(result["names"])) < len(result["names"]) for result in results] == [False, True]
    assert distance(results, expected, "parameters") > FAR


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def followed(model, optimizer, change):
    """What follows when `prepare` does to a model what `change` does."""
    following = FollowedParameters([optimizer], [model])
    change(model)
    following.put_in_place([model])


def renew(module):
    module.weight = nn.Parameter(module.weight.detach().clone())


class TestWhatBecameOfAParameter:
    def test_a_tied_one_that_stays_tied(self):
        model = Tied()
        optimizer = hf_tam.AdaTAMW(model.parameters())
        old = model.head.weight

        def change(model):
            renew(model.head)
            model.embedding.weight = model.head.weight

        followed(model, optimizer, change)
        (param,) = optimizer.param_groups[0]["params"]
        assert param is model.head.weight
        assert param is not old

    def test_a_tie_that_is_lost(self):
        model = Tied()
        with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight were one tensor .* are two after"):
            followed(model, hf_tam.AdaTAMW(model.parameters()), lambda model: renew(model.head))

    def test_two_that_became_one(self):
        model = Tied()
        renew(model.head)

        def change(model):
            model.head.weight = model.embedding.weight

        with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight were two tensors .* are one after"):
            followed(model, hf_tam.AdaTAMW(model.parameters()), change)

    def test_one_that_is_gone(self):
        model = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"left no parameter 0\.bias in the model"):
            followed(model, hf_tam.AdaTAMW(model.parameters()), lambda model: setattr(model[0], "bias", None))

    @pytest.mark.parametrize("replaced", [False, True])
    def test_one_that_has_states(self, replaced):
        """Control: AdamW would go on with the new one from nothing."""
        model = nn.Linear(2, 3)
        optimizer = hf_tam.AdaTAMW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        if not replaced:
            followed(model, optimizer, lambda model: None)
            return
        with pytest.raises(ValueError, match=r"had states .* \(3, 2\), .* prepare first, and load"):
            followed(model, optimizer, renew)

    def test_one_of_no_model_is_left_alone(self):
        model, latent = nn.Linear(2, 3), torch.zeros(4, requires_grad=True)
        optimizer = hf_tam.AdaTAMW([latent, *model.parameters()])
        followed(model, optimizer, renew)
        assert optimizer.param_groups[0]["params"][0] is latent
        assert optimizer.param_groups[0]["params"][1] is model.weight
