"""Where the pieces of a logical tensor are, and how their sums are made whole. Nothing here knows of Adam."""

from hf_tam.sharding.agreement import Agreement
from hf_tam.sharding.groups import Reduced
from hf_tam.sharding.logical import LogicalTensors
from hf_tam.sharding.ownership import device_of
from hf_tam.sharding.reducer import LocalReducer, ParameterReducer, Reducer, Span
from hf_tam.sharding.select import select_reducer
from hf_tam.sharding.stepped import Stepped

__all__ = [
    "Agreement",
    "LocalReducer",
    "LogicalTensors",
    "ParameterReducer",
    "Reduced",
    "Reducer",
    "Span",
    "Stepped",
    "device_of",
    "select_reducer",
]
