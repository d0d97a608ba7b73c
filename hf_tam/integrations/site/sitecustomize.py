"""Run at the start of every Python below `hf-tam run` or `python -m hf_tam`; then runs the next sitecustomize, if any.

The folder of this file is first on PYTHONPATH there. It is taken off `sys.path` again, and stays on PYTHONPATH for the
children of this process.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]

# A child may be another environment's Python, without hf_tam. It can do everything but select our names.
if os.environ.get("HF_TAM_AUTOLOAD") != "0" and importlib.util.find_spec("hf_tam") is not None:
    from hf_tam.integrations import autoload

    autoload.install()

_next = PathFinder.find_spec("sitecustomize", sys.path)
if _next is not None and _next.loader is not None:
    _module = importlib.util.module_from_spec(_next)
    sys.modules["sitecustomize"] = _module
    _next.loader.exec_module(_module)
