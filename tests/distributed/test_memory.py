"""Memory modes give every process the bits of one, also released, skipped, summed, saved and resharded."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from .cluster import Cluster

OPT = os.environ.get("OPT", "native")
IS_SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
BOTH = "split8, 8bit, amsgrad, average"
MODES = [
    "8bit",
    "split8, 8bit",
    BOTH,
    "bf16 stochastic, bf16 states",
    "split16, bf16 states",
    "fp32 masters, 8bit",
]
# Without random words, where columns are cut too.
TO_NEAREST = ["split8, 8bit to nearest", "split16"]
CASES = [("ddp", 2), ("fsdp2", 3), ("fsdp2 hsdp", 4), ("fsdp2 offload", 2), ("tp", 3), ("fsdp2 and tp", 4)]
# Their shards are those of others: a mode for each way to round and to keep masters is enough.
LIKE_OTHERS = () if IS_SOAK else ("ddp", "fsdp2 hsdp", "fsdp2 offload")
SOME = [BOTH, "bf16 stochastic, bf16 states", "fp32 masters, 8bit", "split16"]


@pytest.mark.parametrize(("kind", "n_processes"), CASES)
def test_modes_have_the_bits_of_one_process(cluster: Cluster, kind: str, n_processes: int) -> None:
    modes = SOME if kind in LIKE_OTHERS else [*MODES, *TO_NEAREST]
    arguments = {"modes": modes, "kind": kind, "name": OPT}
    for found in cluster.run(n_processes, "memory:all_trained_as_alone", **arguments):
        assert {mode: keys for mode, keys in found.items() if keys} == {}


@pytest.mark.parametrize(
    ("mode", "options"), [(BOTH, {}), ("bf16 stochastic, bf16 states", {"release_gradients": True})], ids=str
)
def test_interpreted_kernels_have_the_bits_of_one_process(
    cluster: Cluster, mode: str, options: dict[str, Any]
) -> None:
    arguments = {"kind": "fsdp2", "mode": mode, "name": "triton", **options}
    assert cluster.run(2, "memory:trained_as_alone", **arguments) == [[], []]


@pytest.mark.parametrize(("kind", "n_processes"), [("fsdp2", 1), ("fsdp2", 3), ("tp", 2), ("fsdp2 and tp", 4)])
def test_released_gradients_leave_the_bits_of_one_process(cluster: Cluster, kind: str, n_processes: int) -> None:
    arguments = {"modes": MODES[2:], "kind": kind, "name": OPT, "release_gradients": True}
    for found in cluster.run(n_processes, "memory:all_trained_as_alone", **arguments):
        assert {mode: keys for mode, keys in found.items() if keys} == {}


@pytest.mark.parametrize("mode", [BOTH, "fp32 masters, 8bit"])
@pytest.mark.parametrize(("kind", "n_processes"), [("fsdp2", 2), ("fsdp2", 3), ("tp", 2)])
def test_a_step_that_one_process_cannot_take_changes_no_bit(
    cluster: Cluster, kind: str, n_processes: int, mode: str
) -> None:
    for name in (OPT, "triton") if n_processes == 2 and kind == "fsdp2" else (OPT,):
        results = cluster.run(n_processes, "memory:skipped", kind=kind, mode=mode, name=name)
        assert results == [([], 1)] * n_processes


@pytest.mark.parametrize("mode", [BOTH, "bf16 stochastic, bf16 states"])
@pytest.mark.parametrize(("kind", "n_processes"), [("fsdp2", 3), ("ddp", 2)])
def test_summed_gradients_leave_the_bits_of_one_process(
    cluster: Cluster, kind: str, n_processes: int, mode: str
) -> None:
    assert cluster.run(n_processes, "memory:summed", kind=kind, mode=mode, name=OPT) == [[]] * n_processes


@pytest.mark.parametrize("mode", ["split16", "split8, 8bit", "fp32 masters, 8bit"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 offload"])
def test_a_write_to_a_parameter_makes_it_its_own_master(cluster: Cluster, kind: str, mode: str) -> None:
    events = [["write", 0.5], ["step", 1, []], ["load", "fresh"], ["write", -2.0], ["step", 2, []]]
    arguments = {"kind": kind, "mode": mode, "name": OPT, "options": {}, "events": events, "n_late": 0}
    assert cluster.run(2, "soak:interleaved", **arguments) == [[], []]


@pytest.mark.parametrize(
    ("kind", "modes", "loaders"),
    [("fsdp2", [BOTH, "split16", "fp32 masters, 8bit"], (1, 3)), ("fsdp2 and tp", TO_NEAREST, (2, 4))],
)
def test_a_checkpoint_of_two_processes_goes_on_bit_by_bit_on_any_number(
    cluster: Cluster, tmp_path: Path, kind: str, modes: list[str], loaders: tuple[int, ...]
) -> None:
    arguments = {"kind": kind, "modes": modes, "folder": str(tmp_path), "name": OPT}
    cluster.run(2, "memory_checkpoints:save", **arguments)
    resumed = []
    # Each form of a mode is loaded once; each mode and each form on every number of processes.
    for part, n_processes in enumerate(loaders):
        parts = [0, 1] if IS_SOAK else [part]
        for found in cluster.run(n_processes, "memory_checkpoints:resume", parts=parts, **arguments):
            assert set(map(tuple, found.values())) == {()}, found
        resumed += found
    assert len({*resumed}) == 3 * len(modes)


@pytest.mark.parametrize(("kind", "n_processes"), [("fsdp2", 3), ("tp", 2)])
def test_full_dicts_go_on_bit_by_bit(cluster: Cluster, kind: str, n_processes: int) -> None:
    arguments = {"kind": kind, "modes": [BOTH, "split16", "8bit"], "name": OPT}
    for found in cluster.run(n_processes, "memory_checkpoints:whole_dicts", **arguments):
        assert len(found) == 6
        assert set(map(tuple, found.values())) == {()}, found


OTHERS = [("8bit", "bf16 states"), ("split16", "split8, 8bit"), ("split8, 8bit", "bf16 stochastic, 8bit")]


@pytest.mark.parametrize(
    ("source", "target", "saver", "loader"),
    [
        *((*pair, OPT, OPT) for pair in OTHERS),
        *((mode, mode, "torch", OPT) for mode in ("8bit", "bf16 states", "bf16 stochastic, 8bit")),
        *((mode, mode, OPT, "torch") for mode in ("8bit", "bf16 states", "split16")),
    ],
)
def test_dcp_passes_states_on_to_other_modes_and_to_torch(
    cluster: Cluster, tmp_path: Path, source: str, target: str, saver: str, loader: str
) -> None:
    folder = str(tmp_path)
    cluster.run(2, "memory_checkpoints:save_one", kind="fsdp2", mode=source, folder=folder, name=saver)
    arguments = {"kind": "fsdp2", "source": source, "target": target, "folder": folder}
    for found in cluster.run(2, "memory_checkpoints:load_in_other_mode", saver=saver, loader=loader, **arguments):
        assert found == []


def test_masters_that_a_file_lacks_are_the_weights_of_the_file(cluster: Cluster, tmp_path: Path) -> None:
    folder = str(tmp_path)
    cluster.run(2, "memory_checkpoints:save_one", kind="fsdp2", mode="split16", folder=folder, name="torch")
    for mode in ("split16", "split8, 8bit", "fp32 masters, 8bit"):
        arguments = {"kind": "fsdp2", "mode": mode, "folder": folder, "name": OPT}
        assert cluster.run(2, "memory_checkpoints:masters_of_a_partial_load", **arguments) == [0, 0]


@pytest.mark.parametrize("mode", ["fp32 masters, 8bit", "fp32 masters of fp16"])
@pytest.mark.parametrize("kind", ["fsdp2", "tp"])
def test_weights_that_are_loaded_in_place_become_masters(
    cluster: Cluster, tmp_path: Path, kind: str, mode: str
) -> None:
    arguments = {"kind": kind, "mode": mode, "folder": str(tmp_path), "name": OPT}
    assert cluster.run(2, "memory_checkpoints:loaded_in_place", **arguments) == [(0, 0)] * 2


@pytest.mark.parametrize("mode", ["8bit", "bf16 states", "split16"])
def test_flat_dicts_in_pytorchs_form_are_refused(cluster: Cluster, mode: str) -> None:
    (text,) = cluster.run(1, "memory_checkpoints:flat_dict", kind="fsdp2", mode=mode)
    assert "flatten_optimizer_state_dict=True with" in text
    assert "native_state_dict=True" in text


@pytest.mark.parametrize("n_processes", [1, 2])
def test_wrappers_that_write_parameters_leave_masters_alone(cluster: Cluster, n_processes: int) -> None:
    for kind, mode in product(("zero", "fsdp1", "fsdp1 original parameters"), ("split16", "split8, 8bit")):
        if kind != "zero" and "8bit" in mode:
            mode = "fp32 masters of fp16" if n_processes == 1 else "split16, bf16 states"
        for n_lost, n_kept in cluster.run(n_processes, "memory:hidden_masters", kind=kind, mode=mode, name=OPT):
            assert n_lost == 0
            assert n_kept > 100


@pytest.mark.parametrize("is_original", [False, True])
def test_8_bits_of_pieces_without_rows_are_refused(cluster: Cluster, is_original: bool) -> None:
    for asked in ("8bit", {"exp_avg": "8bit"}):
        arguments = {"options": {"state_dtype": asked}, "is_original": is_original}
        for text in cluster.run(2, "memory:under_fsdp1", **arguments):
            assert f"state_dtype={asked!r}" in text
            assert "fully_shard" in text
        assert cluster.run(1, "memory:under_fsdp1", **arguments) == ["accepted"]


@pytest.mark.parametrize("n_processes", [1, 2])
def test_zero_resumes_every_mode_bit_by_bit(cluster: Cluster, n_processes: int) -> None:
    arguments = {"modes": ["split16", "split8, 8bit", "fp32 masters, 8bit", BOTH, "8bit"], "name": OPT}
    for found in cluster.run(n_processes, "memory_checkpoints:resumed_by_zero", **arguments):
        assert len(found) == 10
        assert set(map(str, found.values())) == {"(True, [])"}, found
