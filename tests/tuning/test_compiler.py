"""Workers compile for a GPU that is not there, from a process that interprets its kernels, and may die."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES
from dragon.vm.tuning.compiler import Worker, Workers
from dragon.vm.tuning.estimate import estimates, rank_variants
from dragon.vm.tuning.ranking import Facts
from dragon.vm.tuning.record import ESTIMATED
from dragon.vm.tuning.sizes import SIZE_CLASSES

from .support import DEFAULT, GOOD, VARIANT, PlantedCompiler

SUM = UPDATES["accumulate fp32"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with Workers(1) as opened:
            yield opened


def test_a_worker_tells_what_the_compiler_makes_of_a_configuration(workers: Workers) -> None:
    narrow = LaunchConfig(chunk=256, n_warps=4)
    facts = dict(workers.compile(SUM, [DEFAULT, narrow], "sm_90"))
    found = facts[DEFAULT]
    assert isinstance(found, Facts)
    assert (found.spilled_nbytes, found.shared_nbytes, found.is_vectorized) == (0, 0, True)
    # Eight elements a thread, of an accumulator and a gradient of four bytes each.
    assert found.loaded_nbytes == 64
    assert 0 < found.registers < 128
    # Two elements a thread are accesses of eight bytes.
    assert isinstance(facts[narrow], Facts)
    assert not facts[narrow].is_vectorized


def test_what_does_not_compile_is_said_and_the_worker_lives_on(workers: Workers) -> None:
    ((_, reason),) = workers.compile(SUM, [LaunchConfig(chunk=1000)], "sm_90")
    assert isinstance(reason, str)
    assert "Error" in reason
    ((_, facts),) = workers.compile(SUM, [DEFAULT], "sm_90")
    assert isinstance(facts, Facts)


def test_a_worker_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dragon.vm.tuning.compiler.sys.executable", "/bin/false")
    worker = Worker()
    assert worker.ask({}).startswith("the compiler died")
    first = worker._process
    assert worker.ask({}).startswith("the compiler died")
    assert worker._process is not first
    worker.close()


def test_workers_do_not_outlive_their_pool(workers: Workers) -> None:
    with Workers(2) as pool:
        spawned = [worker._running() for worker in pool._workers]
    assert all(process.returncode is not None for process in spawned)


def ranking(compiler: PlantedCompiler) -> list:
    return list(rank_variants({"adam fp32": VARIANT}, "sm_90", compiler, lambda: False))


def test_an_estimate_is_the_default_with_what_the_compiler_says_of_it() -> None:
    (found,) = ranking(PlantedCompiler())
    records = estimates(found, "sm_90")
    assert [record.size for record in records] == list(SIZE_CLASSES)
    assert {(record.basis, record.config, record.times) for record in records} == {(ESTIMATED, DEFAULT, None)}
    assert records[0].reason == "by the compiler alone: 64 registers, no spills, 16-byte accesses"


def test_a_default_that_the_compiler_is_against_is_replaced_by_the_best_candidate() -> None:
    (found,) = ranking(PlantedCompiler({DEFAULT: GOOD._replace(spilled_nbytes=8)}))
    record = estimates(found, "sm_90")[0]
    assert record.config == found.entries[0].config != DEFAULT
    assert record.reason.endswith("; the default spills 8 bytes a thread")


def test_a_ranking_stops_between_variants_when_the_time_is_up() -> None:
    answers = iter([False, True])
    found = list(rank_variants({"a": VARIANT, "b": SUM}, "sm_90", PlantedCompiler(), lambda: next(answers)))
    assert [entry.name for entry in found] == ["a"]
