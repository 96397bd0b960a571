"""Averages of shards take the place of the weights for an evaluation, and give it back."""

import os
from pathlib import Path

import pytest

from .cluster import Cluster

OPT = os.environ.get("OPT", "native")


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 hsdp", "tp", "fsdp2 and tp"])
def test_a_model_is_evaluated_with_its_averages(cluster: Cluster, kind: str, n_processes: int) -> None:
    cluster.run(n_processes, "averages:swapped", kind=kind, name=OPT)


@pytest.mark.parametrize("loaded", ["nothing", "by PyTorch", "in place"])
@pytest.mark.parametrize(("kind", "n_processes"), [("ddp", 1), ("fsdp2", 2)])
def test_an_average_begins_with_weights_that_were_loaded_after_the_states_were_asked_for(
    cluster: Cluster, tmp_path: Path, kind: str, n_processes: int, loaded: str
) -> None:
    arguments = {"kind": kind, "name": OPT, "folder": str(tmp_path), "loaded": loaded}
    expected = [0.0, 0.0] if loaded == "nothing" else [1.5, 0.75]
    assert cluster.run(n_processes, "averages:begun", **arguments) == [expected] * n_processes
