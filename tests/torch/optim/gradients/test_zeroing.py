"""Gradients that are set to zero, and whose parameters are Dragon's."""

import pytest
import torch

from dragon.vm import torch as dragon
from dragon.vm.torch.optim._gradients.zeroing import apart, are_dragon, zero_all


def test_gradients_are_cut_from_their_graphs_wherever_only_some_have_one():
    leaf = torch.ones(2, requires_grad=True)
    # Part of other memory cannot be detached as others are.
    grads = [leaf * 2, torch.ones(2), torch.ones(4)[:2].requires_grad_()]
    zero_all(grads)
    assert not any(grad.requires_grad or grad.any() for grad in grads)


def test_none_and_mixed_parameters_are_not_dragons():
    plain, own = torch.nn.Parameter(torch.ones(1)), dragon.nn.Parameter(dragon.ones(1))
    cases = [[], [own], [own, plain], [plain, own]]
    assert list(map(are_dragon, cases)) == [False, True, False, False]


@pytest.mark.parametrize("positions", [[0, 1, 2], [0, 1]])
def test_what_is_set_apart_stays_in_the_sequence_that_was_given(positions):
    shared = torch.ones(2)
    grads = [shared, shared, torch.ones(2)]
    found = apart(grads, positions)
    assert grads[1] is shared
    assert found[0] is shared
    assert found[1].data_ptr() != shared.data_ptr()
    assert torch.equal(found[1], shared)


def test_the_longest_of_several_stays_and_so_does_what_has_no_memory():
    base, empty = torch.ones(4), torch.empty(0)
    grads = [base[:2], base, base[:3], empty, empty]
    found = apart(grads, range(5))
    assert [each is grad for each, grad in zip(found, grads, strict=True)] == [False, True, False, True, True]


def test_conjugated_and_negated_gradients_are_zeroed_with_the_others():
    base = torch.full((2,), 1 + 2j)
    zero_all([base.conj(), torch.ones(2)])
    assert not base.any()
    base = torch.full((2,), 1 + 2j)
    negated = base.conj().imag
    assert negated.is_neg()
    zero_all([negated, torch.ones(2)])
    assert base.tolist() == [1, 1]
