"""Gradients are summed locally over backward passes and reduced once, at the step."""

import os

import pytest
import torch

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


@pytest.mark.parametrize(
    ("dtype", "first", "tolerance"),
    [(torch.bfloat16, 256.0, 4e-3), (torch.float16, 2048.0, 1e-3), (torch.float64, 2.0**24, 1e-12)],
    ids=str,
)
@pytest.mark.parametrize("n_processes", [1, 2])
def test_sums_keep_what_their_parameters_dtype_or_float32_would_lose(
    cluster: Cluster, n_processes: int, dtype: torch.dtype, first: float, tolerance: float
) -> None:
    found = cluster.run(n_processes, "accumulation:small_parts", name=OPT, dtype=dtype, first=first)
    assert found == pytest.approx([first + 299] * n_processes, rel=tolerance)


@pytest.mark.parametrize(
    ("kind", "is_among_replicas"), [("fsdp2", False), ("fsdp2 hsdp", False), ("fsdp2 hsdp", True)]
)
@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_step_without_any_reduced_gradient_is_refused(
    cluster: Cluster, kind: str, is_among_replicas: bool, n_processes: int
) -> None:
    arguments = {"kind": kind, "name": OPT, "is_among_replicas": is_among_replicas}
    for text in cluster.run(n_processes, "accumulation:never_reduced", **arguments):
        assert "set_requires_gradient_sync(True)" in text


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1 original parameters"])
def test_sums_of_unsharded_gradients_are_refused(cluster: Cluster, kind: str) -> None:
    for text in cluster.run(2, "accumulation:never_reduced", kind=kind, name=OPT):
        assert "FullyShardedDataParallel" in text
        assert "no_sync()" in text


def test_a_forward_pass_without_gradients_leaves_sums_unreduced(cluster: Cluster) -> None:
    first, second = cluster.run(2, "accumulation:looked_at_between", name=OPT)
    assert first == second


@pytest.mark.parametrize("when", ["anew", "later"])
def test_sums_of_a_model_that_is_wrapped_anew_or_later_are_reduced(cluster: Cluster, when: str) -> None:
    first, second = cluster.run(2, f"accumulation:wrapped_{when}", name=OPT)
    assert first == second


@pytest.mark.parametrize("is_earlier", [False, True])
def test_sums_of_unsynchronized_parts_are_refused_inside_join(cluster: Cluster, is_earlier: bool) -> None:
    for text, first_moment in cluster.run(2, "accumulation:joined_sums", name=OPT, is_earlier=is_earlier):
        assert "Leave no_sync() out" in text
        # A tenth of the gradient, which is 2.
        assert first_moment == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1 original parameters"])
def test_scaled_sums_of_split_parameters_need_a_process_group(cluster: Cluster, kind: str) -> None:
    arguments = {"kind": kind, "name": OPT}
    for text, scales, _ in cluster.run(2, "accumulation:scaled_sums", has_group=False, **arguments):
        assert "process_group=model.process_group" in text
        assert not scales
    expected = "accepted", [16.0, 8.0, 8.0], [True, False, True]
    assert cluster.run(2, "accumulation:scaled_sums", has_group=True, **arguments) == [expected] * 2
    assert cluster.run(1, "accumulation:scaled_sums", has_group=False, **arguments) == [expected]


@pytest.mark.parametrize("is_last_synchronized", [False, True])
@pytest.mark.parametrize("n_processes", [2, 3])
def test_replicas_agree_on_parameters_that_only_some_use(
    cluster: Cluster, n_processes: int, is_last_synchronized: bool
) -> None:
    arguments = {"name": OPT, "is_last_synchronized": is_last_synchronized}
    results = cluster.run(n_processes, "accumulation:partly_used", **arguments)
    for values, expected, gradients in results:
        assert values == results[0][0]
        # Nobody uses the first, and PyTorch would leave it alone too.
        assert values[0] == 1.0
        assert gradients == [None, *map(pytest.approx, expected[1:])]


@pytest.mark.parametrize("n_processes", [2, 4])
def test_replicas_learn_gradients_that_one_of_their_group_has(cluster: Cluster, n_processes: int) -> None:
    results = cluster.run(n_processes, "accumulation:used_by_one", name=OPT)
    for rank, gradients in enumerate(results):
        size = 1 + rank % (n_processes // 2)
        assert gradients == pytest.approx([size, size / 2, size / 2])


def test_sums_of_which_others_have_parts_are_not_saved(cluster: Cluster) -> None:
    for texts in cluster.run(2, "accumulation:saved_in_part", name=OPT):
        assert len(texts) == 2
        assert all("Call step() first" in text for text in texts)


@pytest.mark.parametrize("placement", ["replicate", "shard"])
@pytest.mark.parametrize("n_processes", [2, 3])
def test_sums_of_partial_gradients_are_those_of_all_processes(
    cluster: Cluster, n_processes: int, placement: str
) -> None:
    results = cluster.run(n_processes, "accumulation:partial_sums", name=OPT, placement=placement)
    for summed, accumulated in results:
        assert summed == pytest.approx(accumulated, abs=TOLERANCE)
        assert summed == results[0][0]
