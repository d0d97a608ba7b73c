"""Runs by Ray Tune, on a cluster or on this machine; imported only where ray is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import tune

from hf_tam.lab.compare.choosing import Row
from hf_tam.lab.compare.plan import Spec
from hf_tam.lab.compare.running import RunError, Workshop

__all__ = ["with_ray"]


class _Keep(tune.Callback):  # type: ignore[misc]
    """Hands each row over as it comes. Tune pickles its callbacks; what the rows go to stays here."""

    def __init__(self, keep: Callable[[Row], None]) -> None:
        self.keep = keep

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if "row" in result:
            self.keep(json.loads(result["row"]))


def with_ray(workshop: Workshop, specs: Sequence[Spec], keep: Callable[[Row], None]) -> None:
    """Do runs on the cluster that ray finds, or on this machine.

    Every machine must see the recipes, the data and `workshop.folder` at the same paths.

    Raises:
        RunError: Some ended without results; the others were done first, and their rows kept.
    """

    def run(config: dict[str, Any]) -> None:
        tune.report({"row": json.dumps(workshop.run(specs[config["position"]]))})

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    tuner = tune.Tuner(
        tune.with_resources(run, {"cpu": workshop.threads}),
        param_space={"position": tune.grid_search(range(len(specs)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=workshop.jobs),
        run_config=tune.RunConfig(
            storage_path=str((workshop.folder / "ray").absolute()), verbose=0, callbacks=[_Keep(keep)]
        ),
    )
    errors = [result.error for result in tuner.fit() if result.error is not None]
    if errors:
        raise RunError(f"{len(errors)} of {len(specs)} runs failed; the first: {str(errors[0]).splitlines()[-1]}")
