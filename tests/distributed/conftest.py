"""The processes that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from .cluster import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Processes on gloo, started when a test first wants them."""
    processes = Cluster(tmp_path_factory.mktemp("stores"))
    yield processes
    processes.close()
