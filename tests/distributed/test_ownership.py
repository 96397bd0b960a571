"""The modules that hold parameters are found without a reference to them, and not kept alive."""

import os

import pytest

from .cluster import Cluster

OPT = os.environ.get("OPT", "native")


@pytest.mark.parametrize("n_processes", [1, 2])
def test_ddp_tells_whether_it_reduced_the_last_gradients(cluster: Cluster, n_processes: int) -> None:
    cluster.run(n_processes, "ownership:unreduced")


@pytest.mark.parametrize("is_last_synchronized", [False, True])
def test_what_ddp_was_told_to_ignore_is_summed_by_each_process_alone(
    cluster: Cluster, is_last_synchronized: bool
) -> None:
    results = cluster.run(2, "ownership:ignored", name=OPT, is_last_synchronized=is_last_synchronized)
    # A tenth of the sums of gradients: 3 and 30, and their mean.
    assert results == [pytest.approx([0.3, 1.65]), pytest.approx([3.0, 1.65])]


def test_gradients_that_ddp_was_told_to_ignore_are_released(cluster: Cluster) -> None:
    for text, is_released in cluster.run(2, "ownership:released_ignored"):
        assert "DistributedDataParallel, which reduces gradients after this hook" in text
        assert is_released


@pytest.mark.parametrize("n_processes", [1, 2])
def test_fsdp2_gathers_changed_shards_after_a_reshard(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "ownership:resharded")
    assert results == [(False, True)] * n_processes, results
