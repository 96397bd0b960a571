"""What is run on several GPUs is right on several CPUs."""

import pytest

from .cluster import Cluster


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "dtensor"])
def test_processes_train_as_one_does(cluster: Cluster, kind: str) -> None:
    assert cluster.run(2, "many_gpus:trained_as_alone", kind=kind) == [None, None]


def test_a_norm_is_of_all_gradients_of_all_processes(cluster: Cluster) -> None:
    assert cluster.run(2, "many_gpus:meets_on_the_gpu") == [None, None]
