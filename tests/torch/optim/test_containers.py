"""Dicts and lists are watched for whatever may change in them, by what Python keeps of them and by comparison."""

import gc
import weakref
from collections import UserDict, defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dragon.vm.torch.optim import _containers
from dragon.vm.torch.optim._containers import ContainerWatch, container_map

TENSORS = [torch.zeros(()), torch.zeros(()), torch.zeros(2)]
NEW = object()
VALUES = [*TENSORS, 1, 1.0, "a", None]
KEYS = ["a", "b", TENSORS[0]]


@pytest.fixture(params=["read", "compared", "few"])
def way(request, monkeypatch):
    if request.param == "read" and container_map() is None:
        pytest.skip("this Python does not count the changes of a dict")
    if request.param == "compared":
        monkeypatch.setattr(_containers, "container_map", lambda: None)
    if request.param == "few":
        monkeypatch.setattr(_containers, "FEW", 32)
    return request.param


keys, values = st.sampled_from(KEYS), st.sampled_from(VALUES)
dicts = st.lists(st.dictionaries(keys, values, max_size=3), max_size=4)
lists = st.lists(st.lists(values, max_size=4), max_size=4)
dict_changes = st.one_of(
    st.tuples(st.just("__setitem__"), keys, values),
    st.tuples(st.just("pop"), keys, st.none()),
    st.tuples(st.just("setdefault"), keys, values),
    st.tuples(st.just("update"), st.dictionaries(keys, values, max_size=2)),
    st.tuples(st.just("__ior__"), st.dictionaries(keys, values, max_size=2)),
    st.tuples(st.just("clear")),
)
list_changes = st.one_of(
    st.tuples(st.just("append"), values),
    st.tuples(st.just("insert"), st.integers(0, 4), values),
    st.tuples(st.just("extend"), st.lists(values, max_size=40)),
    st.tuples(st.just("__setitem__"), st.just(slice(0, 2)), st.lists(values, max_size=2)),
    st.tuples(st.just("reverse")),
    st.tuples(st.just("clear")),
)


def identities(dicts, lists):
    """What may be compared by value: numbers and strings as they are, tensors as their identity."""

    def of(value):
        return ("tensor", id(value)) if isinstance(value, torch.Tensor) else value

    return [{of(k): of(v) for k, v in d.items()} for d in dicts], [list(map(of, items)) for items in lists]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dicts, lists, st.data())
def test_each_change_is_noticed_and_nothing_else(way, dicts, lists, data):
    watch, then = ContainerWatch(dicts, lists), identities(dicts, lists)
    assert watch.is_unchanged()
    for _ in range(data.draw(st.integers(1, 4))):
        if dicts and data.draw(st.booleans()):
            name, *args = data.draw(dict_changes)
            getattr(data.draw(st.sampled_from(dicts)), name)(*args)
        elif lists:
            name, *args = data.draw(list_changes)
            getattr(data.draw(st.sampled_from(lists)), name)(*args)
        for _ in range(2):
            assert watch.is_unchanged() == (identities(dicts, lists) == then)


def test_what_was_written_back_is_read_again(way, monkeypatch):
    dicts, lists = [{"a": TENSORS[0]}, {}], [[TENSORS[1]], []]
    watch = ContainerWatch(dicts, lists)
    dicts[0]["a"] = TENSORS[1]
    lists[0] *= 100
    assert not watch.is_unchanged()
    dicts[0]["a"] = TENSORS[0]
    del lists[0][1:]
    assert watch.is_unchanged()
    if way == "read":
        monkeypatch.setattr(_containers, "same_tensors", lambda *_: pytest.fail("compared"))
        assert watch.is_unchanged()


def test_an_item_that_died_is_not_taken_for_one_at_its_address(way):
    tensors, state = [torch.zeros(2)], {"a": torch.zeros(2)}
    watch = ContainerWatch([state], [tensors])
    dead = weakref.ref(tensors[0]), weakref.ref(state["a"])
    tensors.clear()
    state.clear()
    gc.collect()
    assert all(tensor() is not None for tensor in dead)
    tensors.append(torch.zeros(2))
    state["a"] = torch.zeros(2)
    assert not watch.is_unchanged()


def test_other_mappings_and_sequences_are_compared(way):
    for other, sequence in ((UserDict(a=1), [2]), ({"a": 1}, (2,)), (defaultdict(int, a=1), [2])):
        watch = ContainerWatch([other], [sequence])
        assert bool(watch._words) is (way == "read" and isinstance(other, dict) and isinstance(sequence, list))
        other["a"] = 3
        assert not watch.is_unchanged()


@pytest.mark.parametrize("search", ["_search_version", "_search_items"])
def test_what_is_not_found_is_compared(search, monkeypatch):
    def fail():
        raise LookupError("not there")

    container_map.cache_clear()
    try:
        monkeypatch.setattr(_containers, search, fail)
        assert container_map() is None
    finally:
        container_map.cache_clear()


@pytest.mark.parametrize("stays", range(len(_containers._CHANGES)))
def test_a_number_that_does_not_follow_every_change_is_not_used(stays, monkeypatch):
    changes = list(_containers._CHANGES)
    changes[stays] = lambda _: None
    monkeypatch.setattr(_containers, "_CHANGES", changes)
    with pytest.raises(LookupError):
        _containers._search_version()


@pytest.mark.parametrize("nested", [{"a": 1}, [1]])
def test_what_was_replaced_by_an_equal_one_goes_on_being_compared(way, nested):
    outer, items = {"nested": nested}, [nested]
    watch = ContainerWatch([outer, nested] if isinstance(nested, dict) else [outer], [items])
    copy = nested.copy()
    outer["nested"] = copy
    assert watch.is_unchanged()
    assert watch.is_unchanged()
    copy.clear()
    assert not watch.is_unchanged()
    outer["nested"] = nested
    assert watch.is_unchanged()
