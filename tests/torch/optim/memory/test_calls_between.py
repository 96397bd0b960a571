"""Calls between steps that are to change nothing, failing ones among them, change no bit of any step."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ..judging import params_of
from ..support import patient
from .modes import MODES, bits, give_gradients, make

BACKENDS = ["native", "eager"]


class Failure(Exception):
    """Raised by a hook, and inside an exchange."""


def fail(*_: Any) -> None:
    raise Failure


def fail_in_hooks(optimizer: Any) -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("state_dict_post", optimizer.state_dict),
        ("load_state_dict_pre", lambda: optimizer.load_state_dict(optimizer.state_dict())),
        ("load_state_dict_post", lambda: optimizer.load_state_dict(optimizer.state_dict())),
        ("step_pre", optimizer.step),
    ]
    for name, call in calls:
        handle = getattr(optimizer, f"register_{name}_hook")(fail)
        with pytest.raises(Failure):
            call()
        handle.remove()


def fail_to_load(optimizer: Any) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    states = list(saved["state"].values())
    for state in states:
        wrong = {
            key: torch.zeros(9, 9, 9) for key, value in state.items() if torch.is_tensor(value) and value.ndim
        }
        state.update(wrong)
    if states:
        with pytest.raises(ValueError, match="loaded state dict has"):
            optimizer.load_state_dict(saved)


def fail_to_add(optimizer: Any) -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0})


def exchange(optimizer: Any) -> None:
    if any("ema" in state for state in optimizer.state.values()):
        with optimizer.swap_ema():
            pass
        list(optimizer.master_weights())
        with suppress(Failure), optimizer.swap_ema():
            list(optimizer.master_weights())
            optimizer.load_state_dict(optimizer.state_dict())
            with pytest.raises(RuntimeError, match="copied inside swap_ema"):
                copy.deepcopy(optimizer)
            with pytest.raises(RuntimeError, match="exchanged already"), optimizer.swap_ema():
                pass
            fail()


def load_from_file(optimizer: Any) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def load_within_a_load(optimizer: Any) -> None:
    for when in ("pre", "post"):
        nested = [copy.deepcopy(optimizer.state_dict())]

        def hook(within: Any, *_: Any, nested: list[Any] = nested) -> None:
            if nested:
                within.load_state_dict(nested.pop())

        handle = getattr(optimizer, f"register_load_state_dict_{when}_hook")(hook)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        handle.remove()


def look(optimizer: Any) -> None:
    optimizer.memory()
    optimizer.state_formats()
    list(optimizer.master_weights())


def hand_over_and_take_back(optimizer: Any) -> None:
    assert optimizer._step_supports_amp_scaling == bool(optimizer._handed_over)
    optimizer._take_back()


def sum_up(optimizer: Any) -> None:
    optimizer.sum_grad()


CALLS: dict[str, Callable[[Any], Any]] = {
    **{"deepcopy": copy.deepcopy, "copy": copy.copy},
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    **{call.__name__: call for call in (fail_in_hooks, fail_to_load, fail_to_add, exchange, load_from_file)},
    **{call.__name__: call for call in (load_within_a_load, look, hand_over_and_take_back, sum_up)},
}


def trained(mode: str, backend: str, average: float, calls: list[list[str]]) -> list[bytes]:
    """Parameters and states after a step behind each list of calls."""
    _, optimizer = make(mode, ((64, 64), (5,)), backend, native_state_dict=True, ema_decay=average)
    for number, names in enumerate(calls):
        give_gradients(params_of(optimizer), number)
        for name in names:
            grads = [param.grad for param in params_of(optimizer)]
            result = CALLS[name](optimizer)
            if result is not None:
                optimizer = result
                # Copies of parameters have none.
                for param, grad in zip(params_of(optimizer), grads, strict=True):
                    param.grad = grad
        optimizer.step()
        for param in params_of(optimizer):
            param.grad = None
    return bits(params_of(optimizer), optimizer)


@pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")
@pytest.mark.parametrize("backend", BACKENDS)
@patient
@given(
    mode=st.sampled_from(list(MODES)),
    average=st.sampled_from([0.0, 0.9]),
    calls=st.lists(st.lists(st.sampled_from(list(CALLS)), min_size=2, max_size=8), min_size=2, max_size=4),
)
def test_calls_that_are_to_change_nothing_change_no_bit(
    backend: str, mode: str, average: float, calls: list[list[str]]
) -> None:
    assert trained(mode, backend, average, calls) == trained(mode, backend, average, [[] for _ in calls])
