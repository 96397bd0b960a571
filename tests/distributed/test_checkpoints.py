"""States under FSDP2 and tensor parallelism are saved, copied, resharded and exchanged with PyTorch."""

import os
from pathlib import Path

import pytest

from .cluster import Cluster, ScenarioFailed

OPT = os.environ.get("OPT", "native")
TOLERANCE = 2e-6


def difference(found: list[list[float]], expected: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp", "sp", "fsdp2 and tp"])
def test_a_run_goes_on_bit_by_bit_from_a_file_and_a_copy(cluster: Cluster, kind: str, n_processes: int) -> None:
    assert cluster.run(n_processes, "checkpoints:saved_and_copied", kind=kind, name=OPT) == [[0, 0]] * n_processes


@pytest.mark.parametrize("n_loaders", [1, 2, 3, 4])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_checkpoint_of_two_processes_loads_on_any_number(
    cluster: Cluster, tmp_path: Path, n_loaders: int, is_async: bool
) -> None:
    folder = str(tmp_path)
    cluster.run(2, "checkpoints:save", kind="fsdp2", name=OPT, folder=folder, is_async=is_async)
    (expected, *_) = cluster.run(2, "checkpoints:uninterrupted", kind="fsdp2", name=OPT)
    for found in cluster.run(n_loaders, "checkpoints:resume", kind="fsdp2", name=OPT, folder=folder):
        assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(("saver", "loader"), [("torch", OPT), (OPT, "torch")])
@pytest.mark.parametrize("kind", ["fsdp2", "sp"])
def test_dcp_passes_states_on_to_torch_and_back(
    cluster: Cluster, tmp_path: Path, kind: str, saver: str, loader: str, is_flat: bool
) -> None:
    arguments = {"kind": kind, "folder": str(tmp_path), "is_flat": is_flat}
    cluster.run(2, "checkpoints:save", name=saver, **arguments)
    (expected, *_) = cluster.run(2, "checkpoints:uninterrupted", kind=kind, name="torch")
    for found in cluster.run(2, "checkpoints:resume", name=loader, **arguments):
        assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("n_processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 and tp"])
def test_full_state_dicts_are_offloaded_and_broadcast(cluster: Cluster, kind: str, n_processes: int) -> None:
    assert cluster.run(n_processes, "checkpoints:full_dicts", kind=kind, name=OPT) == [0] * n_processes


@pytest.mark.parametrize("is_broadcast", [False, True])
def test_a_full_dict_gives_its_options_to_all_processes(cluster: Cluster, is_broadcast: bool) -> None:
    found = cluster.run(2, "checkpoints:options_of_the_first", kind="fsdp2", name=OPT, is_broadcast=is_broadcast)
    assert found == [{"clip_value": 0.5, "grad_scale": 2.0, "clip_norm": None}] * 2


def test_pending_sums_are_kept_and_saved(cluster: Cluster) -> None:
    assert cluster.run(2, "checkpoints:pending_sums", name=OPT) == [(0.0, True)] * 2


def test_the_last_good_checkpoint_resumes_after_a_process_was_killed(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ScenarioFailed, match="died with exit code -9"):
        cluster.run(2, "checkpoints:die_while_saving", kind="fsdp2", name=OPT, folder=str(tmp_path))
    assert not (tmp_path / "bad" / ".metadata").exists()
    (expected, *_) = cluster.run(2, "checkpoints:uninterrupted", kind="fsdp2", name=OPT)
    for found in cluster.run(2, "checkpoints:resume", kind="fsdp2", name=OPT, folder=str(tmp_path / "good")):
        assert found == expected


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_state_dicts_have_pending_sums(cluster: Cluster, n_processes: int, is_full: bool) -> None:
    differences = cluster.run(n_processes, "checkpoints:saved_sums", name=OPT, is_full=is_full)
    assert differences == [0] * n_processes


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_process_group_is_borrowed_by_copies_and_refused_by_pickles(cluster: Cluster, n_processes: int) -> None:
    for is_right, text in cluster.run(n_processes, "checkpoints:borrowed_group", name=OPT):
        assert is_right
        assert "process_group" in text
        assert "state_dict()" in text


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_whole_and_sharded_state_dicts_go_into_each_other(cluster: Cluster, n_processes: int) -> None:
    assert cluster.run(n_processes, "checkpoints:whole_dicts", name=OPT) == [(0, True)] * n_processes


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_process_without_states_makes_them_alone(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "checkpoints:asked_where_some_have_no_state", name=OPT)
    assert results == [(2, [])] * n_processes


def test_flat_dicts_and_broadcasts_do_not_bring_sums_to_all(cluster: Cluster) -> None:
    first, second = cluster.run(2, "checkpoints:loaded_sums", name=OPT)
    assert first == {"nested": 8, "flat": 0, "broadcast": 8}
    assert second == {"nested": 8, "flat": 0, "broadcast": 0}
