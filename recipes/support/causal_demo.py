"""The demo of `sft.py`: a small Llama and its tokenizer, built and pretrained on the spot from the embedded data."""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, set_seed

from recipes.data import animals
from recipes.support.records import Records

# The base model and the data are the same whatever --seed is: only the adaptation differs between seeds.
_BASE_SEED = 0
_PRETRAINING_STEPS = 250
_PRETRAINING_LEARNING_RATE = 3e-3
_PARAGRAPHS_PER_BATCH = 20
_WARMUP_SHARE = 0.1
_CONTEXT_LENGTH = 128
_VOCABULARY_SIZE = 1024
_END_OF_TEXT = "<|end|>"
_PADDING = "<|pad|>"


def demo_records() -> tuple[Records, Records]:
    """Return the embedded questions to train on, and those of other animals to evaluate on."""
    train, validation = animals.make_questions(seed=_BASE_SEED)
    return Records(Dataset.from_list(train), "demo[train]"), Records(Dataset.from_list(validation), "demo[validation]")


def build_base(
    folder: Path, *, architecture: str = "llama", num_steps: int = _PRETRAINING_STEPS, show_progress: bool = True
) -> None:
    """Build the tokenizer, pretrain the model, and save both to `folder`, which appears whole or not at all.

    Args:
        folder: Where they go; what was there is replaced.
        architecture: "llama" or "gpt2".
        num_steps: Of pretraining.
        show_progress: Whether a bar is drawn.
    """
    set_seed(_BASE_SEED)
    paragraphs, tokenizer = _read()
    config = _make_config(tokenizer) if architecture == "llama" else _make_gpt2_config(tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    # The matrices are too small to share among threads; with one the model is the same on any number of cores.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _pretrain(model, tokenizer, paragraphs, num_steps=num_steps, show_progress=show_progress)
    torch.set_num_threads(num_threads)
    partial = folder.with_name(f"{folder.name}.partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def describe_base() -> LlamaConfig:
    """Return the configuration of the model that `build_base` builds."""
    return _make_config(_read()[1])


def _read() -> tuple[list[str], PreTrainedTokenizerFast]:
    """Return the text for pretraining, and a tokenizer made from it and from the questions."""
    paragraphs = animals.make_statements(num_rounds=20, seed=_BASE_SEED)
    questions, _ = animals.make_questions(seed=_BASE_SEED)
    return paragraphs, _build_tokenizer(paragraphs + [record["prompt"] for record in questions])


def _build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer: every word of `texts` is one token, and any other text can be written."""
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=_VOCABULARY_SIZE,
            special_tokens=[_PADDING, _END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token=_END_OF_TEXT, pad_token=_PADDING, model_max_length=_CONTEXT_LENGTH
    )


def _make_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Describe a Llama of about 0.9M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _make_gpt2_config(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """Describe a GPT-2 of the same width and depth."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=_CONTEXT_LENGTH,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _pretrain(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    paragraphs: list[str],
    *,
    num_steps: int,
    show_progress: bool,
) -> None:
    """Train on the next token of `paragraphs`, in order and again from the start, with torch's own AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _PRETRAINING_LEARNING_RATE, total_steps=num_steps, pct_start=_WARMUP_SHARE, cycle_momentum=False
    )
    steps = trange(num_steps, desc="pretraining the demo model", disable=not show_progress)
    for step in steps:
        start = step * _PARAGRAPHS_PER_BATCH % len(paragraphs)
        texts = [text + _END_OF_TEXT for text in paragraphs[start : start + _PARAGRAPHS_PER_BATCH]]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            steps.set_postfix(loss=f"{loss.item():.2f}")
