"""A test that goes through the rows of a table, and tells all that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest


def check_rows(check: Callable[..., None], rows: Mapping[str, tuple[Any, ...]]) -> None:
    """Call `check` with each row, and fail with the names of all rows that raised and with what each said.

    Args:
        check: A test of one row.
        rows: Its arguments by the row's name.
    """
    __tracebackhide__ = True
    assert rows, "the table has no rows"
    failures = {}
    for name, arguments in rows.items():
        try:
            check(*arguments)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    if failures:
        told = "\n".join(f"{name}: {message}" for name, message in failures.items())
        pytest.fail(f"{len(failures)} of {len(rows)} rows fail: {', '.join(failures)}\n{told}", pytrace=False)
