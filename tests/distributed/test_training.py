"""Ours trains under each wrapper as PyTorch's fused optimizer does."""

import pytest

from .cluster import Cluster
from .wrappers import WRAPPERS

# 4 steps of lr 0.02, each within a few eps of PyTorch's: eps(float32) is 1.2e-7.
TOLERANCE = 2e-6


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_model_trains_as_with_torch(cluster: Cluster, kind: str, n_processes: int) -> None:
    differences = cluster.run(n_processes, "training:as_with_torch", kind=kind, name="native")
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("n_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 hsdp", "fsdp2 ignored", "tp", "sp", "fsdp2 and tp"])
def test_processes_train_as_one_does(cluster: Cluster, kind: str, n_processes: int) -> None:
    differences = cluster.run(n_processes, "training:as_alone", kind=kind, name="native")
    assert max(differences) <= TOLERANCE
