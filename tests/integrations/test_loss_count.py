"""A model that drops num_items_in_batch is named once, with the factor; one that uses it never is."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import hf_tam  # noqa: F401
from hf_tam.integrations.transformers import loss_count

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "pad_token_id": 0}
DISTILBERT = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
T5 |= {"decoder_start_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 32}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0}
IMAGES = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
IMAGES |= {"num_attention_heads": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
REGRESSION = {"problem_type": "regression", "num_labels": 1}
CAUSAL, SEQUENCES, TOKENS = AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
PICTURES, SEQ2SEQ, MASKED = AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoModelForMaskedLM
CASES = [
    (CAUSAL, "llama", SIZES), (CAUSAL, "qwen3", SIZES), (CAUSAL, "mistral", SIZES), (CAUSAL, "gemma2", SIZES),
    (CAUSAL, "gpt2", GPT2), (CAUSAL, "opt", {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16}),
    (CAUSAL, "bart", BART),
    (SEQUENCES, "bert", SIZES), (SEQUENCES, "roberta", SIZES), (SEQUENCES, "distilbert", DISTILBERT),
    (SEQUENCES, "modernbert", SIZES), (SEQUENCES, "llama", SIZES), (SEQUENCES, "gpt2", GPT2),
    (SEQUENCES, "electra", SIZES), (SEQUENCES, "bert", {**SIZES, **REGRESSION}),
    (TOKENS, "bert", SIZES), (MASKED, "bert", SIZES), (MASKED, "modernbert", SIZES),
    (PICTURES, "vit", IMAGES), (PICTURES, "dinov2", IMAGES), (PICTURES, "resnet", RESNET),
    (PICTURES, "vit", {**IMAGES, **REGRESSION}), (PICTURES, "convnext", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    (PICTURES, "mobilenet_v2", {"image_size": 32, "depth_multiplier": 0.35}),
    (SEQ2SEQ, "t5", T5), (SEQ2SEQ, "bart", BART), (SEQ2SEQ, "t5gemma", {}),
]  # fmt: skip


def build(auto_class, model_type, sizes):
    if model_type == "t5gemma":
        sizes = {"encoder": {**SIZES, "head_dim": 8}, "decoder": {**SIZES, "head_dim": 8}, "vocab_size": 32}
    torch.manual_seed(0)
    return auto_class.from_config(AutoConfig.for_model(model_type, **sizes)).eval()


def inputs_of(auto_class, model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 32, (2, 6), generator=generator)
    if auto_class in (SEQUENCES, PICTURES):
        regression = model.config.problem_type == "regression"
        labels = torch.tensor([0.5, 1.5]) if regression else torch.tensor([0, 1])
    else:
        labels = ids % model.config.num_labels if auto_class is TOKENS else ids
    if auto_class is PICTURES:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": labels}
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("auto_class", "model_type", "sizes"), CASES)
def test_what_is_said_is_true(auto_class, model_type, sizes):
    model = build(auto_class, model_type, sizes)
    inputs = inputs_of(auto_class, model)
    with torch.no_grad():
        losses = [model(**inputs, num_items_in_batch=torch.tensor(count)).loss.item() for count in (1, 3)]
    assert loss_count.drops_count(model) == (losses[0] == losses[1])


def trainer_of(model, tmp_path, cls=Trainer, **options):
    rows = [{"input_ids": [3, 4, 5], "labels": 1}] * 4
    given = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 1, **options}
    settings = {"optim": "adatamw", "report_to": "none", "use_cpu": True, "disable_tqdm": True, **settings}
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", **settings)
    return cls(model=model, args=arguments, train_dataset=Dataset.from_list(rows), **given)


@pytest.fixture(autouse=True)
def _said_to_nobody_yet():
    loss_count._warn.cache_clear()


def bert():
    return build(SEQUENCES, "bert", SIZES)


def test_it_is_said_once_and_the_remedy_works(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "hf_tam")
    first, second = trainer_of(bert(), tmp_path), trainer_of(bert(), tmp_path)
    first.train()
    second.model_accepts_loss_kwargs = False
    second.train()
    trainer_of(bert(), tmp_path).train()
    (record,) = [record for record in caplog.records if "num_items_in_batch" in record.message]
    assert record.message.startswith("BertForSequenceClassification drops num_items_in_batch")
    assert "4 times too large" in record.message
    losses = [next(row["train_loss"] for row in trainer.state.log_history if "train_loss" in row)
              for trainer in (first, second)]  # fmt: skip
    assert losses[0] == pytest.approx(4 * losses[1], rel=1e-4)


def test_an_adapter_is_looked_through(tmp_path):
    model = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert loss_count.too_large_by(trainer_of(model, tmp_path)) == 4


class OwnLoss(Trainer):
    def compute_loss(self, *arguments, **options):
        return super().compute_loss(*arguments, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 1},
        {"optim": "adamw_torch"},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs["logits"].sum()},
        {"label_smoothing_factor": 0.1},
        {"cls": OwnLoss},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_is_said_where_nothing_is_wrong(options, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "hf_tam")
    trainer_of(bert(), tmp_path, **options).train()
    assert "num_items_in_batch" not in caplog.text
