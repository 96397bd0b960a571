"""Gradients and states are used as their parameters lie, and looking costs no Python call a tensor."""

import pytest

from .cluster import Cluster
from .wrappers import WRAPPERS


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize(
    "scenario",
    [
        "partial_and_pending",
        "missing",
        "replaced",
        "pending_plain",
        "mismatches",
        "states",
        "states_placed_otherwise",
        "shards_of_other_layouts",
    ],
)
def test_placements(cluster: Cluster, scenario: str, n_processes: int) -> None:
    cluster.run(n_processes, f"placements:{scenario}")


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("name", ["eager", "native", "triton"])
def test_gradients_that_lie_otherwise_are_zeroed_and_unscaled(
    cluster: Cluster, name: str, scale: float | None
) -> None:
    cluster.run(2, "placements:left_behind", name=name, scale=scale)


@pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind != "sp"])
def test_gradients_that_come_as_before_are_read_without_communication(cluster: Cluster, kind: str) -> None:
    cluster.run(2, "placements:known_gradients", kind=kind)


def test_the_number_of_calls_does_not_depend_on_the_number_of_parameters(cluster: Cluster) -> None:
    assert cluster.run(2, "placements:many_gradients", n_params=10) == cluster.run(
        2, "placements:many_gradients", n_params=200
    )
