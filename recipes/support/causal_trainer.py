"""TRL's trainer for supervised fine-tuning, evaluated by the token."""

import copy
import math
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from trl import DPOTrainer, SFTTrainer

from recipes.support.whole_weights import WholeWeights

_REPORTED = ("loss", "perplexity", "token_accuracy")


class TokenWeightedTrainer(WholeWeights, SFTTrainer):
    """`SFTTrainer` whose evaluation weighs every token alike.

    TRL (1.16) and the Trainer report the mean of the losses of the batches, in which a token of a short record weighs
    more than one of a long record, and under several processes the copies that fill up the last batch count again.
    Here an evaluation takes the records one by one, unpacked, and leaves those copies out; `eval_loss` is the mean
    over all targets, `eval_perplexity` its exponential, and `eval_token_accuracy` the share of targets that were the
    likeliest.

    TRL also casts the adapter of a quantised model to bfloat16, in which small updates are lost; here it stays as it
    was given.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        """Take what `SFTTrainer` takes, but `compute_metrics`, which is this trainer's own."""
        given = {name: param.data for name, param in model.named_parameters() if param.requires_grad}
        arguments = options["args"]
        # The records are tokens by now, of which TRL would say that they are no chats.
        learns, arguments.assistant_only_loss = arguments.assistant_only_loss, False
        super().__init__(model=model, compute_metrics=summarize, **options)
        arguments.assistant_only_loss = learns
        if isinstance(model, PeftModel):
            for name, param in model.named_parameters():
                if name in given and param.dtype != given[name].dtype:
                    param.data = given[name].to(param.device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of padded records, also where those that are trained on are packed."""
        collator = self.data_collator
        try:
            if getattr(collator, "padding_free", False):
                self.data_collator = copy.copy(collator)
                self.data_collator.padding_free = False
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Return no loss of the batch, but for each record its loss in nats, its targets and how many were hit.

        Returns:
            None, fp32 of shape (batch, 2): the sum of losses and the number of hits, and int64 of shape (batch,).
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, fused_lm_head=True)
        losses = -outputs.log_probs.float().sum(dim=1)
        hits = outputs.is_top1.sum(dim=1).to(losses)
        return None, torch.stack([losses, hits], dim=1), outputs.label_mask.sum(dim=1)


class PreferenceTrainer(WholeWeights, DPOTrainer):
    """`DPOTrainer` whose whole models come back from a checkpoint."""


def summarize(prediction: EvalPrediction) -> dict[str, float]:
    """Return loss, perplexity and token accuracy over all targets; see `TokenWeightedTrainer.prediction_step`."""
    losses, hits = np.asarray(prediction.predictions, dtype=np.float64).T
    num_targets = max(int(np.sum(prediction.label_ids)), 1)
    loss = float(losses.sum() / num_targets)
    perplexity = math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": float(hits.sum() / num_targets)}


def first_and_last(trainer: Any, test: Any = None) -> dict[str, float]:
    """Return the evaluation of the result, which may have been made already, and the one before the first step.

    Args:
        trainer: after training.
        test: records that are measured now, if any.

    Returns:
        Metrics that begin with eval_ and test_, those before the first step end with _before.
    """
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    before = {f"{name}_before": value for row in rows[:1] if row["step"] == 0 for name, value in row.items()}
    went_back = trainer.args.load_best_model_at_end and trainer.state.best_global_step != trainer.state.global_step
    is_made = bool(rows) and rows[-1]["step"] == trainer.state.global_step and not went_back
    after: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        after = rows[-1] if is_made else trainer.evaluate()
    measured = {} if test is None else trainer.evaluate(test, metric_key_prefix="test")
    found = {**before, **after, **measured}
    return {
        name: value for name, value in found.items() if name.partition("_")[2].removesuffix("_before") in _REPORTED
    }
