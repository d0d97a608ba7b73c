"""Logs the torque of a Trainer's optimizer.

What is relied on: `Trainer.log` puts a copy of its values at the end of `state.log_history`, then hands one dict to
all callbacks in their order; the values of a training step, and only those, have a "loss" (transformers 5.2 to 5.23).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_tam.integrations.transformers.optim_args import KEYS
from hf_tam.integrations.wrapped import find_ours, innermost
from hf_tam.torque_log import FILE_NAME, TorqueFile, read_torque

logger = logging.getLogger("hf_tam")


class TorqueCallback(TrainerCallback):  # type: ignore[misc]
    """Logs what the torque does, at every logging step of a Trainer whose optimizer is one of ours.

    Into the Trainer's logs, and so to whatever `report_to` says: `torque/cosine_mean`, `torque/damping_mean`,
    `torque/damping_p10`, `torque/damping_p90`, `torque/effective_lr`, `torque/skipped`, and with a LoRA adapter
    `torque/lora_A_damping_mean` and `torque/lora_B_damping_mean`. The effective learning rate is the mean over tensors
    of lr * 2 * (damping_eps + damping) in the calibrated forms, of lr * c in the paper's.

    Into `output_dir/torque.jsonl`, by the main process: one row for each layer group and logging step. A resumed run
    goes on with the file, without the rows past its checkpoint.

    With another optimizer it warns once and does nothing. No communication; one transfer from the device to the host
    for each logging step.
    """

    def __init__(self) -> None:
        """Nothing is opened before training begins."""
        self._file: TorqueFile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Begin `torque.jsonl` at the step that training begins at."""
        self._file = None
        if not state.is_world_process_zero:
            return
        if find_ours(optimizer) is None:
            asked = args.optim in KEYS
            remedy = (
                f"--optim {args.optim} has no effect where the script gives the Trainer its own"
                if asked
                else "Use --optim adatamw, adatam or tam, or leave the callback out"
            )
            logger.warning(
                "TorqueCallback logs nothing: the optimizer is %s, not one of hf_tam. %s.",
                type(innermost(optimizer)).__name__,
                remedy,
            )
            return
        if _never_logs(args, state):
            logger.warning(
                "TorqueCallback logs nothing in this training of %s steps: logging_strategy is %s, logging_steps %s.",
                state.max_steps,
                str.__str__(args.logging_strategy.value),
                state.logging_steps,
            )
        self._file = TorqueFile(Path(args.output_dir) / FILE_NAME)
        self._file.begin(step=state.global_step)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add to the values of a training step, and write the rows of its layer groups."""
        ours = find_ours(optimizer)
        if ours is None or logs is None or "loss" not in logs:
            return
        reading = read_torque(ours)
        summary = reading.summary()
        logs.update(summary)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(summary)
        if self._file is not None:
            self._file.append(reading.rows(step=state.global_step, epoch=state.epoch))


def _never_logs(args: Any, state: Any) -> bool:
    if args.logging_strategy == "steps":
        return bool(state.logging_steps > state.max_steps) and not args.logging_first_step
    return bool(args.logging_strategy == "no")


def arrange_callbacks(callbacks: list[TrainerCallback], *, wanted: bool | None) -> None:
    """Put the TorqueCallback first, so that those which report see what it adds.

    Args:
        callbacks: A Trainer's; changed in place.
        wanted: Whether there must be one; None: if it was added.
    """
    ours = [callback for callback in callbacks if isinstance(callback, TorqueCallback)]
    others = [callback for callback in callbacks if not isinstance(callback, TorqueCallback)]
    if wanted and not ours:
        ours = [TorqueCallback()]
    callbacks[:] = others if wanted is False else [*ours, *others]
