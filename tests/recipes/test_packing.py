"""Packed records: the loss of each is what it is alone, and none attends to another."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from recipes.support import packing
from recipes.support.errors import RecipeError
from tests.recipes.test_sft_options import QUICK, error_of, results_of

IGNORED = -100
SIZES = [5, 1, 17, 9, 30, 2, 12, 30, 7]


def make_records(vocabulary_size):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary_size, (size,), generator=generator).tolist() for size in SIZES]
    # The loss is on the whole of some, on the end of others.
    return [
        {"input_ids": ids, "labels": [IGNORED, *(ids[1:] if index % 2 else [IGNORED, *ids[2:]][: len(ids) - 1])]}
        for index, ids in enumerate(rows)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_records_alone(attention, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention)
    model.config.use_cache = False  # as the Trainer sets it
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    records = make_records(model.config.vocab_size)
    packed = pack_dataset(Dataset.from_list(records), 40)
    assert len(packed) < len(records) / 2
    batches = {
        "alone": DataCollatorForLanguageModeling(tokenizer.pad_token_id)(records),
        "packed": DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)(list(packed)),
    }
    losses, gradients = {}, {}
    for name, batch in batches.items():
        labels = batch["labels"]
        model.zero_grad()
        logits = model(**{key: batch[key] for key in batch if key not in ("labels", "seq_idx")}).logits[:, :-1]
        targets = labels[:, 1:] != IGNORED
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        (each.sum() / targets.sum()).backward()
        losses[name] = each[targets].sort().values.detach()
        gradients[name] = [param.grad.clone() for param in model.parameters()]
    torch.testing.assert_close(losses["packed"], losses["alone"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients["packed"], gradients["alone"], rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_the_trainer_steps_on_the_same_loss(sft, tmp_path):
    """One batch of all records, packed or not: the same first step, and the same perplexity after it."""
    measured = {}
    for name, flags in {"alone": [], "packed": ["--packing", "--max_length=64"]}.items():
        folder = tmp_path / name
        sizes = ["--per_device_train_batch_size=24", "--per_device_eval_batch_size=6", f"--output_dir={folder}"]
        status, _, error = sft(*QUICK, *sizes, *flags, "--warmup_steps=0")
        assert status == 0, error
        measured[name] = results_of(folder)
    for metric in ("eval_loss_before", "eval_loss", "eval_perplexity", "eval_token_accuracy", "train_loss"):
        assert measured["packed"][metric] == pytest.approx(measured["alone"][metric], rel=1e-4), metric
    assert measured["packed"]["training_records"] == 24


class Leaking(torch.nn.Module):
    """A model whose states run on from one record into the next, as those of a recurrence do."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, position_ids):
        return self.model(input_ids=input_ids)


class Positionless(Leaking):
    def forward(self, input_ids):
        return self.model(input_ids=input_ids)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [(Leaking, "let.? the records of a row see each other"), (Positionless, "takes no position_ids")],
)
def test_model_that_cannot_keep_records_apart_is_refused(wrapper, message, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.use_cache = False
    packing.require_separation(model, model.config)
    with pytest.raises(RecipeError, match=message):
        packing.require_separation(wrapper(model), model.config)


def test_cache_would_join_records_and_is_refused(tiny_model):
    """With a cache transformers 5.23 does not look at the positions; the Trainer switches it off."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.use_cache = True
    with pytest.raises(RecipeError, match="see each other"):
        packing.require_separation(model, model.config)


def test_refusal_is_one_line(sft, monkeypatch):
    monkeypatch.setattr(packing, "_influence_of_the_neighbour", lambda *args: 0.5)
    status, _, error = sft(*QUICK, "--packing")
    assert status == 1
    assert "changes a record's logits by 0.5 of the largest" in error_of(error)
