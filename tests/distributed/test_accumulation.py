"""Gradients are summed locally over backward passes and reduced once, at the step."""

import os

import pytest

from .cluster import Cluster

OPT = os.environ.get("OPT", "native")
TOLERANCE = 2e-6


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ddp", "ddp bucket view", "fsdp2", "fsdp2 hsdp"])
def test_parts_of_which_the_last_is_synchronized_are_summed(cluster: Cluster, kind: str, n_processes: int) -> None:
    results = cluster.run(n_processes, "accumulation:accumulated", kind=kind, name=OPT)
    assert max(difference for difference, _ in results) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_sums_of_unsynchronized_parts_are_reduced_once(
    cluster: Cluster, n_processes: int, options: dict[str, float]
) -> None:
    results = cluster.run(
        n_processes, "accumulation:accumulated", kind="ddp", name=OPT, is_last_synchronized=False, **options
    )
    assert max(difference for difference, _ in results) <= TOLERANCE
    assert [n_large for _, n_large in results] == [int(n_processes > 1)] * n_processes


@pytest.mark.parametrize("n_processes", [1, 2])
def test_half_precision_gradients_are_summed_in_float32(cluster: Cluster, n_processes: int) -> None:
    assert cluster.run(n_processes, "accumulation:half_precision_sums", name=OPT) == pytest.approx(
        [300] * n_processes, rel=4e-3
    )
