"""A configuration is timed only if one step of it agrees with the reference; planted defects do not pass."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES
from dragon.kernels.spec import Spec
from dragon.vm.measuring.machine import INTERPRETER, Machine
from dragon.vm.tuning import check, scratch
from dragon.vm.tuning.check import check_candidate
from dragon.vm.tuning.scratch import Row, Tables, allocate, chunk_pairs, nbytes_per_element

SMALL = LaunchConfig(chunk=128)


@pytest.fixture
def machine(device: torch.device) -> Machine:
    return INTERPRETER._replace(device=device)


@pytest.mark.parametrize("name", UPDATES)
def test_every_kernel_variant_passes(name: str, machine: Machine) -> None:
    assert check_candidate(UPDATES[name], SMALL, machine) is None


@pytest.mark.parametrize(
    "config",
    [
        LaunchConfig(chunk=512, n_warps=2),
        LaunchConfig(chunk=256, eviction="evict_first"),
        LaunchConfig(chunk=128, programs_per_processor=2),
        LaunchConfig(chunk=256, n_stages=2, programs_per_processor=1),
    ],
)
def test_every_kind_of_configuration_passes(config: LaunchConfig, machine: Machine) -> None:
    assert check_candidate(UPDATES["adam fp32"], config, machine) is None


def zeroed_gradient(spec: Spec, config: LaunchConfig) -> tuple[Spec, LaunchConfig]:
    return replace(spec, zero_grad=True), config


def shorter_chunk(spec: Spec, config: LaunchConfig) -> tuple[Spec, LaunchConfig]:
    """Half of each chunk is left as it was."""
    return spec, LaunchConfig(chunk=config.chunk // 2, n_warps=1)


def longer_chunk(spec: Spec, config: LaunchConfig) -> tuple[Spec, LaunchConfig]:
    """Chunks overlap: elements are updated twice."""
    return spec, LaunchConfig(chunk=config.chunk * 2)


def lost_average(spec: Spec, config: LaunchConfig) -> tuple[Spec, LaunchConfig]:
    return replace(spec, average=None), config


@pytest.mark.parametrize(
    ("defect", "name", "said"),
    [
        (zeroed_gradient, "adam fp32", "grad of tensor 0"),
        (shorter_chunk, "adam fp32", "out of budget"),
        (longer_chunk, "sgd fp32 momentum", "out of budget"),
        (shorter_chunk, "accumulate fp32", "tensor 0 of 145 elements: "),
        (lost_average, "adam fp32 average", "ema of tensor 0"),
    ],
)
def test_a_planted_defect_is_reported(
    defect: Callable[..., Any], name: str, said: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = scratch.update_launcher
    monkeypatch.setattr(
        scratch, "update_launcher", lambda spec, config, *rest: original(*defect(spec, config), *rest)
    )
    reason = check_candidate(UPDATES[name], SMALL, machine)
    assert reason is not None
    assert said in reason


def misaligned_one(rows: Sequence[Row]) -> None:
    """What is misaligned is updated with a wrong learning rate."""
    for row in rows:
        if row.param.data_ptr() % scratch.ALIGNMENT_NBYTES:
            row.param.add_(1e-3)


def last_of_one_element(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.param.numel() == 1:
            row.param.add_(1e-3)


def one_too_many(rows: Sequence[Row]) -> None:
    """The element behind the last one is written to."""
    torch.as_strided(rows[0].states[0], (rows[0].param.numel() + 1,), (1,))[-1] = 0.5


def fails_on_empty(rows: Sequence[Row]) -> None:
    if not all(row.param.numel() for row in rows):
        raise RuntimeError("an empty tensor")


def imprecise_average(rows: Sequence[Row]) -> None:
    """Wrong by some twenty roundings."""
    for row in rows:
        if row.ema is not None:
            row.ema.mul_(1 + 20 * torch.finfo(row.ema.dtype).eps)


@pytest.mark.parametrize(
    ("defect", "name", "said"),
    [
        (misaligned_one, "adam fp32", "tensor 5 of 131 elements"),
        (last_of_one_element, "adam fp32", "tensor 2 of 1 element:"),
        (one_too_many, "adam fp32", "tensor 0 of 145 elements .* past its last"),
        (fails_on_empty, "adam fp32", "RuntimeError: an empty tensor"),
        (imprecise_average, "adam fp32 average", "ema of tensor 0"),
    ],
)
def test_a_defect_of_some_tensors_or_beside_them_is_reported(
    defect: Callable[[Sequence[Row]], None],
    name: str,
    said: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Defective(Tables):
        def launch(self, config: LaunchConfig) -> Callable[[], None]:
            launch = super().launch(config)
            return lambda: (launch(), defect(self._rows))[0]

    monkeypatch.setattr(check, "Tables", Defective)
    assert re.search(said, str(check_candidate(UPDATES[name], SMALL, machine)))


def test_a_launch_that_fails_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("out of resource: registers\nmore lines")

    monkeypatch.setattr(scratch, "update_launcher", fail)
    reason = check_candidate(UPDATES["adam fp32"], SMALL, machine)
    assert reason == "RuntimeError: out of resource: registers"


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("adam fp32", 28),
        ("adam fp32 amsgrad", 36),
        ("adam fp32 average", 36),
        ("adam fp32 zero_grad", 32),
        ("adam bf16", 14),
        ("adam bf16 fp32-state", 22),
        ("sgd fp32", 12),
        ("sgd fp32 momentum", 20),
        ("accumulate fp32", 12),
    ],
)
def test_the_bytes_of_an_element_are_those_of_the_design(name: str, nbytes: int) -> None:
    assert nbytes_per_element(UPDATES[name]) == nbytes


def test_scratch_tensors_are_aligned_and_apart(device: torch.device) -> None:
    rows = allocate(UPDATES["adam bf16 fp32-state"], (1, 17, 0, 100), device)
    tensors = [tensor for row in rows for tensor in row.tensors() if tensor.numel()]
    assert all(tensor.data_ptr() % scratch.ALIGNMENT_NBYTES == 0 for tensor in tensors)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    states = [state for row in rows for state in row.states if state.numel()]
    assert min(float(state.min()) for state in states) >= 0.01 * (1 - 1e-6)


@pytest.mark.parametrize("numels", [(1,), (5, 0, 4, 13), (0,), (4, 4)])
def test_every_element_is_in_exactly_one_chunk(numels: tuple[int, ...]) -> None:
    first, *pairs = chunk_pairs(numels, 4).tolist()
    assert first == [len(pairs), 0]
    assert pairs == [[row, i] for row, numel in enumerate(numels) for i in range(-(-numel // 4))]
