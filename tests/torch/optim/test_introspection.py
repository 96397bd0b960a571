"""Constructors that call others, and have their parameters."""

from typing import Any

import pytest

from dragon.vm.torch.optim._introspection import with_parameters_of

NOTHING = object()


def init(self: Any, params: Any, lr: float = 0.25, *, quickly: Any = NOTHING, **others: Any) -> None:
    """Of a PyTorch that knows more options than ours."""


@pytest.mark.parametrize(
    ("args", "options", "handed"),
    [
        (([1],), {}, {"params": [1]}),
        (([1], 0.5), {}, {"params": [1], "lr": 0.5}),
        ((), {"params": [1], "quickly": None}, {"params": [1], "quickly": None}),
        (([1],), {"quickly": NOTHING, "unknown": 1}, {"params": [1], "unknown": 1}),
    ],
)
def test_only_options_that_were_given_are_handed_on(
    args: tuple[Any, ...], options: dict[str, Any], handed: dict[str, Any]
) -> None:
    calls = []
    constructor = with_parameters_of(init, lambda self, **given: calls.append((self, given)))
    owner = object()
    constructor(owner, *args, **options)
    assert calls == [(owner, handed)]
