"""A loss that is the same however records are cut into batches: over the targets of a step, or of an evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput

from recipes.support.encoding import IGNORED
from recipes.support.whole_weights import WholeWeights


class TargetTrainer(WholeWeights):
    """A Trainer that computes the cross-entropy itself.

    Many heads of transformers (5.23: BERT, ResNet, T5) take num_items_in_batch and do not divide by it, so that loss
    and gradient grow with the number of batches and processes of a step; and its eval_loss is a mean of batch means,
    in which records count again that fill up the last batch of several processes.

    https://github.com/huggingface/transformers/issues/47688
    """

    def __init__(
        self, *args: Any, narrow: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Take what a Trainer takes.

        Args:
            args: the Trainer's.
            narrow: given logits and labels, returns the logits with those at -inf that are not to choose from.
            kwargs: the Trainer's.
        """
        super().__init__(*args, compute_loss_func=self._mean_loss, **kwargs)
        self._narrow = narrow
        self._evaluated: list[torch.Tensor] = []

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does, each record once, and put the loss over all targets in place of its own."""
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer's keeps what fills up a batch
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:
            total, count = torch.cat(self._evaluated).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def _mean_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the loss over the targets of the step; in an evaluation, note what each record adds to it.

        Communication: in an evaluation, one gather of two numbers a record.
        """
        logits, is_target = outputs["logits"].float(), labels.ne(IGNORED)
        if self._narrow is not None:
            logits = self._narrow(logits, labels)
        losses = torch.nn.functional.cross_entropy(
            logits.movedim(-1, 1), labels, reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        if not torch.is_grad_enabled():
            of_records = torch.stack([part.reshape(len(labels), -1).sum(1) for part in (losses, is_target)], dim=1)
            self._evaluated.append(self.accelerator.gather_for_metrics(of_records).double().cpu())
        return losses.sum() / (is_target.sum() if num_items_in_batch is None else num_items_in_batch)


class TargetSeq2SeqTrainer(TargetTrainer, Seq2SeqTrainer):
    """The same for a Seq2SeqTrainer, which would take the model's own loss where it generates."""

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Any, Any, Any]:
        """Compute the loss as in training, and then generate from the source alone."""
        if prediction_loss_only or not self.args.predict_with_generate:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **generation)
        loss, _, _ = Trainer.prediction_step(self, model, inputs, prediction_loss_only=True)
        source = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
        _, written, _ = super().prediction_step(model, source, False, ignore_keys, **generation)
        return loss, written, self._prepare_inputs(inputs)["labels"]
