"""Candidates: which there are, and what the compiler says of them without a device."""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dragon.kernels import inspect
from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning import candidates
from dragon.vm.tuning.candidates import compile_all, compile_verdict, refinements, shapes

from .support import DEFAULT, SPEC


@pytest.mark.parametrize(
    ("warp_size", "inside", "outside"),
    [
        (32, [(512, 4), (1024, 8), (8192, 8), (4096, 4), (2048, 2)], [(512, 8), (8192, 4), (4096, 2)]),
        (64, [(512, 2), (1024, 4), (8192, 4), (4096, 2)], [(512, 4), (1024, 8), (8192, 2)]),
    ],
)
def test_a_thread_has_a_16_byte_access_and_no_more_than_fits_its_registers(
    warp_size: int, inside: list[tuple[int, int]], outside: list[tuple[int, int]]
) -> None:
    found = {(config.chunk, config.n_warps) for config in shapes(warp_size)}
    assert found >= set(inside)
    assert found.isdisjoint(outside)


def test_only_persistent_grids_have_stages_for_their_loop() -> None:
    found = list(refinements(LaunchConfig(chunk=2048)))
    assert {config.n_stages for config in found if config.programs_per_processor} == {1, 2}
    assert {config.n_stages for config in found if not config.programs_per_processor} == {1}


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (SimpleNamespace(spilled_nbytes=8, is_vectorized=True), "spills 8 bytes a thread"),
        (SimpleNamespace(spilled_nbytes=0, is_vectorized=False), "no 16-byte path"),
        (SimpleNamespace(spilled_nbytes=0, is_vectorized=True), None),
        (RuntimeError("out of resource\nmore lines"), "does not compile: RuntimeError: out of resource"),
    ],
    ids=str,
)
def test_the_verdict_is_what_the_compiler_reports_or_raises(
    report: object, verdict: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_update(*arguments: object) -> object:
        if isinstance(report, Exception):
            raise report
        return report

    monkeypatch.setattr(inspect, "compile_update", compile_update)
    assert compile_verdict(SPEC, DEFAULT, "sm_90") == verdict


# Of a module that processes can import: what a verdict does is told by its chunk.
PLANTED_COMPILER = """
import os
import time
from pathlib import Path

FOLDER = Path({folder!r})

def verdict(spec, config, arch):
    (FOLDER / f"began-{{config.n_stages}}").touch()
    if config.chunk == 8192:
        os._exit(1)
    while config.chunk == 4096 and not (FOLDER / "go on").exists():
        time.sleep(0.01)
    return "planted" if config.chunk == 512 else None
"""


@pytest.fixture
def one_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler that crashes or waits, in one process, and the folder in which it tells what it began."""
    (tmp_path / "planted_compiler.py").write_text(PLANTED_COMPILER.format(folder=str(tmp_path)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(candidates, "compile_verdict", importlib.import_module("planted_compiler").verdict)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    yield tmp_path
    del sys.modules["planted_compiler"]


def test_configurations_are_compiled_in_processes_that_may_crash(one_compiler: Path) -> None:
    wanted = [LaunchConfig(chunk=512), LaunchConfig(chunk=1024)]
    assert compile_all(SPEC, wanted, "sm_90", 60.0) == {wanted[0]: "planted", wanted[1]: None}
    crashing = [LaunchConfig(chunk=8192), LaunchConfig(chunk=2048)]
    verdicts = "planted", None, "the compiler died", "the compiler died"
    assert compile_all(SPEC, wanted + crashing, "sm_90", 60.0) == dict(
        zip(wanted + crashing, verdicts, strict=True)
    )
    assert compile_all(SPEC, wanted, "sm_90", 0.0) == dict.fromkeys(wanted, "not compiled in time")


def test_a_slow_compiler_is_not_waited_for_and_begins_nothing_more(one_compiler: Path) -> None:
    slow = [LaunchConfig(chunk=4096, n_stages=number) for number in range(8)]
    assert compile_all(SPEC, slow, "sm_90", 1.0) == dict.fromkeys(slow, "not compiled in time")
    (one_compiler / "go on").touch()
    for process in multiprocessing.active_children():
        process.join(60.0)
    # It had taken the next ones from the queue.
    assert len(list(one_compiler.glob("began-*"))) <= 3


def test_the_compiler_is_against_spills_and_for_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = compile_all(SPEC, [DEFAULT, LaunchConfig(chunk=2048, n_warps=1)], "sm_90", 120.0)
    assert found[DEFAULT] is None
    assert "spills" in str(found[LaunchConfig(chunk=2048, n_warps=1)])
