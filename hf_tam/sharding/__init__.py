"""Where the pieces of a logical tensor are, and how their sums are made whole. Nothing here knows of Adam."""

from hf_tam.sharding.agreement import Agreement
from hf_tam.sharding.reducer import LocalReducer, Reduced, Reducer, Span, is_partitioned, select_reducer
from hf_tam.sharding.stepped import Stepped

__all__ = [
    "Agreement",
    "LocalReducer",
    "Reduced",
    "Reducer",
    "Span",
    "Stepped",
    "is_partitioned",
    "select_reducer",
]
