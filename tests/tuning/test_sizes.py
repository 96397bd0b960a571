"""Size classes and fingerprints depend on the tensors' sizes and on nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.tuning.sizes import CASES, SIZE_CLASSES, fingerprint, size_class

NUMELS = st.lists(st.integers(0, 2**40), max_size=20)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_of_the_class_that_its_results_are_filed_under(name: str) -> None:
    assert size_class(CASES[name].numels) == CASES[name].size == name


def test_the_transformer_has_the_parameters_of_gpt2() -> None:
    # 124,439,808 in 148 tensors, as the model card and transformers count them.
    assert sum(CASES["transformer"].numels) == 124439808
    assert len(CASES["transformer"].numels) == 148


@given(NUMELS, st.randoms(use_true_random=False))
def test_the_order_of_tensors_changes_neither_class_nor_fingerprint(numels: list[int], random: object) -> None:
    shuffled = list(numels)
    random.shuffle(shuffled)
    assert fingerprint(shuffled) == fingerprint(numels)
    assert size_class(shuffled) == size_class(numels)
    assert size_class(numels) in SIZE_CLASSES


@given(NUMELS, NUMELS)
def test_other_sizes_have_another_fingerprint(left: list[int], right: list[int]) -> None:
    assert (fingerprint(left) == fingerprint(right)) == (sorted(left) == sorted(right))
