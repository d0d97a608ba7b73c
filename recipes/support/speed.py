"""How fast a run trained, and how much memory it took at most."""

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_TOKEN_COLUMNS = ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")


class TrainingClock(TrainerCallback):
    """Measures the time spent in training steps: without evaluation, checkpoints and logging.

    Attributes:
        seconds: spent since training began, or was resumed.
        num_epochs: how much of the training data was seen in that time.
    """

    def __init__(self) -> None:
        """Nothing has been trained."""
        self.seconds = self.num_epochs = 0.0
        self._first_epoch: float | None = None
        self._since = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Go on measuring. The epoch before the first step is where this session began."""
        if self._first_epoch is None:
            self._first_epoch = float(state.epoch or 0.0)
        self._since = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop measuring, and wait for the device where the numbers will be read anyway."""
        if control.should_log and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds += time.perf_counter() - self._since
        self.num_epochs = float(state.epoch or 0.0) - (self._first_epoch or 0.0)


def throughput(train_data: Any, num_epochs: float, seconds: float) -> dict[str, float]:
    """Return `tokens_per_second`, of all processes together, or `samples_per_second` where records hold no tokens.

    Tokens are counted in the training records, so padding is not: what the model saw is that, times the epochs. (The
    Trainer's own include_num_input_tokens_seen gathers a number and waits for the device at every batch.)

    Args:
        train_data: what was trained on; nothing is returned where its length is not known.
        num_epochs: passes over it, of which
        seconds: were spent in training steps.
    """
    if not hasattr(train_data, "__len__") or seconds <= 0.0:
        return {}
    names = [name for name in _TOKEN_COLUMNS if name in getattr(train_data, "column_names", ())]
    if "input_ids" in names:
        names = ["input_ids"]
    if not names:
        return {"samples_per_second": round(len(train_data) * num_epochs / seconds, 1)}
    num_tokens = sum(len(ids) for name in names for ids in train_data[name])
    return {"tokens_per_second": round(num_tokens * num_epochs / seconds, 1)}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process in MiB, named after what it is of.

    `peak_gpu_memory_mib`: allocated by torch on `device`. `peak_process_memory_mib`: resident, of the whole process.
    """
    if device.type == "cuda":
        return {"peak_gpu_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    # bytes on macOS, kibibytes elsewhere
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"peak_process_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
