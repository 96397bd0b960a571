"""The modules that hold parameters are found without a reference to them, and not kept alive."""

import pytest

from .cluster import Cluster


@pytest.mark.parametrize("n_processes", [1, 2])
def test_ddp_tells_whether_it_reduced_the_last_gradients(cluster: Cluster, n_processes: int) -> None:
    cluster.run(n_processes, "ownership:unreduced")


@pytest.mark.parametrize("n_processes", [1, 2])
def test_fsdp2_gathers_changed_shards_after_a_reshard(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "ownership:resharded")
    assert results == [(False, True)] * n_processes, results
