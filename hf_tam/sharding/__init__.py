"""Where the pieces of a logical tensor are, and how their sums are made whole. Nothing here knows of Adam."""

from hf_tam.sharding.agreement import Agreement
from hf_tam.sharding.marks import several_processes
from hf_tam.sharding.reducer import (
    FSDP1_MARK,
    LocalReducer,
    Reduced,
    Reducer,
    Span,
    WholeParameters,
    is_partitioned,
    refuse_parts,
    select_reducer,
)
from hf_tam.sharding.stepped import Stepped

__all__ = [
    "FSDP1_MARK",
    "Agreement",
    "LocalReducer",
    "Reduced",
    "Reducer",
    "Span",
    "Stepped",
    "WholeParameters",
    "is_partitioned",
    "refuse_parts",
    "select_reducer",
    "several_processes",
]
