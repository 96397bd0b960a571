"""The search finds what is planted, keeps the default among equals, and is done in time."""

import math
import random
from collections.abc import Sequence

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning.candidates import refinements, shapes
from dragon.vm.tuning.search import FEWEST_PAIRS, FINAL_REPETITIONS, SMALLEST_GAIN, Decision, Search, compare

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


def search(bench: PlantedBench, limit: float = 1e9) -> Decision:
    return Search(bench, DEFAULT, bench.clock, limit).run(shapes(32))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_the_planted_optimum_is_found_under_noise(noise: float, seed: int) -> None:
    result = search(PlantedBench(bowl, noise, seed=seed))
    assert result.config is not None
    assert bowl(result.config) <= 1.06 if noise == 0.05 else result.config == PLANTED
    assert result.outcomes[result.config] == "winner"
    assert result.reason.startswith("+")


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_the_default_stays_among_equals(noise: float) -> None:
    chosen = [search(PlantedBench(flat, noise, seed=seed)).config for seed in range(25)]
    assert chosen.count(DEFAULT) >= 24


def test_a_default_that_is_the_optimum_stays() -> None:
    result = search(PlantedBench(lambda config: 1.0 if config == DEFAULT else 1.3, 0.05))
    assert result.config == DEFAULT
    assert result.outcomes[DEFAULT] == "default"
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
    assert result.reason == "the default is wrong: planted"


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
    assert "decided nothing" in result.reason


@pytest.mark.parametrize("limit", [0.0, 40.0, 60.0, 80.0, 200.0])
def test_what_does_not_end_in_time_is_not_begun_and_not_reached(limit: float) -> None:
    bench = PlantedBench(bowl, clock=Clock(), launch_seconds=1.0)
    result = search(bench, limit)
    # How long a repetition takes the first one shows.
    assert bench.clock.now <= max(limit, 1.0 + len(shapes(32)))
    for config, outcome in result.outcomes.items():
        assert config == DEFAULT or (outcome == "not reached") == (not result.times(config))


def test_every_repetition_times_the_default_and_each_rival_once() -> None:
    result = search(PlantedBench(bowl, 0.05))
    assert all(DEFAULT in times for times in result.repetitions)
    assert set(result.outcomes) >= {config for times in result.repetitions for config in times}


def test_the_default_has_no_place_of_its_own_in_the_order() -> None:
    places: set[int] = set()

    class Ordered(PlantedBench):
        def time_ms(self, configs: Sequence[LaunchConfig]) -> list[float]:
            places.add(configs.index(DEFAULT))
            return super().time_ms(configs)

    search(Ordered(bowl))
    assert len(places) > 3


def test_the_final_goes_on_while_there_is_time_for_one_more_repetition() -> None:
    bench = PlantedBench(bowl, clock=Clock(), launch_seconds=1.0)
    result = search(bench, limit=200.0)
    assert 0 < len(result.finals) < FINAL_REPETITIONS
    assert 200.0 - len(result.finals[0]) < bench.clock.now <= 200.0


def noisy_pairs(gain: float, noise: float, seed: int, n_pairs: int = 41) -> list[tuple[float, float]]:
    generator = random.Random(seed)
    return [(generator.gauss(1, noise), (1 - gain) * generator.gauss(1, noise)) for _ in range(n_pairs)]


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.1])
def test_equals_are_almost_never_told_apart(noise: float) -> None:
    real = sum(compare(noisy_pairs(0.0, noise, seed)).is_real for seed in range(500))
    assert real <= 3


def test_a_gain_of_thrice_the_noise_is_found_nearly_always() -> None:
    assert sum(compare(noisy_pairs(0.06, 0.02, seed)).is_real for seed in range(200)) >= 195


def test_a_gain_that_is_certain_but_tiny_is_not_worth_it() -> None:
    assert not compare([(1.0, 1.0 - SMALLEST_GAIN / 2)] * 100).is_real


@pytest.mark.parametrize("n_pairs", range(FEWEST_PAIRS))
def test_few_pairs_decide_nothing(n_pairs: int) -> None:
    assert not compare([(1.0, 0.1)] * n_pairs).is_real


def test_a_drift_that_both_share_is_no_noise() -> None:
    pairs = [(drift, 0.9 * drift) for drift in (1.0, 3.0, 2.0, 9.0, 5.0) * 4]
    assert compare(pairs).is_real
    assert compare(pairs).noise == pytest.approx(0, abs=1e-12)


def test_the_refinements_of_a_shape_are_all_others_with_it() -> None:
    shape = LaunchConfig(chunk=2048)
    found = list(refinements(shape))
    assert len(found) == len(set(found)) > 10
    assert shape not in found
    assert {(config.chunk, config.n_warps) for config in found} == {(2048, 4)}


def test_a_check_begins_only_where_its_share_of_the_time_holds_one_as_long() -> None:
    bench = PlantedBench(bowl, check_seconds=4.0)
    result = search(bench, limit=100.0)
    # Of the shapes' 40 seconds, 4 are the default's check, and 0.8 of the others end before 32.8.
    assert [result.outcomes[shape] for shape in shapes(32) if shape != DEFAULT].count("not reached") == (
        len(shapes(32)) - 1 - 7
    )


def test_half_of_the_shapes_leave_after_each_round_which_is_twice_as_long() -> None:
    n_shapes, seen = len(shapes(32)), search(PlantedBench(bowl)).repetitions
    sizes = [len(times) - 1 for times in seen]
    halves = [n_shapes - 1, math.ceil((n_shapes - 1) / 2)]
    assert sizes[:9] == [halves[0]] * 3 + [halves[1]] * 6


def test_shapes_that_were_never_timed_are_not_refined() -> None:
    class SlowOnce(PlantedBench):
        def check(self, config: LaunchConfig) -> str | None:
            self.check_seconds = 50.0 if config == shapes(32)[0] else 0.0
            return super().check(config)

    bench = SlowOnce(bowl)
    result = search(bench, limit=100.0)
    assert {config.chunk for config in bench.timed} == {DEFAULT.chunk}
    assert result.repetitions


def test_the_times_of_a_finalist_are_those_of_the_final() -> None:
    result = search(PlantedBench(bowl))
    assert result.times(PLANTED) == [times[PLANTED] for times in result.finals]
    assert len(result.repetitions) > len(result.finals) > 0
