"""Norms, skipped steps and scalers hold for all processes that share a model."""

import math
import os
from itertools import product

import pytest

from .cluster import Cluster
from .wrappers import WRAPPERS

# 4 steps of lr 0.02 or fewer, each within a few eps of PyTorch's: eps(float32) is 1.2e-7.
TOLERANCE = 2e-6
# PyTorch rounds the norm of bf16 gradients to bf16.
ROUNDED = ["fsdp2 bf16"]
# PyTorch's clip_grad_norm_ cannot mix meshes with plain parameters.
MIXED = ["fsdp2 ignored", "tp"]
SQUARE = ["fsdp2 hsdp", "fsdp2 and tp"]
SHARDED = ["fsdp1", "fsdp2", "fsdp2 ignored", "sp"]
CLIPPED = [*product(set(WRAPPERS) - {*MIXED, *ROUNDED, "sp"}, [1, 3]), *product(SQUARE, [4])]


@pytest.fixture(params=[os.environ.get("OPT", "native")])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("kind", "n_processes"), sorted(CLIPPED))
def test_clipping_is_that_of_torch(cluster: Cluster, name: str, kind: str, n_processes: int) -> None:
    results = cluster.run(n_processes, "steps:clipped_as_with_torch", kind=kind, name=name)
    assert max(difference for difference, _ in results) <= TOLERANCE
    assert all(norms == results[0][1] for _, norms in results)


@pytest.mark.parametrize(
    ("kind", "n_processes", "norm_type"),
    [*product(["ddp", "fsdp2", "sp", *MIXED], [3], [2.0, math.inf]), *product(SQUARE, [4], [2.0])],
)
def test_clipping_is_that_of_one_process(
    cluster: Cluster, name: str, kind: str, n_processes: int, norm_type: float
) -> None:
    results = cluster.run(n_processes, "steps:clipped_as_alone", kind=kind, name=name, norm_type=norm_type)
    assert max(difference for difference, _ in results) <= TOLERANCE
    assert all(norms == results[0][1] for _, norms in results)


@pytest.mark.parametrize(("kind", "n_processes"), [*product(["fsdp2", "sp", *MIXED], [3]), *product(SQUARE, [4])])
def test_each_tensors_norm_is_that_of_one_process(
    cluster: Cluster, name: str, kind: str, n_processes: int
) -> None:
    differences = cluster.run(n_processes, "steps:clipped_by_tensor_as_alone", kind=kind, name=name)
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "n_processes"), [*product(["fsdp1", "fsdp2", *MIXED], [3]), *product(SQUARE, [4])]
)
def test_all_processes_skip_a_step_in_which_one_has_an_infinity(
    cluster: Cluster, name: str, kind: str, n_processes: int
) -> None:
    for options in ({}, {"clip_norm": 1.0}) if kind != "fsdp1" else ({},):
        found = cluster.run(n_processes, "steps:skipped", kind=kind, name=name, **options)
        assert found == [[0, 1, 1, 2]] * n_processes


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e9}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("n_processes", [2, 3])
def test_a_scaler_skips_on_all_processes(
    cluster: Cluster, name: str, n_processes: int, options: dict[str, float]
) -> None:
    results = cluster.run(n_processes, "steps:scaled", kind="fsdp2", name=name, **options)
    assert max(difference for difference, _ in results) <= TOLERANCE
    assert len({scale for _, scale in results}) == 1


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_scalers_of_a_process_group_do_the_same(
    cluster: Cluster, name: str, n_processes: int, options: dict[str, float]
) -> None:
    results = cluster.run(n_processes, "steps:scaled_apart", name=name, has_missing=n_processes > 1, **options)
    for rank, (scales, changes, is_left) in enumerate(results):
        assert scales == [16.0, 8.0, 8.0, 8.0]
        assert changes == [True, False, rank > 0 or n_processes == 1, True]
        assert not is_left


@pytest.mark.parametrize("n_processes", [2, 3])
def test_gradients_that_were_unscaled_before_processes_agreed_are_refused(
    cluster: Cluster, name: str, n_processes: int
) -> None:
    results = cluster.run(n_processes, "steps:unscaled_apart", name=name, case="finite")
    assert results == [("accepted", True)] * n_processes
    results = cluster.run(n_processes, "steps:unscaled_apart", name=name, case="sharded")
    assert results == [("accepted", False)] * n_processes
    for case in ("infinite", "missing"):
        for text, has_changed in cluster.run(n_processes, "steps:unscaled_apart", name=name, case=case):
            assert "process_group. Leave unscale_() out" in text or "ShardedGradScaler" in text
            assert not has_changed


NORMS = [{"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "norm_type": math.inf}, {"skip_nonfinite": True}]


@pytest.mark.parametrize("options", [{}, *NORMS, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_a_step_costs_one_small_collective_and_only_for_a_norm(
    cluster: Cluster, name: str, kind: str, options: dict[str, float]
) -> None:
    for collectives, _, n_params in cluster.run(2, "steps:counted", kind=kind, name=name, **options):
        # The gradient of a norm layer under sequence parallelism is a summand: each is summed first.
        sums = [nbytes for operation, nbytes in collectives if operation == "allreduce_"]
        assert len(sums) == (bool(options) and kind != "ddp")
        assert max(sums, default=0) <= (8 * (1 + n_params) if "clip_norm" in options else 64)
        assert len(collectives) - len(sums) == 2 * (kind == "sp")


@pytest.mark.parametrize("options", [{}, *NORMS, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_a_norm_makes_no_step_wait_for_the_device(cluster: Cluster, kind: str, options: dict[str, float]) -> None:
    for _, waits, _ in cluster.run(2, "steps:counted", kind=kind, name="triton", **options):
        assert waits == []


@pytest.mark.parametrize("n_processes", [2, 3])
def test_a_process_without_gradients_takes_part(cluster: Cluster, name: str, n_processes: int) -> None:
    results = cluster.run(n_processes, "steps:without_gradients", name=name)
    assert [norm for norm, _ in results] == [math.sqrt(36 * (n_processes - 1))] * n_processes


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_norm_is_that_of_parameters_as_they_are_placed_now(cluster: Cluster, backend: str) -> None:
    assert cluster.run(2, "steps:placed_anew", name=backend) == [pytest.approx([math.sqrt(6)] * 2)] * 2


@pytest.mark.parametrize("grouped", [False, True])
def test_scalers_agree_on_gradients_of_several_placements_within_a_process_group(
    cluster: Cluster, name: str, grouped: bool
) -> None:
    found = cluster.run(2, "steps:scaled_with_other_placements", name=name, grouped=grouped)
    assert [skipped for _, skipped in found] == [1, 1]
    if grouped:
        # Else PyTorch's scaler asks no other process, for the first gradient is replicated.
        assert [scale for scale, _ in found] == [2.0, 2.0]


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_process_without_gradients_knows_the_norm_of_clipped_tensors(cluster: Cluster, name: str) -> None:
    found = cluster.run(2, "steps:clipped_without_gradients", name=name)
    # Three of five elements are on the first process; the second group's gradients count twice.
    assert found == [[pytest.approx(math.sqrt(25) / 2), pytest.approx(math.sqrt(10) / 2), 0.0]] * 2


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_process_without_gradients_skips_as_the_others(cluster: Cluster, backend: str, norm_type: float) -> None:
    for scenario in ("scaled_without_gradients", "infinite_without_gradients"):
        found = cluster.run(2, f"steps:{scenario}", name=backend, norm_type=norm_type)
        assert found == [[0, 1]] * 2


@pytest.mark.parametrize("options", [*NORMS, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize(("n_processes", "backend"), [(3, "native"), (2, "triton")])
def test_other_gradients_at_each_step_change_no_bit(
    cluster: Cluster, backend: str, n_processes: int, options: dict[str, float]
) -> None:
    results = cluster.run(n_processes, "steps:other_gradients_each_step", name=backend, **options)
    assert max(results) > 2


@pytest.mark.parametrize("size", [1e-150, 1e150, 1e200])
@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_squares_overflow_where_those_of_one_process_and_of_torch_do(
    cluster: Cluster, name: str, n_processes: int, size: float
) -> None:
    for backend in (name, "triton"):
        results = cluster.run(n_processes, "steps:extreme", name=backend, size=size)
        expected = math.sqrt(21) * size if size < 1e154 else math.inf
        assert [ours for ours, _ in results] == pytest.approx([expected] * n_processes, rel=1e-14, abs=0)
        assert [theirs for _, theirs in results] == pytest.approx([expected] * n_processes, rel=1e-14, abs=0)


def test_a_distributed_parameter_costs_no_more_calls_than_a_plain_one(cluster: Cluster, name: str) -> None:
    counts = {
        (is_distributed, n_params): cluster.run(
            2, "steps:calls_of_a_step", name=name, n_params=n_params, is_distributed=is_distributed
        )[0]
        for is_distributed in (False, True)
        for n_params in (50, 400)
    }
    # Once more for shards, whatever their number.
    assert counts[True, 400] <= counts[False, 400] + 100, counts
    assert counts[True, 400] <= counts[True, 50] + 100, counts


@pytest.mark.parametrize("n_empty", [0, 1])
@pytest.mark.parametrize("n_processes", [2, 3])
def test_a_process_without_elements_keeps_the_scale_of_the_others(
    cluster: Cluster, name: str, n_processes: int, n_empty: int
) -> None:
    first, *others = cluster.run(n_processes, "steps:scaled_beside_nothing", name=name, n_empty=n_empty)
    assert first == [16.0, 8.0, 8.0, 2.0]
    assert others == [[16.0, 8.0, 8.0, *[2.0] * n_empty]] * (n_processes - 1)
