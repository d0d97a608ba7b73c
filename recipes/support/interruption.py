"""Ctrl-C and SIGTERM end training after the current step, with a checkpoint."""

import signal
import threading
from types import FrameType

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InterruptionCallback(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop"; a second one kills the process as usual.

    Communication: with several processes, one all-reduce of one number a step, so that all stop at the same one.

    Attributes:
        received: the number of the signal that stopped training, or 0.
    """

    def __init__(self) -> None:
        """Take over nothing yet: that happens when training begins."""
        self.received = 0
        self._previous_handlers: dict[int, object] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take over the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint and the end of training, without the evaluation that may be due."""
        self.received = _largest_of_all_ranks(self.received, args.device)
        if self.received:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Skip what an ordinary end of the epoch brings: the checkpoint is written, and the sender waits."""
        if control.should_training_stop and self.received:
            control.should_save = control.should_evaluate = False

    def restore_handlers(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.restore_handlers()


def _largest_of_all_ranks(value: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)
