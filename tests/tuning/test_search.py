"""The search finds what is planted, keeps the default among equals, and is done in time."""

import math
from collections.abc import Callable, Sequence

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning.candidates import refinements, shapes
from dragon.vm.tuning.search import DEFAULT_OUTCOME, Search, SearchResult, Standing

from .support import DEFAULT, Clock, PlantedBench

PLANTED = LaunchConfig(chunk=4096, n_warps=8, eviction="evict_first", programs_per_processor=4)


def bowl(config: LaunchConfig) -> float:
    """Times with one valley: a shape is worth 20 % a step, a hint or a grid 5 %."""
    away = abs(math.log2(config.chunk / PLANTED.chunk)) + abs(math.log2(config.n_warps / PLANTED.n_warps))
    wrong = (config.eviction != PLANTED.eviction) + (config.n_stages != PLANTED.n_stages)
    grid = abs(config.programs_per_processor - PLANTED.programs_per_processor) / 4
    return 1.2**away * 1.05 ** (wrong + grid)


def flat(config: LaunchConfig) -> float:
    """All configurations are equal."""
    return 1.0


def refine(best: Sequence[LaunchConfig]) -> list[LaunchConfig]:
    return [config for shape in best for config in refinements(shape)]


def search(bench: PlantedBench, limit: float = math.inf, **arguments: object) -> SearchResult:
    return Search(bench, DEFAULT, bench.clock, min(limit, 1e9), **arguments).run(shapes(32), refine)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_the_planted_optimum_is_found_under_noise(noise: float, seed: int) -> None:
    result = search(PlantedBench(bowl, noise, seed=seed))
    assert result.config is not None
    assert bowl(result.config) <= 1.06 if noise == 0.05 else result.config == PLANTED
    assert result.outcomes[result.config] == "winner"
    assert result.gain.is_real


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_the_default_stays_among_equals(noise: float) -> None:
    chosen = [search(PlantedBench(flat, noise, seed=seed)).config for seed in range(25)]
    assert chosen.count(DEFAULT) >= 24


def test_a_default_that_is_the_optimum_stays() -> None:
    result = search(PlantedBench(lambda config: 1.0 if config == DEFAULT else 1.3, 0.05))
    assert result.config == DEFAULT
    assert result.outcomes[DEFAULT] == DEFAULT_OUTCOME
    assert result.reason.startswith("the default stays: best rival -")


def test_a_gain_below_the_noise_is_none() -> None:
    result = search(PlantedBench(lambda config: 0.98 if config == PLANTED else 1.0, 0.3))
    assert result.config == DEFAULT


def test_a_wrong_candidate_is_never_timed_however_fast() -> None:
    bench = PlantedBench(bowl, 0.02, wrong=frozenset({PLANTED}))
    result = search(bench)
    assert PLANTED not in bench.timed
    assert result.outcomes[PLANTED] == "wrong: planted"
    assert result.config not in (None, PLANTED)


def test_a_wrong_default_ends_the_search_before_anything_is_timed() -> None:
    bench = PlantedBench(bowl, wrong=frozenset({DEFAULT}))
    result = search(bench)
    assert result.config is None
    assert bench.timed == set()
    assert result.reason == "the default is wrong: wrong: planted"


@pytest.mark.parametrize("budget", [10.0, 60.0, 600.0])
@pytest.mark.parametrize(
    ("check_seconds", "launch_seconds"), [(0.0, 0.01), (0.5, 0.001), (0.05, 0.02), (0.2, 0.0)]
)
def test_the_search_is_done_in_its_time(budget: float, check_seconds: float, launch_seconds: float) -> None:
    clock = Clock(1000.0)
    bench = PlantedBench(bowl, 0.02, clock=clock, check_seconds=check_seconds, launch_seconds=launch_seconds)
    search(bench, limit=1000.0 + budget)
    assert clock.now - 1000.0 <= 1.1 * budget
    assert bench.n_repetitions > 0


def test_with_little_time_the_default_stays_and_the_reason_says_so() -> None:
    bench = PlantedBench(bowl, clock=Clock(), launch_seconds=1.0)
    result = search(bench, limit=40.0)
    assert result.config == DEFAULT
    assert "decide nothing" in result.reason


@pytest.mark.parametrize("repetition", [1, 5, 20, 60])
def test_an_interrupted_search_keeps_what_it_measured(repetition: int) -> None:
    result = search(PlantedBench(bowl, 0.01, interrupt_at=repetition))
    assert not result.finished
    assert len(result.repetitions) == repetition - 1
    assert result.config is not None
    assert (result.summary(DEFAULT) is None) == (repetition == 1)


def test_what_an_earlier_search_had_lost_is_not_measured_again() -> None:
    first = search(PlantedBench(bowl, 0.01, interrupt_at=25))
    lost = {config: outcome for config, outcome in first.outcomes.items() if outcome.startswith("slower")}
    assert lost
    bench = PlantedBench(bowl, 0.01, seed=1)
    second = search(bench, settled=lost)
    assert second.config == PLANTED
    assert not bench.timed & set(lost)


def test_every_repetition_times_the_default_and_each_rival_once() -> None:
    result = search(PlantedBench(bowl, 0.05))
    assert all(DEFAULT in times for times in result.repetitions)
    assert set(result.outcomes) >= {config for times in result.repetitions for config in times}


def test_the_listener_hears_of_progress_and_of_the_best_so_far() -> None:
    heard: list[Standing] = []
    listener: Callable[[Standing], None] = heard.append
    clock = Clock()
    search(PlantedBench(bowl, 0.0, clock=clock, launch_seconds=0.01), limit=100.0, listener=listener)
    assert [standing.done for standing in heard] == sorted(standing.done for standing in heard)
    assert heard[-1].best == PLANTED
    assert {standing.stage for standing in heard} == {"shapes", "refinements", "final"}
