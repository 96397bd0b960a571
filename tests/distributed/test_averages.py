"""Averages of shards take the place of the weights for an evaluation, and give it back."""

import os

import pytest

from .cluster import Cluster

OPT = os.environ.get("OPT", "native")


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 hsdp", "tp", "fsdp2 and tp"])
def test_a_model_is_evaluated_with_its_averages(cluster: Cluster, kind: str, n_processes: int) -> None:
    cluster.run(n_processes, "averages:swapped", kind=kind, name=OPT)
