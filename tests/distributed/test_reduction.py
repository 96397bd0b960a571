"""Sums over processes are those of one process, agree on all ranks, and cost one small collective."""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dragon.vm.torch.optim._distributed.lanes import Lane
from dragon.vm.torch.optim._distributed.reduction import meeting_device
from dragon.vm.torch.optim._gradients import shared_norm

from .cluster import Cluster
from .wrappers import WRAPPERS

N_PROCESSES = [2, 3, 4]
# Of two dimensions, which 4 processes fill.
SQUARE = ["fsdp2 hsdp", "fsdp2 and tp"]
SHARDED = ["fsdp1", "fsdp2", "fsdp2 ignored", "sp"]


@pytest.mark.parametrize(
    ("kind", "n_processes"), [*product(WRAPPERS, [2, 3]), *product(SQUARE, [4])], ids=lambda value: str(value)
)
def test_norms_of_all_kinds_are_those_of_whole_gradients(cluster: Cluster, kind: str, n_processes: int) -> None:
    results = cluster.run(n_processes, "reductions:sums", kind=kind)
    assert all(result == results[0] for result in results), results


@pytest.mark.parametrize(("kind", "n_processes"), [*product(SHARDED, [2, 3]), *product(SQUARE, [4])])
def test_all_processes_see_what_one_found(cluster: Cluster, kind: str, n_processes: int) -> None:
    for result in cluster.run(n_processes, "reductions:findings", kind=kind):
        assert result[:2] == [(1.0, math.inf)] * 2
        flag, value = result[2]
        assert flag == 1.0
        assert math.isnan(value)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_one_process_reduces_nothing(cluster: Cluster, kind: str) -> None:
    assert cluster.run(1, "reductions:bits", kind=kind) == [True]


@pytest.mark.parametrize("n_processes", N_PROCESSES)
def test_a_process_without_gradients_takes_part(cluster: Cluster, n_processes: int) -> None:
    assert cluster.run(n_processes, "reductions:without_gradients") == [4.0 * (n_processes - 1)] * n_processes


@pytest.mark.parametrize("n_processes", N_PROCESSES)
def test_meshes_and_plain_parameters_mix(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "reductions:mixed")
    for found, expected, spoilt in results:
        assert math.isclose(found, expected, rel_tol=1e-14)
        assert found == results[0][0]
        assert spoilt == math.inf


@pytest.mark.parametrize("n_processes", [2, 4])
def test_a_group_joins_meshes_of_pipeline_stages(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "reductions:stages")
    for result in results:
        assert result == results[0]
        for found, expected in result:
            assert math.isclose(found, expected, rel_tol=1e-14)


def test_a_group_within_a_mesh_adds_nothing(cluster: Cluster) -> None:
    assert all(found == expected for found, expected in cluster.run(4, "reductions:overlapping"))


def test_a_group_joins_partitions_of_whole_tensors(cluster: Cluster) -> None:
    expected = float(sum(2 + i for rank in range(3) for i in range(1 + rank)))
    assert cluster.run(3, "reductions:zero_partitions") == [expected] * 3


def test_groups_and_parameters_that_cannot_be_summed_are_refused(cluster: Cluster) -> None:
    _, texts = cluster.run(2, "reductions:refusals")
    assert "placements are (Partial(sum),)" in texts["partial"]
    assert "placements are (Replicate(), Partial(sum))" in texts["in part"]
    assert "got 'world'" in texts["no group"]
    assert "must contain this process" in texts["others"]


@pytest.mark.parametrize(
    ("devices", "backends", "expected"),
    [
        (["cpu", "cuda:1"], "cpu:gloo,cuda:nccl", "cuda:1"),
        (["cpu"], "cpu:gloo,cuda:nccl", "cpu"),
        (["meta"], "cpu:gloo,cuda:nccl", "cpu"),
        ([], "cpu:gloo,cuda:nccl", "cuda:2"),
        ([], "cpu:gloo,cuda:gloo", "cpu"),
    ],
    ids=str,
)
def test_processes_meet_on_one_type_of_device(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], backends: str, expected: str
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    tensors: list[Any] = [SimpleNamespace(device=torch.device(name)) for name in devices]
    assert meeting_device(tensors, object()) == torch.device(expected)


def test_sums_have_the_device_of_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = [Lane((None,), {0: 1.0, 1: 1.0})]
    monkeypatch.setattr(shared_norm, "make_lanes", lambda *_, **__: lanes)
    params: list[Any] = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda:1")]
    made = shared_norm.make_reductions(params, None, clips_each=False)
    assert made is not None
    assert made.device == torch.device("cuda:1")
