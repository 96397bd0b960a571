"""Collections are compared by the identity of their tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim._identity import same_tensors

TENSORS = [torch.zeros(()), torch.zeros(()), torch.zeros(1), torch.zeros(3), torch.ones(2, requires_grad=True)]
numbers = st.integers(0, 2) | st.sampled_from([0.5, None, "a"])
leaves = st.sampled_from(TENSORS) | numbers
trees = st.recursive(leaves, lambda of: st.lists(of, max_size=4) | st.dictionaries(numbers, of, max_size=4))


def copied(tree):
    """The same tree in new collections."""
    if isinstance(tree, list):
        return list(map(copied, tree))
    return {key: copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def by_identity(tree):
    if isinstance(tree, list):
        return list(map(by_identity, tree))
    if isinstance(tree, dict):
        return {key: by_identity(value) for key, value in tree.items()}
    return ("tensor", id(tree)) if isinstance(tree, torch.Tensor) else tree


@given(st.lists(trees, max_size=3), st.lists(trees, max_size=3))
def test_trees_are_the_same_if_their_tensors_are(left, right):
    assert same_tensors(left, copied(left))
    assert same_tensors(left, right) == (by_identity(left) == by_identity(right))


@pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros(1), 0, 0.0, np.zeros(3), None])
def test_an_equal_value_is_not_the_same_tensor(other):
    assert not same_tensors([{"step": torch.zeros(())}], [{"step": other}])


def test_what_cannot_be_compared_is_different():
    array = np.zeros(3)
    assert not same_tensors([array], [np.zeros(3)])
    assert same_tensors([array], [array])


def test_nothing_turns_the_comparison_off():
    with torch._C.DisableTorchFunction():
        assert not same_tensors([torch.zeros(())], [torch.zeros(())])
