import pytest

from tests.sharding.processes import World


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Worlds by size, each started when it is first asked for."""
    started = {}

    def world(size):
        if size not in started:
            started[size] = World(size, str(tmp_path_factory.mktemp(f"world{size}")))
        return started[size]

    yield world
    for world_of_size in started.values():
        world_of_size.close()
