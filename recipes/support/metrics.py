"""The metric modules of recipes/metrics, loaded from their files: evaluate would ask the hub for a bare name."""

from pathlib import Path

import evaluate

_FOLDER = Path(__file__).resolve().parent.parent / "metrics"


def load_metrics(*names: str) -> list[evaluate.EvaluationModule]:
    """Load metric modules by name, computing in memory: nothing is written to a cache that processes share."""
    return [evaluate.load(str(_FOLDER / f"{name}.py"), keep_in_memory=True) for name in names]
