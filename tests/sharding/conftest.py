import pytest

from tests.sharding.processes import World


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Worlds by size and purpose, each started when it is first asked for."""
    started = {}

    def world(size, purpose=""):
        if (size, purpose) not in started:
            started[size, purpose] = World(size, str(tmp_path_factory.mktemp(f"world{size}{purpose}")))
        return started[size, purpose]

    yield world
    for world_of_size in started.values():
        world_of_size.close()
