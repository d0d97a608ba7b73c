"""The trainer of sentence-transformers takes `optim="adatamw"` as it is."""

import pytest
import torch
from datasets import Dataset

import hf_tam
from recipes.data import help_desk
from recipes.support.encoder_demo import build_encoder, build_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402


def make_encoder(folder):
    """A tiny BERT with mean pooling, as a SentenceTransformer."""
    rows = help_desk.make_records(help_desk.TRAIN, per_intent=8, seed=0)
    tokenizer = build_tokenizer([row["text"] for row in rows])
    build_encoder(tokenizer, ["unused", "labels"]).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu"), rows


@pytest.mark.long
def test_trainer_takes_the_name(tmp_path):
    """Questions of one intent come closer to each other than to those of others, beyond what they were."""
    torch.manual_seed(0)
    model, rows = make_encoder(tmp_path / "encoder")
    by_intent = {}
    for row in rows:
        by_intent.setdefault(row["label"], []).append(row["text"])
    # A batch holds one pair of each intent: every other pair in it is a true negative.
    pairs = [{"anchor": texts[0], "positive": texts[1]} for texts in by_intent.values()]
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            optim="adatamw",
            optim_args="gamma=0.8",
            learning_rate=3e-3,
            num_train_epochs=40,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )
    before = separation(model, by_intent)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is hf_tam.AdaTAMW
    assert optimizer.param_groups[0]["gamma"] == 0.8
    assert all(state["torque"] != 0 for state in optimizer.state.values())
    assert separation(model, by_intent) > before + 0.2


def separation(model, by_intent):
    """Mean cosine between two questions of an intent, less that between questions of different intents."""
    firsts, others = (model.encode([texts[index] for texts in by_intent.values()]) for index in (0, 1))
    cosines = torch.nn.functional.cosine_similarity(torch.tensor(firsts)[:, None], torch.tensor(others)[None], dim=-1)
    same = cosines.diagonal().mean()
    different = (cosines.sum() - cosines.diagonal().sum()) / (cosines.numel() - len(cosines))
    return float(same - different)
