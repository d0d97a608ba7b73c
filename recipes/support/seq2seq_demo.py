"""The demo of `seq2seq.py`: a tiny T5 and its tokenizer, built on the spot from the embedded data."""

from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from recipes.data import dates
from recipes.support.records import Records

_DATA_SEED = 0
_NUM_TRAIN, _NUM_VALIDATION, _NUM_TEST = 3000, 200, 400
_PADDING, _END = "<pad>", "</s>"
_VOCABULARY_SIZE = 512


def demo_records() -> tuple[Records, Records, Records]:
    """Return the embedded training, validation and test records; no date is in two of them."""
    rows = dates.make_records(_NUM_TRAIN + _NUM_VALIDATION + _NUM_TEST, seed=_DATA_SEED)
    bounds = (0, _NUM_TRAIN, _NUM_TRAIN + _NUM_VALIDATION, len(rows))
    train, validation, test = (
        Records(Dataset.from_list(rows[start:end]), f"demo[{name}]")
        for name, start, end in zip(("train", "validation", "test"), bounds, bounds[1:], strict=False)
    )
    return train, validation, test


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with T5's special tokens; every digit is a token of its own."""
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=_VOCABULARY_SIZE,
            special_tokens=[_PADDING, _END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    pieces.post_processor = TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token=_END, pad_token=_PADDING, unk_token=_PADDING, model_max_length=128
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Build a T5 of about 0.3M parameters with random weights, drawn from torch's generator."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
