import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import DENSE_LAYOUTS, tensor_cases
from dragon.vm.torch.optim._groups.layout import same_walk
from dragon.vm.torch.optim._groups.states import ALIGNMENT, arena_views, common_base, step_counters


@given(
    st.lists(tensor_cases(layouts=DENSE_LAYOUTS), min_size=1, max_size=4),
    st.sampled_from([None, torch.bfloat16, torch.float64]),
)
def test_views_of_an_arena_are_zero_aligned_apart_and_laid_out_as_their_parameters(cases, dtype):
    params = [case.build().tensor for case in cases]
    views = arena_views(params, dtype)
    for number, (param, view) in enumerate(zip(params, views, strict=True), 1):
        assert view.dtype == (dtype or param.dtype)
        assert view.shape == param.shape
        assert same_walk(view, param)
        assert view.data_ptr() % ALIGNMENT == 0 or not view.numel()
        assert not view.any()
        view.fill_(number)
    assert all((view == number).all() for number, view in enumerate(views, 1))


def test_complex_parameters_keep_their_dtype_in_an_arena():
    assert arena_views([torch.zeros(3, dtype=torch.complex64)], torch.float32)[0].dtype == torch.complex64


@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 8))
def test_counters_that_lie_in_order_have_a_common_base(n_counters, start, end):
    counters = step_counters(n_counters, torch.device("cpu"))
    chosen = counters[start:end]
    if not chosen:
        return
    base = common_base(chosen)
    assert base is not None
    base += 1
    assert [float(counter) for counter in counters] == [float(start <= i < end) for i in range(n_counters)]


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0, 0]])
def test_other_counters_have_none(order):
    counters = step_counters(3, torch.device("cpu"))
    assert common_base([counters[i] for i in order]) is None
    assert common_base([torch.zeros(()), torch.zeros(())]) is None
