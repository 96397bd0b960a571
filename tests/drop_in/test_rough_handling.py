"""What scripts, signals and other libraries do to an optimizer between its steps."""

import contextlib
import copy
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dragon.vm.torch import optim as ours

from .both import BACKENDS, MODULES, NAMES, WAYS, build

each_module = pytest.mark.parametrize("module", MODULES)
each_name = pytest.mark.parametrize("name", NAMES)
each_way = pytest.mark.parametrize("way", WAYS)


class Interrupt(BaseException):
    """What a signal handler raises."""


class InterruptAt(TorchDispatchMode):
    """Raises once, in the place of the n-th operation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise Interrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupt_during_an_exchange_loses_nothing(backend: str) -> None:
    for at in range(1, 1000):
        params = [nn.Parameter(torch.full((4,), float(i + 1))) for i in range(3)]
        optimizer = ours.Adam(params, lr=0.1, ema_decay=0.5, backend=backend)
        for param in params:
            param.grad = torch.ones(4)
        optimizer.step()
        values = [param.detach().clone() for param in params]
        averages = [optimizer.state[param]["ema"].clone() for param in params]
        assert not torch.equal(values[0], averages[0])
        with contextlib.suppress(Interrupt), InterruptAt(at) as mode, optimizer.swap_ema():
            pass
        for param, value, average in zip(params, values, averages, strict=True):
            assert torch.equal(param.detach(), value), f"interrupted at operation {at}"
            assert torch.equal(optimizer.state[param]["ema"], average), f"interrupted at operation {at}"
        optimizer.step()
        if mode.count < at:
            break
    assert 1 < at < 999


@pytest.fixture
def interrupts_raise() -> Iterator[None]:
    """Ctrl-C raises, also where the suite was started in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_raise")
def test_ctrl_c_in_the_block_of_swap_ema_leaves_the_parameters() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = ours.Adam([param], lr=0.1, ema_decay=0.5)
    param.grad = torch.ones(4)
    optimizer.step()
    value = param.detach().clone()
    with pytest.raises(KeyboardInterrupt), optimizer.swap_ema():
        signal.raise_signal(signal.SIGINT)
    assert torch.equal(param.detach(), value)
    optimizer.step()


@each_way
@each_name
def test_a_property_that_takes_the_place_of_grad_is_read(way: Any, name: str) -> None:
    class Late(nn.Parameter):
        pass

    param = Late(torch.zeros(3))
    optimizer = build(way, name, [param], lr=1.0, **({} if name == "SGD" else {"betas": (0.0, 0.0), "eps": 1.0}))
    optimizer.param_groups[0]["weight_decay"] = 0.0
    param.grad = torch.ones(3)
    optimizer.step()
    before = param.detach().clone()
    Late.grad = property(lambda self: torch.full((3,), 3.0))  # type: ignore[assignment]  # what some libraries do
    optimizer.step()
    # Adam without memory moves by g / (g + 1).
    expected = 3.0 if name == "SGD" else 3 / 4
    torch.testing.assert_close(
        param.detach().as_subclass(torch.Tensor), before.as_subclass(torch.Tensor) - expected
    )


def test_shared_memory_is_not_left_by_flattening() -> None:
    param = nn.Parameter(torch.ones(3)).share_memory_()
    with pytest.raises(ValueError, match="share") as caught:
        ours.Adam([param], flatten=True)
    assert "flatten" in str(caught.value)
    assert param.is_shared()
    ours.Adam([param])


@each_module
@each_name
def test_a_weight_that_was_parametrised_later_is_no_conflict(module: ModuleType, name: str) -> None:
    """`weight_norm` after the optimizer: the old weight is held and gets no gradient any more."""
    model = nn.Linear(3, 2)
    optimizer = getattr(module, name)(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.nn.utils.parametrizations.weight_norm(model)
    optimizer.add_param_group({"params": list(model.parametrizations.weight.parameters())})
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)


@each_module
@each_name
def test_views_that_get_no_gradient_are_no_conflict(module: ModuleType, name: str) -> None:
    whole = nn.Parameter(torch.ones(6))
    half = nn.Parameter(whole.detach()[:3], requires_grad=False)
    optimizer = getattr(module, name)([whole, half], lr=0.1)
    whole.grad = torch.ones(6)
    optimizer.step()
    assert (whole < 1).all()


@each_name
def test_an_integer_that_gets_a_gradient_later_is_refused_before_anything_is_written(name: str) -> None:
    frozen = nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)
    trained = nn.Parameter(torch.ones(2))
    optimizer = getattr(ours, name)([trained, frozen], lr=0.1)
    trained.grad = torch.ones(2)
    frozen.grad = torch.ones(2, dtype=torch.int32)
    with pytest.raises((ValueError, TypeError), match="int32"):
        optimizer.step()
    assert (trained == 1).all()


@each_way
def test_groups_and_states_survive_being_replaced(way: Any) -> None:
    """As elastic frameworks and re-sharding do: other lists, other dicts, other parameters."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = build(way, "Adam", [first], lr=0.1)
    first.grad, second.grad = torch.ones(3), torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [second]
    optimizer.state[second] = optimizer.state.pop(first)
    for key, value in list(optimizer.state[second].items()):
        if torch.is_tensor(value) and value.dim():
            optimizer.state[second][key] = torch.cat([value, value[:1]])
    before = first.detach().clone()
    optimizer.step()
    assert torch.equal(first, before)
    assert float(optimizer.state[second]["step"]) == 2
    torch.testing.assert_close(second.detach(), torch.full((4,), 0.9))
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(second.detach(), torch.full((4,), 0.9))


@each_way
@each_name
def test_a_shallow_copy_shares_groups_and_states(name: str, way: Any) -> None:
    """As YOLOv5 plots a schedule: the scheduler of the original sets the learning rate of the copy too."""
    param = nn.Parameter(torch.ones(3))
    optimizer = build(way, name, [param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    param.grad = torch.ones(3)
    optimizer.step()
    other = copy.copy(optimizer)
    assert other.param_groups is optimizer.param_groups
    assert other.state is optimizer.state
    scheduler.step()
    before = param.detach().clone()
    other.step()
    optimizer.step()
    assert torch.equal(param, before)
    for step in other.state_dict()["state"].values():
        assert float(step.get("step", 3)) == 3


@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"state_dtype": "8bit"}], ids=str)
def test_parameters_whose_memory_was_freed_train_when_they_have_it_again(options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    freed = params[:2]
    for each in freed:
        each.untyped_storage().resize_(0)
    try:
        optimizer = ours.Adam(params, lr=0.1, **options)
    finally:
        # Whoever shows them in a report reads memory.
        for each in freed:
            each.untyped_storage().resize_(64)
    for each in params:
        each.data.fill_(1)
        each.grad = torch.ones(3)
    optimizer.step()
    assert [each.tolist() for each in params] == [pytest.approx([0.9] * 3)] * 4


class PrintingStorages(TorchFunctionMode):
    """Counts the bytes that PyTorch's `DebugMode` prints, which takes a millisecond for each."""

    n_bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.UntypedStorage):
            self.n_bytes += result.size()
        return result


@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"max_grad_norm": 1.0}], ids=str)
def test_a_mode_that_prints_what_functions_return_gets_no_storage_of_a_parameter(options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(1000)) for _ in range(2)]
    with PrintingStorages() as mode:
        optimizer = ours.Adam(params, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones(1000)
            optimizer.step()
    assert mode.n_bytes < 1000
