"""Parameters on several devices: one step, decided once. The devices here are one CPU under two names."""

import math
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._backends import context as context_module
from dragon.vm.torch.optim._backends.context import DeviceContext
from dragon.vm.torch.optim._plan import step

from .support import everything, parameters

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def two_devices(monkeypatch):
    """Put each flattened group on a device of its own."""
    by_device = step._by_device

    def apart(flattened):
        assert len(flattened) == 2
        moved = [
            group._replace(signature=group.signature._replace(device=torch.device("cpu", i)))
            for i, group in enumerate(flattened)
        ]
        return by_device(moved)

    monkeypatch.setattr(step, "_by_device", apart)


def make(**options):
    params = [*parameters([(3,), (5, 2)]), *parameters([(7,)], torch.float64)]
    for param in params:
        param.grad = torch.ones_like(param)
    return Adam(params, backend="triton", **options), params


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("spoilt", [1.0, math.inf])
def test_a_step_on_two_devices_is_the_step_on_one(options, spoilt, zero_grad, request):
    results = []
    for fixture in (None, "two_devices"):
        if fixture:
            request.getfixturevalue(fixture)
        optimizer, params = make(**options)
        for n in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            params[-1].grad[2] = spoilt if n == 1 else 2.0
            optimizer.step(zero_grad=zero_grad)
            assert not zero_grad or not any(param.grad.any() for param in params)
        results.append((optimizer, params))
    assert len(results[1][0]._updater.plans.latest()[-1]._devices) == 2
    (one, params), (two, others) = results
    assert one.n_skipped_steps == two.n_skipped_steps == int(spoilt == math.inf and "skip_nonfinite" in options)
    if options.get("max_grad_norm"):
        # The norm is decided on the host, in another order of additions.
        for param, other in zip(params, others, strict=True):
            torch.testing.assert_close(other, param, rtol=1e-6, atol=0, equal_nan=True)
    else:
        assert everything(two) == everything(one)
    for param, other in zip(params, others, strict=True):
        assert torch.equal(other.grad, param.grad)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_first_step_asks_for_no_current_device(flatten, monkeypatch):
    def refuse(*args, **kwargs):
        raise BufferError("Can't export tensors on a different CUDA device index")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refuse)
    optimizer, params = make(flatten=flatten)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [1.0] * 3


class TwoGPUs:
    """What `torch.cuda` is where the first device is the current one, and nobody uses it."""

    def __init__(self, *, is_interrupted=False):
        self.current, self.contexts, self._is_interrupted = 0, set(), is_interrupted

    def current_device(self):
        return self.current

    def set_device(self, index):
        self.current = index
        self.contexts.add(index)

    @contextmanager
    def device(self, device):
        self.set_device(device.index)
        yield
        if self._is_interrupted:
            raise KeyboardInterrupt
        self.current = 0


def test_a_launch_makes_no_context_on_the_current_device():
    context = DeviceContext(torch.device("cpu"))
    context.device, context._module = torch.device("xpu", 1), TwoGPUs()
    currents = []
    context.launch(lambda: currents.append(context._module.current), in_order=False)
    assert (currents, context._module.current, context._module.contexts) == ([1], 0, {1})


def test_an_interrupted_launch_leaves_the_current_device():
    context = DeviceContext(torch.device("cpu"))
    context.device, context._module = torch.device("xpu", 1), TwoGPUs(is_interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        context.launch(lambda: None, in_order=False)
    assert context._module.current == 0


def test_launches_that_a_graph_may_repeat_wait_for_the_last_one_wherever_that_was(monkeypatch):
    done, is_capturing = [], False

    class Event:
        def __init__(self, device):
            assert device == context.device
            self.wait, self.record = (lambda: done.append("wait")), (lambda: done.append("record"))

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    context = DeviceContext(torch.device("cpu"))
    context.device, context._module = torch.device("cuda", 0), TwoGPUs()
    expected = []
    for in_order, is_capturing in ((True, False), (False, False), (True, True), (True, False), (True, False)):
        context.launch(lambda: done.append("run"), in_order=in_order)
        expected.append("run")
        if in_order and not is_capturing:
            expected[-1:] = ["wait"] * ("record" in expected) + ["run", "record"]
        assert done == expected
    # Events of other devices have other kinds of streams.
    context.device = torch.device("xpu", 0)
    context.launch(lambda: done.append("run"), in_order=True)
    assert done == [*expected, "run"]


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_that_may_be_captured_are_in_order_and_so_is_what_changes_between_them(capturable, monkeypatch):
    orders, launch = [], DeviceContext.launch

    def noting(context, run, *, in_order):
        orders.append(in_order)
        launch(context, run, in_order=in_order)

    monkeypatch.setattr(DeviceContext, "launch", noting)
    optimizer, _ = make(capturable=capturable)
    optimizer.step()
    assert orders == [capturable]
    optimizer.param_groups[0]["lr"] = 0.5
    assert orders == [capturable, *([True] * capturable)]


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_skipped_step_is_counted_once_and_zeroes_all_the_same(two_devices, zero_grad):
    optimizer, params = make()
    optimizer.step()
    before = [param.detach().clone() for param in params]
    for found_inf, n_skipped in ((1.0, 1), (0.0, 1), (1.0, 2)):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
        optimizer.step(zero_grad=zero_grad)
        del optimizer.grad_scale, optimizer.found_inf
        assert optimizer.n_skipped_steps == n_skipped
        if n_skipped == 1 and found_inf:
            assert all(map(torch.equal, params, before))
        assert not zero_grad or not any(param.grad.any() for param in params)


def test_memory_that_a_step_uses_on_another_stream_is_recorded_there(monkeypatch):
    stream, recorded = 1, []
    monkeypatch.setattr(DeviceContext, "stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, on: recorded.append((tensor.data_ptr(), on)))
    optimizer, _ = make(max_grad_norm=1.0)
    optimizer.step()
    optimizer.step()
    assert recorded == []
    stream = 2
    optimizer.step()
    found = set(recorded)
    (device,) = optimizer._updater.plans.latest()[-1]._devices
    context, launches = device._context, device._launches
    own = [context.status, context.spare_status, context.one, context.zero]
    # What only the optimizer knows, and nothing of the user's.
    assert found == {
        (tensor.data_ptr(), 2) for tensor in (*own, context.partials(1), launches.table.buffer, launches.scalars)
    }
    recorded.clear()
    stream = 1
    optimizer.step()
    assert recorded == []
    # A plan that is made on the other stream has its own memory there.
    stream = 2
    optimizer.add_param_group({"params": parameters([(3,)])})
    optimizer.param_groups[-1]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert set(recorded) == {(tensor.data_ptr(), 2) for tensor in own}


def test_the_stream_is_that_of_the_device(monkeypatch):
    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream={0: 7, 1: 8}.get))
    monkeypatch.setattr(context_module, "driver", streams)
    context = DeviceContext(torch.device("cpu"))
    assert context.stream() is None
    context.device = torch.device("cuda", 1)
    assert context.stream() == 8


@pytest.mark.parametrize("has_found", [False, True])
@pytest.mark.parametrize("has_scale", [False, True])
def test_what_a_scaler_has_elsewhere_is_read_on_the_device(has_scale, has_found, monkeypatch):
    # A meta tensor stands for memory that kernels cannot read.
    here = {1.0: torch.tensor(4.0), 2.0: torch.tensor(1.0)}
    scale, found_inf = torch.empty(1, device="meta"), torch.empty(2, device="meta")
    monkeypatch.setattr(
        DeviceContext, "here", lambda _, tensor: None if tensor is None else here[float(tensor.numel())]
    )
    optimizer, params = make()
    before = [param.detach().clone() for param in params]
    optimizer.grad_scale = scale if has_scale else None
    optimizer.found_inf = found_inf if has_found else None
    optimizer.step()
    assert optimizer.n_skipped_steps == has_found
    assert all(map(torch.equal, params, before)) == has_found
    # What stays behind is unscaled, unless the step is skipped.
    left = 0.25 if has_scale and not has_found else 1.0
    assert all((param.grad == left).all() for param in params)


@given(st.lists(st.integers(0, 300), min_size=1))
def test_partial_norms_have_room_and_none_that_a_graph_may_write_to_is_freed(sizes):
    context, given_out = DeviceContext(torch.device("cpu")), []
    for n_partials in sizes:
        partials = context.partials(n_partials)
        assert (partials.dtype, partials.numel() >= n_partials) == (torch.float64, True)
        given_out.append(weakref.ref(partials))
        del partials
    assert all(each() is not None for each in given_out)
