"""Gradients are released after the wrapper's reduction, or refused where it comes later."""

import os

import pytest

from .cluster import Cluster

OPT = os.environ.get("OPT", "native")


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 hsdp", "fsdp2 offload", "tp", "sp", "fsdp2 and tp"])
def test_released_gradients_give_the_bits_of_the_plain_step(cluster: Cluster, kind: str, n_processes: int) -> None:
    for difference, n_left in cluster.run(n_processes, "release:released", kind=kind, name=OPT):
        assert difference == 0
        assert n_left == 0


def test_a_step_behind_a_release_searches_for_no_module(cluster: Cluster) -> None:
    assert cluster.run(1, "release:searches", name=OPT) == [0]


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_a_scaler_skips_on_all_processes(cluster: Cluster, n_processes: int) -> None:
    for scales, changes, collectives in cluster.run(n_processes, "release:scaled", kind="fsdp2", name=OPT):
        assert scales == [16.0, 8.0, 8.0, 8.0]
        assert changes == [True, False, True, True]
        small = [nbytes for operation, nbytes in collectives if operation == "allreduce_"]
        assert max(small, default=0) <= 16


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_a_scaler_finds_on_all_processes_what_was_released(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "release:all_released", name=OPT)
    assert results == [([16.0, 16.0, 8.0, 8.0], [True, True, False, True], True)] * n_processes


@pytest.mark.parametrize("bucket_bytes", [64, 96])
def test_processes_with_uneven_shards_have_the_same_buckets(cluster: Cluster, bucket_bytes: int) -> None:
    results = cluster.run(2, "release:uneven", name=OPT, bucket_bytes=bucket_bytes)
    assert results[0] == results[1]


def test_buckets_are_filled_by_shards_of_all_kinds(cluster: Cluster) -> None:
    assert cluster.run(2, "release:shard_nbytes") == [[32.0, 16.0, 16.0]] * 2


def test_a_model_that_is_wrapped_later_is_refused_too(cluster: Cluster) -> None:
    for first, *later in cluster.run(2, "release:wrapped_later", name=OPT):
        assert first == "accepted"
        assert all("DistributedDataParallel, which reduces gradients after this hook" in text for text in later)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp1 original parameters"])
def test_wrappers_that_reduce_later_are_refused(cluster: Cluster, kind: str) -> None:
    for text in cluster.run(2, "release:refused", kind=kind, name=OPT):
        assert "reduc" in text
        assert "fully_shard" in text
