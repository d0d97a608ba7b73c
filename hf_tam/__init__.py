"""Torque-Aware Momentum for Hugging Face training (arXiv 2412.18790).

`import hf_tam` makes `--optim adatamw`, `adatam` and `tam` known to transformers, whichever is imported first; it
imports neither torch nor transformers by itself. The optimizers are imported when they are asked for.
"""

from __future__ import annotations

from hf_tam._version import __version__
from hf_tam.integrations.autoload import install

# `typing` and `importlib` would take longer to import than everything else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from hf_tam.export import export_torch_state_dict
    from hf_tam.integrations.transformers.torque_callback import TorqueCallback
    from hf_tam.optim import TAM, AdaTAM, AdaTAMW

__all__ = ["TAM", "AdaTAM", "AdaTAMW", "TorqueCallback", "__version__", "export_torch_state_dict"]

_HOMES = {
    "AdaTAMW": "hf_tam.optim",
    "AdaTAM": "hf_tam.optim",
    "TAM": "hf_tam.optim",
    "TorqueCallback": "hf_tam.integrations.transformers.torque_callback",
    "export_torch_state_dict": "hf_tam.export",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)


install()
