"""Ctrl-C and SIGTERM end training after the current step, with a checkpoint."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Interruption:
    """Notes the first SIGINT or SIGTERM, and says so at once; a second one kills the process as usual.

    Attributes:
        agreed: the number of the signal for which all processes agreed to stop, or 0. A signal after the last step
            is too late: the run ends by itself.
    """

    def __init__(self) -> None:
        """Take over nothing yet."""
        self.agreed = 0
        self._received = 0
        self._previous_handlers: dict[int, object] = {}

    def take_over_signals(self) -> None:
        """Note the signals from now on; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._note)

    def agree(self, device: torch.device) -> int:
        """Set `agreed` to what any process has received so far, and return it.

        Communication: with several processes, one all-reduce of one number, so that all stop at the same step.
        """
        self.agreed = self._received
        if torch.distributed.is_initialized():
            largest = torch.tensor(self._received, device=device)
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
            self.agreed = int(largest)
        return self.agreed

    def restore_handlers(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self.restore_handlers()
        if os.environ.get("RANK", "0") == "0":
            # print may be what was interrupted.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step, with a checkpoint; again to abort\n".encode())


def announce_stop(number: int, *, num_steps: int, of: int, outcome: str) -> None:
    """Say on the terminal's error stream that a signal stopped the run, and what is left of it."""
    print(f"{signal.Signals(number).name}: stopped after step {num_steps} of {of}; {outcome}", file=sys.stderr)


def checkpoint_written(folder: Path, *, resumable: bool = True) -> str:
    """Word the outcome of a stop that wrote a checkpoint, for `announce_stop`."""
    continuing = "To continue, run the same command with --resume_from_checkpoint true"
    return f"checkpoint written: {folder}\n{continuing if resumable else 'It holds the model without its optimizer.'}"


class InterruptionCallback(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop".

    Communication: with several processes, one all-reduce of one number a step.
    """

    def __init__(self, interruption: Interruption) -> None:
        """Take over nothing yet: that happens when training begins."""
        self._interruption = interruption

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take over the signals."""
        self._interruption.take_over_signals()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint and the end of training, without the evaluation that may be due."""
        if self._interruption.agree(args.device):
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Skip what an ordinary end of the epoch brings: the checkpoint is written, and the sender waits."""
        if control.should_training_stop and self._interruption.agreed:
            control.should_save = control.should_evaluate = False
