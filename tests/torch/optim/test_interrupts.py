"""A step that is interrupted, at whatever bytecode, leaves nothing half done that a later step would build on."""

from __future__ import annotations

import copy
import gc
import random
import signal
import sys
import timeit
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

from dragon.kernels import launch
from dragon.vm.torch.optim import Adam, _averages
from dragon.vm.torch.optim._backends import host, pieces
from dragon.vm.torch.optim._groups import masters
from dragon.vm.torch.optim._groups.flattening import Signature

from .interrupts import Interrupt, Tracer
from .memory import modes as memory_modes
from .support import BACKENDS, bits, give_gradients, home, parameters

# The soak profile of Hypothesis asks for all interrupts that the design names.
IS_SOAK = settings().max_examples >= 5000
SHAPES = ((3,), (2, 2), (17,))
OPTIONS = {"lr": 0.1, "weight_decay": 0.1}
OURS = str(Path(sys.modules[Adam.__module__].__file__ or "").parent)


def modes() -> tuple[Any, ...]:
    """All that a step may have pushed or switched off."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_torch_function_enabled(),
        torch._C._is_torch_function_all_disabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_num_threads(),
    )


def first_step(backend: str, **options: Any) -> Any:
    """An optimizer before its first step."""
    params = parameters(SHAPES, device=home(backend))
    optimizer = Adam([{"params": params[:2]}, {"params": params[2:]}], backend=backend, **OPTIONS, **options)
    give_gradients(params, 0)
    return optimizer


def later_step(backend: str, **options: Any) -> Any:
    """An optimizer before its third step, with fresh gradients and another learning rate."""
    optimizer = first_step(backend, **options)
    for seed in (1, 2):
        optimizer.step()
        give_gradients(params_of(optimizer), seed)
    optimizer.param_groups[0]["lr"] = 0.05
    return optimizer


def partial_step(backend: str, **options: Any) -> Any:
    """An optimizer before its first step without some of the parameters."""
    optimizer = later_step(backend, **options)
    params_of(optimizer)[0].grad = None
    return optimizer


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """No garbage is collected, and no mode of a failed test stays.

    Callbacks of weak references run when garbage is collected; Python reports their exceptions, and goes on.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    torch.set_grad_enabled(True)


# Of 80 x 64 elements, in fifths: as `host.PIECE` of 2048 cuts them.
PIECES = [(0, 2), (2, 4), (4, 5)]
SITUATIONS = [first_step, later_step, partial_step]


def params_of(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def contents(optimizer: Any) -> list[dict[str, bytes]]:
    """For each parameter the bits of it and of its states by name."""
    return [
        {"param": bits(param), **{key: bits(value) for key, value in optimizer.state.get(param, {}).items()}}
        for param in params_of(optimizer)
    ]


def fresh_states(optimizer: Any) -> list[dict[str, bytes]]:
    """The same for states that were made and not yet updated."""
    zero = bits(torch.zeros(()))
    return [
        {"exp_avg": bits(torch.zeros_like(p)), "exp_avg_sq": bits(torch.zeros_like(p)), "step": zero}
        for p in params_of(optimizer)
    ]


def torchs(optimizer: Any) -> torch.optim.Adam:
    """PyTorch's optimizer in the same situation, with copies of all tensors."""
    copies = {param: torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)}
    groups = [
        {"params": [copies[p] for p in group["params"]], "lr": group["lr"]} for group in optimizer.param_groups
    ]
    theirs = torch.optim.Adam(groups, **OPTIONS)
    for param, state in optimizer.state.items():
        if state:
            theirs.state[copies[param]] = copy.deepcopy(dict(state))
    return theirs


def check_interrupted(
    situation: Callable[..., Any], ways: Iterable[Callable[[Any], None]], backend: str, options: dict[str, Any]
) -> None:
    """Interrupt a step in each of these ways, and check all that must hold after it."""
    done = situation(backend, **options)
    before, fresh = contents(done), fresh_states(done)
    done.step()
    allowed = list(zip(before, contents(done), fresh, strict=True))
    for interrupted in ways:
        optimizer = situation(backend, **options)
        modes_before = modes()
        interrupted(optimizer)
        assert modes() == modes_before
        for index, (found, states) in enumerate(zip(contents(optimizer), allowed, strict=True)):
            for name, value in found.items():
                assert value in [state[name] for state in states if name in state], f"{name} of parameter {index}"
        check_later_step(optimizer)


def check_later_step(optimizer: Any) -> None:
    """A step is PyTorch's."""
    theirs = torchs(optimizer)
    for its in (optimizer, theirs):
        give_gradients(params_of(its), 7)
        its.step()
    for param, their in zip(params_of(optimizer), params_of(theirs), strict=True):
        torch.testing.assert_close(param, their, rtol=1e-5, atol=1e-6)
        for name, value in theirs.state[their].items():
            torch.testing.assert_close(optimizer.state[param][name].cpu(), value.cpu(), rtol=1e-5, atol=1e-6)


# A bound that changes nothing has gradients copied.
COPYING: dict[str, Any] = {"clip_value": 1e6}
CASES = [(backend, {}) for backend in BACKENDS] + [("native", {"flatten": True}), ("native", COPYING)]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize(("backend", "options"), CASES, ids=str)
def test_an_interrupt_at_any_bytecode_leaves_what_a_later_step_can_build_on(
    situation: Callable[..., Any], backend: str, options: dict[str, Any]
) -> None:
    # Within triton's interpreter an interrupt leaves patches of triton's own.
    folder = OURS if backend == "triton" else ""
    # What only the first step of a process does is done.
    situation(backend, **options).step()
    counter = Tracer(None, folder)
    counter.run(situation(backend, **options).step)
    assert counter.count > 500
    n_interrupts = {"triton": 2, "native": 40, "eager": 20}[backend] * (42 if IS_SOAK else 1)
    generator = random.Random(0)
    raised = []

    def interrupted(optimizer: Any) -> None:
        # Where tensors lie decides how many bytecodes a step takes: a few interrupts may come behind its end.
        try:
            Tracer(generator.randint(1, counter.count - 50), folder).run(optimizer.step)
        except Interrupt as interrupt:
            raised.append(interrupt)

    check_interrupted(situation, [interrupted] * n_interrupts, backend, options)
    assert len(raised) >= 0.9 * n_interrupts


def test_an_interrupt_while_a_kernel_is_compiled_counts_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **named: Any) -> None:
        raise Interrupt

    optimizer = first_step("triton")
    with monkeypatch.context() as patch:
        patch.setattr(launch.update_kernel, "warmup", interrupted)
        with pytest.raises(Interrupt):
            optimizer.step()
    pairs = zip(params_of(optimizer), fresh_states(optimizer), strict=True)
    assert contents(optimizer) == [{"param": bits(param), **fresh} for param, fresh in pairs]


def test_an_interrupt_while_memory_for_copies_is_laid_out_loses_none_of_it() -> None:
    first_step("native", **COPYING).step()
    counter = Tracer(None, str(pieces.__file__))
    counter.run(first_step("native", **COPYING).step)
    assert counter.count > 50

    def interrupted(at: int, optimizer: Any) -> None:
        with pytest.raises(Interrupt):
            Tracer(at, str(pieces.__file__)).run(optimizer.step)

    ats = range(1, counter.count + 1)
    check_interrupted(first_step, (partial(interrupted, at) for at in ats), "native", COPYING)


def test_an_interrupt_leaves_small_tensors_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Signature, "is_uniform", property(lambda self: False))
    source = str(host.__file__)
    done = later_step("native")
    together = slice(0, len(done.param_groups[0]["params"]))
    before = contents(done)[together]
    counter = Tracer(None, source)
    counter.run(done.step)
    outcomes = [before, contents(done)[together]]
    assert counter.count > 500
    seen = []

    def interrupted(at: int, optimizer: Any) -> None:
        with pytest.raises(Interrupt):
            Tracer(at, source).run(optimizer.step)
        seen.append(outcomes.index(contents(optimizer)[together]))

    ats = range(1, counter.count + 1, 1 if IS_SOAK else 7)
    check_interrupted(later_step, [partial(interrupted, at) for at in ats], "native", {})
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("mode", ["split8, 8bit, amsgrad, average", "fp32 masters, 8bit"])
def test_an_interrupt_leaves_each_piece_of_a_large_tensor_whole(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameter, master, codes, scales and average of a piece go on together, and the count with the first."""
    monkeypatch.setattr(host, "PIECE", 2048)

    def third_step() -> Any:
        params, optimizer = memory_modes.make(mode, ((80, 64),), "native")
        memory_modes.train(params, optimizer, 2)
        memory_modes.give_gradients(params, 2)
        return optimizer

    def by_piece(optimizer: Any) -> list[list[bytes]]:
        param, state = params_of(optimizer)[0], optimizer.state[params_of(optimizer)[0]]
        kept = [value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"]
        rows = [each.detach().view(-1) for each in (param, *kept)]
        pieces = [[bits(row[len(row) * at // 5 : len(row) * end // 5]) for row in rows] for at, end in PIECES]
        return [[bits(state["step"])], *pieces]

    source, done = str(host.__file__), third_step()
    before, counter = by_piece(done), Tracer(None, source)
    counter.run(done.step)
    assert counter.count > 1000
    seen = set()
    for at in range(1, counter.count + 1, 1 if IS_SOAK else 23):
        optimizer = third_step()
        with pytest.raises(Interrupt):
            Tracer(at, source).run(optimizer.step)
        outcomes = zip(by_piece(optimizer), before, by_piece(done), strict=True)
        seen.add(tuple((old, new).index(found) for found, old, new in outcomes))
    assert seen <= {(0, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1)}
    assert len(seen) >= 3


@pytest.mark.parametrize("source", [_averages, masters], ids=["exchange", "masters"])
@pytest.mark.parametrize("master_weights", [torch.float32, "split16"], ids=str)
def test_an_interrupt_of_swap_ema_leaves_parameters_and_masters(master_weights: Any, source: ModuleType) -> None:
    def third_step() -> Any:
        params = parameters(SHAPES, torch.bfloat16)
        optimizer = Adam(params, lr=1e-3, master_weights=master_weights, ema_decay=0.9)
        for seed in range(3):
            if seed:
                optimizer.step()
            give_gradients(params, seed)
        return optimizer

    def exchange(optimizer: Any) -> None:
        with optimizer.swap_ema():
            pass

    counter, done = Tracer(None, str(source.__file__)), third_step()
    counter.run(partial(exchange, third_step()))
    assert counter.count > 100
    done.step()
    for at in range(1, counter.count + 1, 1 if IS_SOAK else 5):
        optimizer = third_step()
        with pytest.raises(Interrupt):
            Tracer(at, str(source.__file__)).run(partial(exchange, optimizer))
        optimizer.step()
        assert contents(optimizer) == contents(done)


def test_an_interrupt_leaves_a_new_group_as_it_is_to_be_or_out() -> None:
    def add(optimizer: Any) -> None:
        optimizer.add_param_group({"params": parameters([(5,)]), "lr": 0.3})

    counter, done = Tracer(None, OURS), later_step("native")
    counter.run(partial(add, done))
    whole = {key: value for key, value in done.param_groups[-1].items() if key != "params"}
    for at in range(1, counter.count + 1, 1 if IS_SOAK else 3):
        optimizer = later_step("native")
        with pytest.raises(Interrupt):
            Tracer(at, OURS).run(partial(add, optimizer))
        assert all(group.items() >= whole.items() for group in optimizer.param_groups[2:]), at
        assert all(group.keys() == {"params", *whole} for group in optimizer.param_groups), at


@pytest.fixture
def alarms() -> Iterator[None]:
    """A timer's signal raises."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no interval timers")
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_signal_at_any_time_leaves_what_a_later_step_can_build_on(
    situation: Callable[..., Any], backend: str, alarms: None
) -> None:
    # The shortest of some: a step that waited for a processor says nothing about the others.
    duration = min(timeit.repeat("step()", "step = situation(backend).step", number=1, globals=locals()))
    generator = random.Random(0)
    raised = []

    def interrupted(optimizer: Any) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, duration))
            try:
                optimizer.step()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt as interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raised.append(interrupt)

    check_interrupted(situation, [interrupted] * (1000 if IS_SOAK else 30), backend, {})
    assert raised


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_an_exception_of_a_signal_handler_arrives(backend: str, alarms: None) -> None:
    optimizer = later_step(backend)
    param, before = params_of(optimizer)[0], modes()
    # As if the signal came while the gradients are read.
    grad = property(lambda self: signal.raise_signal(signal.SIGALRM))
    param.__class__ = type("Signalling", (type(param),), {"grad": grad})
    with pytest.raises(Interrupt):
        optimizer.step()
    assert modes() == before


def test_the_tracer_raises_at_the_bytecode_that_it_is_told() -> None:
    def add() -> int:
        total = 0
        for number in range(10):
            total += number
        return total

    counter = Tracer(None)
    counter.run(add)
    for at in range(1, counter.count + 1):
        tracer = Tracer(at)
        with pytest.raises(Interrupt):
            tracer.run(add)
        assert tracer.count == at
    Tracer(counter.count + 1).run(add)
