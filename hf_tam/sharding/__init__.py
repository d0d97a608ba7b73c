"""Where the pieces of a logical tensor are, and how their sums are made whole. Nothing here knows of Adam."""

from hf_tam.sharding.reducer import (
    LocalReducer,
    Reduced,
    Reducer,
    Span,
    WholeParameters,
    is_partitioned,
    select_reducer,
)

__all__ = ["LocalReducer", "Reduced", "Reducer", "Span", "WholeParameters", "is_partitioned", "select_reducer"]
