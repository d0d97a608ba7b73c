"""What a causal language model is measured by: the loss of each token, perplexity and token accuracy."""

from typing import Any

import torch
from transformers import EvalPrediction

from recipes.support.completion import IGNORED
from recipes.support.metrics import load_metrics


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of every token but the first, in nats; 0 where the label is no target.

    Args:
        logits: shape (batch, time, vocabulary), of any float type.
        labels: shape (batch, time), int64.

    Returns:
        Shape (batch, time - 1), fp32.
    """
    predicted, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(predicted, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)


def reduce_logits(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits (batch, time, vocabulary) to what the metrics need, so that an evaluation fits into memory.

    Returns:
        For each token but the first: the likeliest id, int64, and its label's loss as `token_losses` gives it; both
        (batch, time - 1).
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, :-1].argmax(dim=-1), token_losses(logits, labels)


def make_compute_metrics() -> Any:
    """Return the function that gives the Trainer perplexity and token accuracy."""
    perplexity, token_accuracy = load_metrics("perplexity", "token_accuracy")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        likeliest, losses = prediction.predictions
        targets = prediction.label_ids[:, 1:]
        is_target = targets != IGNORED
        return {
            **perplexity.compute(predictions=losses[is_target], references=targets[is_target]),
            **token_accuracy.compute(predictions=likeliest[is_target], references=targets[is_target]),
        }

    return compute_metrics
