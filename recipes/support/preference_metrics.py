"""What a preference model is measured by, apart from TRL's rewards: which completion it finds likelier itself."""

from typing import Any

import torch
from torch import Tensor

_FIRST_AND_LAST = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


def completion_log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of each completion given its prompt, in nats, fp32, shape (batch,).

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `completion_mask`, each of shape (batch, time).
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    chosen = logits.log_softmax(dim=-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (chosen * batch["completion_mask"][:, 1:]).sum(dim=1)


def preference_accuracy(trainer: Any) -> float | None:
    """Return in what share of the evaluation pairs the model finds the chosen completion likelier than the other.

    None where nothing is evaluated. TRL's reward accuracy compares with the reference and so is 0 before the first
    step; this says what the model prefers by itself.

    Communication: with several processes, one gather a batch.
    """
    if trainer.eval_dataset is None:
        return None
    model, outcomes = trainer.model, []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            # TRL's batches hold the chosen completions first, then the rejected ones in the same order.
            chosen, rejected = completion_log_probs(model, batch).chunk(2)
            outcomes.append(trainer.accelerator.gather_for_metrics((chosen > rejected).float()))
    model.train(was_training)
    return float(torch.cat(outcomes).mean())


def first_and_last(trainer: Any, *, preferred_before: float | None) -> dict[str, float]:
    """Return loss, rewards and preferences of the result, and with `_before` those before the first step.

    Args:
        trainer: after training.
        preferred_before: what `preference_accuracy` returned before the first step.
    """
    if trainer.eval_dataset is None:
        return {}
    history = trainer.state.log_history
    if not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in history):
        trainer.evaluate()
    rows = [row for row in history if "eval_loss" in row]
    before = {f"{name}_before": value for row in rows[:1] if row["step"] == 0 for name, value in row.items()}
    values = {**before, **rows[-1]}
    measured = {name: value for name, value in values.items() if name.removesuffix("_before") in _FIRST_AND_LAST}
    accuracy = preference_accuracy(trainer)
    return {**measured, "eval_preference_accuracy_before": preferred_before, "eval_preference_accuracy": accuracy}
