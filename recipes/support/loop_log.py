"""The plan of a hand-written loop, and what it tells about its steps: metrics.jsonl and a line on the terminal."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_tam.integrations.wrapped import find_ours
from hf_tam.torque_log import FILE_NAME, TorqueFile, read_torque
from recipes.support.parallel import sum_of_replicas
from recipes.support.reporting import MetricsFile, read_metrics


class LoopLog:
    """Averages training losses over steps and processes, and writes every event on the main process.

    Attributes:
        num_steps: of the whole run.
        steps_per_epoch: optimizer steps in one pass over the data.
        seconds: spent in the steps that were noted.
        num_noted: how many these are.
    """

    def __init__(self, accelerator: Accelerator, path: Path, *, every: int) -> None:
        """Log to `path` the training loss of every `every` steps."""
        self.num_steps = self.steps_per_epoch = 0
        self._accelerator = accelerator
        self._path = path
        self._every = every
        self._losses: list[torch.Tensor] = []
        self._optimizer: Any = None
        self._torque_file = TorqueFile(path.with_name(FILE_NAME))
        self.seconds, self.num_noted = 0.0, 0

    def plan(self, optimizer: Any, *, num_steps: int, steps_per_epoch: int) -> None:
        """Say how long the run is, and whose torque to log."""
        self._optimizer = optimizer
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch

    def begin(self, step: int) -> None:
        """Begin the file, or go on with it after `step`."""
        if self._accelerator.is_main_process:
            MetricsFile(self._path).begin(step=step)
            self._torque_file.begin(step=step)
            if step:
                print(f"resuming after step {step}")

    def note_step(
        self, step: int, loss: torch.Tensor, *, grad_norm: float | None, learning_rate: float, seconds: float
    ) -> None:
        """Note the loss that this process saw; where a log event is due, write the mean of all since the last one.

        Communication: one gather of a number where an event is due.
        """
        self._losses.append(loss)
        self.seconds += seconds
        self.num_noted += 1
        if step % self._every == 0 or step == self.num_steps:
            mean = sum_of_replicas(self._accelerator, torch.stack(self._losses).mean())
            self._losses.clear()
            norm = {} if grad_norm is None else {"grad_norm": grad_norm}
            values = {"loss": float(mean), **norm, "learning_rate": learning_rate}
            self.write(step, values | self._log_torque(step))

    def _log_torque(self, step: int) -> dict[str, float]:
        """Write a row for each layer group, and return the values to log: what TorqueCallback does under a Trainer."""
        ours = find_ours(self._optimizer)
        if ours is None or not self._accelerator.is_main_process:
            return {}
        reading = read_torque(ours)
        self._torque_file.append(reading.rows(step=step, epoch=step / self.steps_per_epoch))
        return reading.summary()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one event."""
        if self._accelerator.is_main_process:
            MetricsFile(self._path).append({"step": step, "epoch": step / self.steps_per_epoch, **values})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
            print(f"step {step} of {self.num_steps}  {shown}", flush=True)

    def is_due(self, step: int, strategy: str, every: int) -> bool:
        """Whether something is due after `step`: at the end of an epoch, every `every` steps, or never."""
        return strategy != "no" and step % (self.steps_per_epoch if strategy == "epoch" else every) == 0

    def summarise(self) -> dict[str, float]:
        """Return the mean training loss and the first and last evaluation, from the file; on the main process."""
        rows = read_metrics(self._path)
        losses, evaluations = ([row for row in rows if name in row] for name in ("loss", "eval_loss"))
        starts = [0, *(row["step"] for row in losses)]
        weighted = [row["loss"] * (row["step"] - start) for row, start in zip(losses, starts, strict=False)]
        before = {
            f"{name}_before": value for row in evaluations[:1] if row["step"] == 0 for name, value in row.items()
        }
        kept = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
        metrics = {"train_loss": sum(weighted) / self.num_steps, **before, **evaluations[-1]}
        return {
            name: value for name, value in metrics.items() if name.removesuffix("_before") in ("train_loss", *kept)
        }
