"""The compiler's facts drop what is not worth timing, and order the rest by memory parallelism."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning.candidates import (
    FEWEST_ELEMENTS,
    MOST_ELEMENTS,
    compiled_form,
    describe,
    refinements,
    shapes,
)
from dragon.vm.tuning.ranking import (
    Facts,
    limits_of,
    nbytes_in_flight,
    rank,
    resident_warps,
    why_dropped,
)

from .support import DEFAULT, GOOD

HOPPER = limits_of("sm_90")
FACTS = st.builds(
    Facts,
    registers=st.integers(16, 255),
    spilled_nbytes=st.sampled_from([0, 0, 0, 8]),
    shared_nbytes=st.sampled_from([0, 0, 0, 1024]),
    is_vectorized=st.sampled_from([True, True, True, False]),
    loaded_nbytes=st.integers(16, 1024),
    instructions=st.floats(5, 60),
)


@pytest.mark.parametrize("warp_size", [32, 64])
def test_shapes_are_distinct_and_give_each_thread_a_vector_but_not_too_many(warp_size: int) -> None:
    found = shapes(warp_size)
    assert len(set(found)) == len(found) >= 10
    for config in found:
        assert FEWEST_ELEMENTS <= config.chunk / (config.n_warps * warp_size) <= MOST_ELEMENTS


def test_refinements_keep_the_shape_and_are_distinct() -> None:
    found = list(refinements(DEFAULT))
    assert len(set(found)) == len(found)
    assert DEFAULT not in found
    assert {(config.chunk, config.n_warps) for config in found} == {(1024, 4)}
    assert len({describe(config) for config in found}) == len(found)
    # Two grids are one kernel, and hints change no register: persistent or not, in one stage or two.
    assert len(set(map(compiled_form, found))) == 3


@pytest.mark.parametrize(
    ("registers", "n_warps", "resident"),
    [(64, 4, 32), (40, 4, 48), (128, 4, 16), (16, 4, 64), (255, 8, 8), (16, 1, 32)],
)
def test_resident_warps_are_those_of_the_occupancy_calculator(registers: int, n_warps: int, resident: int) -> None:
    config = LaunchConfig(chunk=128 * n_warps, n_warps=n_warps)
    assert resident_warps(config, GOOD._replace(registers=registers), HOPPER) == resident


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (GOOD, None),
        (GOOD._replace(spilled_nbytes=16), "spills 16 bytes a thread"),
        (GOOD._replace(is_vectorized=False), "no 16-byte path"),
        (GOOD._replace(shared_nbytes=4096), None),
        (GOOD._replace(shared_nbytes=2**20), "64 registers a thread and 1048576 bytes of shared memory: 0 warps"),
        (GOOD._replace(registers=255), "255 registers a thread and 0 bytes of shared memory: 0 warps"),
    ],
)
def test_what_is_not_worth_timing_is_dropped_for_a_reason(facts: Facts, reason: str | None) -> None:
    config = LaunchConfig(chunk=8192, n_warps=16)
    found = why_dropped(config, facts, HOPPER)
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))


@given(st.lists(FACTS, min_size=14, max_size=14), st.randoms(use_true_random=False))
def test_the_ranking_is_an_order_of_all_candidates_whatever_order_they_came_in(
    drawn: list[Facts], random: object
) -> None:
    configs = shapes(32)
    facts = dict(zip(configs, drawn, strict=True))
    ranked = rank(configs, facts, HOPPER)
    assert sorted(map(describe, (entry.config for entry in ranked))) == sorted(map(describe, configs))
    kept = [entry for entry in ranked if entry.dropped is None]
    assert ranked[: len(kept)] == kept, "what is dropped comes last"
    flights = [nbytes_in_flight(entry.config, entry.facts, HOPPER) for entry in kept]
    assert flights == sorted(flights, reverse=True)
    for entry in ranked:
        assert entry.dropped == why_dropped(entry.config, facts[entry.config], HOPPER)


def test_a_second_stage_that_changes_nothing_is_the_same_code() -> None:
    persistent = LaunchConfig(programs_per_processor=4)
    staged = replace(persistent, n_stages=2)
    facts: dict[LaunchConfig, Facts | str] = {compiled_form(config): GOOD for config in (persistent, staged)}
    dropped = {entry.config: entry.dropped for entry in rank([persistent, staged], facts, HOPPER)}
    assert dropped[persistent] is None
    assert str(dropped[staged]).startswith("the same code as")
    facts[compiled_form(staged)] = GOOD._replace(registers=70)
    assert all(entry.dropped is None for entry in rank([persistent, staged], facts, HOPPER))


def test_what_does_not_compile_is_dropped_and_what_is_not_compiled_is_left_out() -> None:
    other = LaunchConfig(chunk=2048)
    (entry,) = rank([DEFAULT, other], {DEFAULT: "no such instruction"}, HOPPER)
    assert entry == (DEFAULT, None, "does not compile: no such instruction")


def test_shared_memory_bounds_the_resident_programs() -> None:
    # 1 KiB of each program is the driver's.
    facts = GOOD._replace(registers=16, shared_nbytes=18 * 1024)
    assert resident_warps(DEFAULT, facts, HOPPER) == 4 * (228 // 19)


def test_cdna_has_wider_warps_and_fewer_of_them() -> None:
    assert limits_of("gfx942").warp_size == 64
    assert resident_warps(LaunchConfig(chunk=2048), GOOD, limits_of("gfx942")) == 32
    assert resident_warps(LaunchConfig(chunk=2048), GOOD._replace(registers=128), limits_of("gfx942")) == 16
    assert limits_of("sm_89").n_warps == 48
