"""The demo of `classify.py`: a tiny BERT and its tokenizer, built on the spot from the embedded data."""

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from recipes.data import help_desk
from recipes.support.records import Records

_DATA_SEED = 0
_TRAIN_PER_INTENT, _VALIDATION_PER_INTENT, _TEST_PER_INTENT = 60, 10, 25
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def demo_records() -> tuple[Records, Records, Records]:
    """Return the embedded training, validation and test records; only the test has wordings that training has not."""
    seen = help_desk.make_records(
        help_desk.TRAIN, per_intent=_TRAIN_PER_INTENT + _VALIDATION_PER_INTENT, seed=_DATA_SEED
    )
    unseen = help_desk.make_records(help_desk.TEST, per_intent=_TEST_PER_INTENT, seed=_DATA_SEED)
    num_train = _TRAIN_PER_INTENT * len(help_desk.TRAIN)
    splits = {"train": seen[:num_train], "validation": seen[num_train:], "test": unseen}
    train, validation, test = (Records(Dataset.from_list(rows), f"demo[{name}]") for name, rows in splits.items())
    return train, validation, test


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Build a lower-casing word tokenizer from `texts`, with BERT's special tokens."""
    words = Tokenizer(WordLevel(unk_token="[UNK]"))
    words.normalizer = BertNormalizer(lowercase=True)
    words.pre_tokenizer = BertPreTokenizer()
    words.train_from_iterator(texts, WordLevelTrainer(special_tokens=list(_SPECIAL_TOKENS)))
    ends = [(token, words.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def build_encoder(tokenizer: PreTrainedTokenizerFast, names: list[str]) -> BertForSequenceClassification:
    """Build a BERT of about 0.15M parameters with random weights, drawn from torch's generator."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return BertForSequenceClassification(config)
