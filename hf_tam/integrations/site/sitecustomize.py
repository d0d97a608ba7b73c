"""Run at the start of every Python below `hf-tam run` or `python -m hf_tam`; then runs the next sitecustomize, if any.

The folder of this file is first on PYTHONPATH there. It is taken off `sys.path` again, and stays on PYTHONPATH for the
children of this process.
"""

import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]

# A child may be another environment's Python, without hf_tam. It can do everything but select our names.
# Asking the finders directly costs less than importing importlib.util.
if os.environ.get("HF_TAM_AUTOLOAD") != "0" and any(finder.find_spec("hf_tam", None) for finder in sys.meta_path):
    import hf_tam  # noqa: F401

_this_module = sys.modules.pop("sitecustomize")
try:
    __import__("sitecustomize")
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
    sys.modules["sitecustomize"] = _this_module
