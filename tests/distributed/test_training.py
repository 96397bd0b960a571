"""Ours trains under each wrapper as PyTorch's fused optimizer does."""

import os

import pytest

from .cluster import Cluster
from .wrappers import WRAPPERS

# 4 steps of lr 0.02, each within a few eps of PyTorch's: eps(float32) is 1.2e-7.
TOLERANCE = 2e-6
OPT = os.environ.get("OPT", "native")


@pytest.mark.parametrize("n_processes", [1, 3])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_trains_as_with_torch(cluster: Cluster, kind: str, n_processes: int) -> None:
    differences = cluster.run(n_processes, "training:as_with_torch", kind=kind, name=OPT)
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("n_processes", [1, 3, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 hsdp", "fsdp2 ignored", "tp", "sp", "fsdp2 and tp"])
def test_processes_train_as_one_does(cluster: Cluster, kind: str, n_processes: int) -> None:
    differences = cluster.run(n_processes, "training:as_alone", kind=kind, name=OPT)
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("scenario", ["late_groups", "joined", "pipeline"])
def test_other_ways_to_train_are_as_with_torch(cluster: Cluster, scenario: str, n_processes: int) -> None:
    assert max(cluster.run(n_processes, f"training:{scenario}", name=OPT)) <= TOLERANCE


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_each_process_of_zero_updates_its_part(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "training:zero_redundancy", name=OPT)
    assert max(difference for difference, _ in results) <= TOLERANCE
    assert sum(n_params for _, n_params in results) == 8


@pytest.mark.parametrize("kind", ["ddp", "fsdp1 original parameters", "fsdp2", "fsdp2 hsdp", "sp"])
@pytest.mark.parametrize("name", ["triton", "eager"])
def test_other_backends_train_as_torch(cluster: Cluster, kind: str, name: str) -> None:
    assert max(cluster.run(2, "training:as_with_torch", kind=kind, name=name)) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ddp", (True, 1.0, True)),
        ("fsdp1", (True, 2.0, True)),
        ("fsdp1 original parameters", (True, 2.0, True)),
        ("fsdp2", (False, 2.0, False)),
        ("tp", (False, 2.0, False)),
    ],
)
def test_dragons_parameters_follow_dragon_as_far_as_a_wrapper_lets_them(
    cluster: Cluster, kind: str, expected: tuple[bool, float, bool]
) -> None:
    assert cluster.run(2, "training:dragons", kind=kind) == [expected] * 2
