"""What cannot be right is refused at construction, with reason and remedy; what can be right is not."""

import os

import pytest

from .cluster import Cluster
from .wrappers import WRAPPERS

OPT = os.environ.get("OPT", "native")
NORMS = ("max_grad_norm", "skip_nonfinite", "clip_norm")
FSDP1 = ("fsdp1", "fsdp1 original parameters")


def test_several_processes_refuse_what_needs_other_processes(cluster: Cluster) -> None:
    _, found = cluster.run(2, "refusals:constructions", name=OPT)
    for kind in ("fsdp2", "tp", "fsdp1"):
        assert "flatten" in found.pop(f"flatten {kind}")
    for norm in NORMS:
        for kind in FSDP1:
            text = found.pop(f"{norm} {kind}")
            assert norm in text
            assert "process_group" in text
    for norm in ("max_grad_norm", "skip_nonfinite"):
        text = found.pop(f"{norm} zero")
        assert norm in text
        assert "process_group" in text
    for kind in ("fsdp2", "tp"):
        for is_plain in (True, False):
            assert "release_gradients with process_group" in found.pop(f"release {kind} {is_plain}")
    # A whole tensor's norm needs no other process; who joins it with a group does not know what he asks.
    assert "clip_norm" in found.pop("clip_norm zero group")
    assert set(found.values()) == {"accepted"}, found


@pytest.mark.parametrize("n_processes", [2, 3])
def test_norms_beside_a_mesh_need_a_process_group(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "refusals:beside_a_mesh", name=OPT)
    assert [norm for _, norm in results] == pytest.approx([6**0.5] * n_processes)
    refused = [{key for key, text in found.items() if text != "accepted"} for found, _ in results]
    assert refused == [set()] * (n_processes - 1) + [{*NORMS, "clip_norm group"}]
    assert all("process_group" in results[-1][0][key] for key in refused[-1])


def test_one_process_refuses_nothing(cluster: Cluster) -> None:
    (found,) = cluster.run(1, "refusals:constructions", name=OPT)
    # A `DTensor` has memory of its own with one process too.
    flattened = {f"flatten {kind}" for kind in ("fsdp2", "tp")}
    assert {kind for kind, text in found.items() if text != "accepted"} == flattened, found


@pytest.mark.parametrize("n_processes", [2, 3])
def test_swapping_the_averages_of_fsdp1_is_refused(cluster: Cluster, n_processes: int) -> None:
    for text in cluster.run(n_processes, "refusals:averages_of_fsdp1", name=OPT):
        assert "FullyShardedDataParallel" in text


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_hidden_sharding_is_detected_and_nothing_else(cluster: Cluster, n_processes: int) -> None:
    hidden = {*FSDP1, "fsdp1 one layer", "zero"} if n_processes > 1 else set()
    for found in cluster.run(n_processes, "refusals:detected"):
        assert {kind for kind, reason in found.items() if reason} == hidden
        assert len(found) == len(WRAPPERS) + 3
        assert all("process_group" in found[kind] for kind in hidden)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_norms_are_checked_against_what_is_known(cluster: Cluster, n_processes: int) -> None:
    for found in cluster.run(n_processes, "refusals:checked"):
        refused = {key: text for key, text in found.items() if text != "accepted"}
        for key, text in refused.items():
            assert text.startswith("max_grad_norm=1.0" if "max_grad_norm" in key else "clip_norm=1.0")
            assert "process_group" in text
        needs_group = {f"{kind} {norm}" for kind in FSDP1 for norm in ("max_grad_norm", "clip_norm")}
        is_unknown = {"ddp clip_norm group", "tp clip_norm group"}
        assert set(refused) == (needs_group | is_unknown if n_processes > 1 else set())


def test_clipping_each_tensor_by_kernels_beside_other_updates_is_refused(cluster: Cluster) -> None:
    assert cluster.run(2, "refusals:clipped_by_host_and_kernels", strided=False) == ["accepted"] * 2
    for text in cluster.run(2, "refusals:clipped_by_host_and_kernels", strided=True):
        assert "clip_norm=1.0" in text
        assert "backend='eager'" in text


@pytest.mark.parametrize("is_loaded", [False, True])
def test_clipping_parts_that_is_asked_for_later_is_refused_by_the_step(cluster: Cluster, is_loaded: bool) -> None:
    for (*refused, without), is_same in cluster.run(2, "refusals:clipped_later", name=OPT, is_loaded=is_loaded):
        assert all("clip_norm=1.0 needs whole gradients" in text for text in refused)
        assert is_same
        assert without == "accepted"


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("are_all", [True, False])
def test_an_optimizer_of_gathered_parameters_is_refused_by_its_first_step(
    cluster: Cluster, n_processes: int, are_all: bool
) -> None:
    """Without an error PyTorch's leaves the model as it is."""
    scenario = "refusals:made_of_gathered_parameters"
    for text, has_changed in cluster.run(n_processes, scenario, name=OPT, are_all=are_all, is_resharded=False):
        assert "behind model.reshard()" in text
        assert not has_changed
    for outcome in cluster.run(n_processes, scenario, name=OPT, are_all=are_all, is_resharded=True):
        assert outcome == ("accepted", True)
