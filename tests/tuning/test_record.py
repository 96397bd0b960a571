"""What is written can be read, and whatever else a file holds is refused, saying where."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES
from dragon.vm.tuning._fields import RecordError
from dragon.vm.tuning.candidates import EVICTIONS, refinements, shapes
from dragon.vm.tuning.record import ESTIMATED, Summary, Times, Trial, dumps, loads, parse_record

from .support import record

TIMES = st.floats(1e-6, 1e6)
SUMMARIES = st.builds(Summary, TIMES, TIMES, TIMES, st.integers(1, 1000))
SHAPES = shapes(32)
CONFIGS = st.sampled_from([*SHAPES, *(config for shape in SHAPES for config in refinements(shape))])
RECORDS = st.builds(
    record,
    CONFIGS,
    variant=st.sampled_from(list(UPDATES.values())),
    device=st.text(min_size=1, max_size=20),
    finished=st.booleans(),
    times=st.builds(Times, SUMMARIES, SUMMARIES, st.floats(-1, 1), st.floats(0, 1), TIMES, st.integers(1, 2**50)),
    trials=st.lists(st.builds(Trial, CONFIGS, st.text(min_size=1), st.none() | SUMMARIES), max_size=3).map(tuple),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(RECORDS)
def test_a_record_survives_the_way_to_json_and_back(written: Any) -> None:
    assert parse_record(loads(dumps(written.as_json()))) == written


def test_the_file_says_what_a_reader_asks_first() -> None:
    data = record().as_json()
    assert data["schema"] == 1
    assert data["times"]["share_of_copy"] == pytest.approx(0.8 / 0.9)
    assert {"device", "arch", "versions", "kernel_hash", "case", "config"} <= set(data)


def test_an_estimate_has_no_times() -> None:
    estimate = record(basis=ESTIMATED, device="", times=None, trials=())
    assert parse_record(estimate.as_json()) == estimate
    with pytest.raises(RecordError, match="times are present"):
        parse_record(record(basis=ESTIMATED).as_json())


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside of some JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


ORIGINAL = record().as_json()
# What a reader may lack: `share_of_copy` is for people, versions are free, null stands for an absent part.
OPTIONAL = {("times", "share_of_copy"), ("trials", 0, "summary"), ("trials", 1, "summary")}
REQUIRED = [
    path
    for path in places(ORIGINAL)
    if path not in OPTIONAL and path[0] != "versions" and isinstance(path[-1], str)
]


def spoiled(path: tuple[Any, ...], value: Any) -> Any:
    """The record with one value replaced, or removed if the new one is `...`."""
    data = copy.deepcopy(ORIGINAL)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
def test_no_part_can_be_missing_or_of_another_type(path: tuple[Any, ...]) -> None:
    for value in (..., [None], 1e999, {"": 0} if path[0] != "versions" else 0):
        if not (path == ("trials",) and value == []):
            with pytest.raises(RecordError):
                parse_record(spoiled(path, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chunk", 1000),
        ("chunk", 64),
        ("chunk", 2**20),
        ("chunk", True),
        ("chunk", 1024.0),
        ("n_warps", 3),
        ("n_warps", 64),
        ("n_stages", 0),
        ("eviction", "no_allocate"),
        ("programs_per_processor", -1),
    ],
)
def test_a_configuration_that_no_launch_can_take_is_refused(field: str, value: object) -> None:
    with pytest.raises(RecordError, match=f"config.{field}"):
        parse_record(spoiled(("config", field), value))


@pytest.mark.parametrize(("arch", "n_threads"), [("sm_90", 32), ("gfx942", 64), ("gfx1100", 32)])
def test_a_chunk_has_an_element_for_each_thread(arch: str, n_threads: int) -> None:
    for n_warps in (4, 8, 16):
        smallest = record(LaunchConfig(chunk=n_threads * n_warps, n_warps=n_warps), arch=arch, trials=())
        assert parse_record(smallest.as_json()) == smallest
        small = record(LaunchConfig(chunk=n_threads * n_warps // 2, n_warps=n_warps), arch=arch, trials=())
        with pytest.raises(RecordError, match="chunk"):
            parse_record(small.as_json())


@given(JSON)
def test_any_other_json_is_refused_and_raises_nothing_else(data: Any) -> None:
    with pytest.raises(RecordError):
        parse_record(loads(json.dumps(data)))


@pytest.mark.parametrize("text", ["", "{", '{"schema": NaN}', "[" * 100_000, "\0", "__import__('os')"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        loads(text)


def test_all_hints_that_are_tried_can_be_stored() -> None:
    for eviction in EVICTIONS:
        assert parse_record(spoiled(("config", "eviction"), eviction)).config.eviction == eviction
