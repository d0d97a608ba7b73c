"""What the scripts for text classification train and train on: an encoder and the splits, named or the demo's."""

from typing import Any

from peft import TaskType
from transformers import AutoModelForSequenceClassification, TrainingArguments

from recipes.support import classification, encoder_demo, heads, models, records, reporting
from recipes.support.arguments import DEMO, ClassifyDataArguments, ModelArguments
from recipes.support.errors import RecipeError
from recipes.support.splits import present


def load_splits(data: ClassifyDataArguments, arguments: TrainingArguments) -> dict[str, records.Records]:
    """Load and check the splits there are: train, and of validation and test those that were named.

    Raises:
        RecipeError: a file, a column or a record is bad, or there is nothing to evaluate on.
    """
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    if data.dataset_name == DEMO:
        announce_demo()
        train, validation, test = encoder_demo.demo_records()
        train, validation = records.select(train, validation, data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
        if validation is not None and not data.validation_file:
            validation, num_left_out = classification.without_new_labels(validation, train, data)
            if num_left_out:
                reporting.warn(f"{num_left_out} records held out have a label that no training record has: left out")
        test = records.load_file(data.test_file) if data.test_file else None
    return present(
        train, validation, test, lambda split: classification.check_records(split, data),
        evaluates=arguments.eval_strategy != "no", named="file",
    )  # fmt: skip


def load_encoder(model_arguments: ModelArguments, names: list[str]) -> tuple[Any, Any]:
    """Return the tokenizer and the model, with its adapter unless training is full.

    Raises:
        RecipeError: the model cannot be loaded, or an adapter was asked for on the untrained demo encoder.
    """
    if model_arguments.model_name_or_path == DEMO:
        if model_arguments.use_peft:
            raise RecipeError(
                "the demo encoder starts from random weights, which an adapter cannot mend: drop --use_peft."
            )
        train, _, _ = encoder_demo.demo_records()
        tokenizer = encoder_demo.build_tokenizer(list(train.dataset["text"]))
        return tokenizer, encoder_demo.build_encoder(tokenizer, names)
    tokenizer, config = models.load_tokenizer(model_arguments), models.load_config(model_arguments)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.pad_token_id = tokenizer.pad_token_id
    model = models.load_model(
        AutoModelForSequenceClassification, model_arguments, config=config, new_head=True, quantize=True
    )
    return tokenizer, heads.add_adapter(model, model_arguments, TaskType.SEQ_CLS)


def encode_splits(
    splits: dict[str, records.Records], data: ClassifyDataArguments, tokenizer: Any, names: list[str]
) -> dict[str, Any]:
    """Tokenise every split, and warn with a count where texts were cut."""
    encoded = {}
    for name, split in splits.items():
        encoded[name], num_cut = classification.encode_records(split, data, tokenizer, names)
        if num_cut:
            reporting.warn(
                f"{num_cut} of {len(encoded[name])} texts of {split.source} were cut to {data.max_length} tokens"
            )
    return encoded


def announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a tiny encoder learns what visitors of a library ask. For real work pass, for example,\n"
        "  --model_name_or_path MODEL --train_file train.csv --test_file test.csv --text_column A --label_column B"
    )
