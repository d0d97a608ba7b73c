"""Registers the optimizer names with transformers as soon as, and only if, transformers is imported.

Imports nothing but `os`, `sys` and two names: this runs at the start of every Python in an activated environment.
"""

from __future__ import annotations

import os
import sys

from hf_tam.integrations.switches import ANNOUNCE_VARIABLE, KILL_SWITCH

TYPE_CHECKING = False  # `typing` alone would take longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SITE_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")

# The modules that get patched, each when its own import has finished.
PATCHED_MODULES = (
    "transformers.training_args",
    "transformers.trainer_optimizer",
    "transformers.trainer",
    "accelerate.accelerator",
    "deepspeed.runtime.engine",
)


class PostImportHook:
    """A meta path finder that finds nothing itself: it calls back once a named module has been executed.

    Args:
        names: Full names of the modules to wait for.
        callback: Called with each module right after its import.
    """

    def __init__(self, names: Sequence[str], callback: Callable[[ModuleType], None]) -> None:
        """Remember what to wait for."""
        self.pending = set(names)
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find an awaited module with the other finders and have its loader call back; anything else is not ours."""
        if fullname not in self.pending:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                self._call_back_after_execution(spec)
                return spec
        return None

    def _call_back_after_execution(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        if loader is None:
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ != spec.name:  # a loader may serve several modules
                return
            if vars(loader).get("exec_module") is exec_module:
                del loader.exec_module
            # Another hook on the meta path may have asked for the spec too, and had the loader wrapped twice.
            if spec.name in self.pending:
                self.pending.discard(spec.name)
                self.callback(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


def _register(module: ModuleType) -> None:
    # Imported here and not above: this runs once the library is there, and may load torch.
    if sys.modules.get("torch", sys) is None:  # a process that keeps torch out, and only reads training arguments
        if module.__name__ == "transformers.training_args":
            from hf_tam.integrations.transformers import optimizer_names

            optimizer_names.register_without_torch(module)
        return
    from hf_tam.integrations.accelerate import patches as accelerate
    from hf_tam.integrations.deepspeed import patches as deepspeed
    from hf_tam.integrations.transformers import patches as transformers

    library = module.__name__.partition(".")[0]
    {"accelerate": accelerate, "deepspeed": deepspeed, "transformers": transformers}[library].register(module)


_hook = PostImportHook(PATCHED_MODULES, _register)


def install() -> None:
    """Register at once with what is loaded of transformers, and with the rest when it is imported. Idempotent.

    Raises:
        ImportError: If the transformers that is loaded already lacks a name that the registration relies on.
    """
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)  # before those who would find the module by themselves
    for name in PATCHED_MODULES:
        if name in _hook.pending and name in sys.modules:
            _hook.pending.discard(name)
            _register(sys.modules[name])


def is_switched_off() -> bool:
    """Whether the kill switch HF_TAM_AUTOLOAD=0 is set."""
    return os.environ.get(KILL_SWITCH) == "0"


def extend_to_children(environment: MutableMapping[str, str]) -> None:
    """Change an environment so that every Python started in it registers the names, and the first one says so.

    Puts a folder with a `sitecustomize` module first on PYTHONPATH.

    Args:
        environment: Changed in place; `os.environ`, or a copy of it.
    """
    inherited = environment.get("PYTHONPATH", "")
    if SITE_FOLDER not in inherited.split(os.pathsep):
        environment["PYTHONPATH"] = SITE_FOLDER + os.pathsep + inherited if inherited else SITE_FOLDER
    environment.setdefault(ANNOUNCE_VARIABLE, "1")
