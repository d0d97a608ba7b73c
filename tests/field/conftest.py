"""The pools of processes that the sharding tests use."""

from tests.sharding.conftest import worlds  # noqa: F401
