import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.testing import DENSE_LAYOUTS, tensor_cases
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._groups.layout import same_walk
from dragon.vm.torch.optim._groups.states import CounterPlace, _buffer_of, counter_buffer, step_counters, zeros_for

from ..support import BACKENDS, home, parameters, take_steps

CPU = torch.device("cpu")
HOST = CounterPlace(CPU)


@given(tensor_cases(layouts=DENSE_LAYOUTS), st.sampled_from([torch.bfloat16, torch.float64]))
def test_a_state_is_zero_and_laid_out_as_its_parameter_in_a_storage_of_its_own(case, dtype):
    param = case.build().tensor
    state = zeros_for(param, dtype)
    assert state.dtype == dtype
    assert state.shape == param.shape
    assert same_walk(state, param)
    assert not state.any()
    assert state.storage_offset() == 0
    assert state.untyped_storage().nbytes() == state.nbytes


def test_complex_parameters_keep_their_dtype_in_their_states():
    assert zeros_for(torch.zeros(3, dtype=torch.complex64), torch.float32).dtype == torch.complex64


@given(st.integers(1, 9), st.integers(0, 8), st.integers(0, 8))
def test_counters_that_lie_in_order_are_counted_as_one_tensor(n_counters, start, end):
    counters = step_counters([float(i) for i in range(n_counters)], HOST)
    chosen = counters[start:end]
    if not chosen:
        return
    buffer = counter_buffer(chosen)
    assert buffer is not None
    buffer += 1
    assert [float(counter) for counter in counters] == [i + float(start <= i < end) for i in range(n_counters)]


def test_a_first_step_makes_counters_side_by_side_where_pytorchs_stand():
    ours, theirs = (make(parameters([(3,), (2, 2), ()])) for make in (Adam, torch.optim.Adam))
    for optimizer in (ours, theirs):
        take_steps(optimizer, optimizer.param_groups[0]["params"], [0b111])
    assert [list(state) for state in ours.state.values()] == [list(state) for state in theirs.state.values()]
    assert counter_buffer([state["step"] for state in ours.state.values()]) is not None


def test_each_counter_has_a_storage_of_its_own():
    first, second = step_counters([0.0, 0.0], HOST)
    for counter in (first, second):
        assert counter.storage_offset() == 0
        assert counter.untyped_storage().nbytes() == counter.nbytes
    first += 1
    assert float(second) == 0


def test_counters_of_somebody_else_are_in_no_buffer():
    assert counter_buffer([torch.zeros(()), torch.zeros(())]) is None


def test_a_buffer_ends_where_its_counters_end():
    counters = step_counters([0.0, 0.0], HOST)
    assert counter_buffer([counters[1], torch.zeros(())]) is None


def test_counters_that_were_given_other_memory_are_in_no_buffer():
    pairs = step_counters([0.0, 0.0], HOST), step_counters([0.0, 0.0], HOST)
    # Memory below that of a counter's own buffer, and memory above it.
    for (moved, _), (other, _) in (pairs, pairs[::-1]):
        own = moved.data
        moved.set_(other)
        assert counter_buffer([moved]) is None
        moved.set_(own)
        assert counter_buffer([moved]) is not None


def test_the_memory_of_counters_goes_with_the_last_of_them():
    counters = step_counters([0.0] * 3, HOST)
    buffer = weakref.ref(_buffer_of[counters[0]])
    last = counters.pop()
    counters.clear()
    gc.collect()
    assert buffer() is not None
    last += 1
    assert float(last) == 1
    del last
    gc.collect()
    assert buffer() is None


@pytest.mark.parametrize("for_kernels", [False, True])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_counters_have_the_dtype_that_pytorchs_have_or_kernels_read(default, for_kernels):
    counting = CounterPlace(CPU, for_kernels)
    torch.set_default_dtype(default)
    try:
        (counter,) = step_counters([0.0], counting)
    finally:
        torch.set_default_dtype(torch.float32)
    assert counter.dtype == (torch.float32 if for_kernels else default)
    assert counting.takes(counter)
    assert counting.takes(counter.double()) != for_kernels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.float64])
def test_a_counter_of_any_dtype_counts_on(backend, dtype):
    params = parameters([(3,)] * 2, device=home(backend))
    optimizer = Adam(params, backend=backend)
    take_steps(optimizer, params, [0b11])
    optimizer.state[params[0]]["step"] = torch.tensor(2048, dtype=dtype)
    take_steps(optimizer, params, [0b11, 0b11])
    assert [float(optimizer.state[param]["step"]) for param in params] == [2050, 3]


def test_a_counter_that_requires_a_gradient_is_not_counted_in_place():
    param = torch.ones(3, requires_grad=True).clone()
    optimizer = Adam([param], differentiable=True)
    take_steps(optimizer, [param], [1])
    count = optimizer.state[param]["step"] = torch.tensor(1.0, requires_grad=True)
    take_steps(optimizer, [param], [1])
    assert (float(optimizer.state[param]["step"]), count.item()) == (2, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flatten", [False, True])
def test_parameters_that_were_given_one_counter_count_each_for_itself(backend, flatten):
    params = parameters([(3,)] * 3, device=home(backend))
    optimizer = Adam(params, backend=backend, flatten=flatten)
    take_steps(optimizer, params, [0b111])
    for state in optimizer.state.values():
        state["step"] = optimizer.state[params[0]]["step"]
    take_steps(optimizer, params, [0b111, 0b110, 0b101])
    assert [float(optimizer.state[param]["step"]) for param in params] == [3, 3, 4]
