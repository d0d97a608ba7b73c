from tests.sharding.conftest import worlds  # noqa: F401
