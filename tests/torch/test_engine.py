"""Calls of the autograd engine do with Dragon tensors what they do with PyTorch's, and refuse the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as real
from torch.autograd.graph import get_gradient_edge

from dragon.vm import torch

grad, backward = real.autograd.grad, real.autograd.backward

GRADS: dict[str, Callable[[Any, Any], Any]] = {
    "one": lambda x, y: grad((x * y).sum(), x),
    "a dict": lambda x, y: grad((x * y).sum(), {"a": x, "b": y}),
    "two roots": lambda x, y: grad([(x * y).sum(), x + y], [x, y], [None, real.ones(2)]),
    "a batch": lambda x, y: grad(x * y, [x, y], real.eye(2), is_grads_batched=True),
    "an edge as input": lambda x, y: grad((x * y).sum(), [get_gradient_edge(x), y]),
    "an edge as root": lambda x, y: grad([get_gradient_edge((x * y).sum())], [x, y], [real.ones(())]),
    "a result as input": lambda x, y: (lambda z: grad((z * z).sum(), [z, x]))(x * y),
    "unused": lambda x, y: grad((x * 2).sum(), [x, y]),
    "unused and allowed": lambda x, y: grad((x * 2).sum(), [x, y], allow_unused=True),
    "unused and made": lambda x, y: grad((x * 2).sum(), [x, y], materialize_grads=True),
    "an unused edge": lambda x, y: grad((x * 2).sum(), [x, get_gradient_edge(y)], materialize_grads=True),
    "the second of what is unused": lambda x, y: grad(
        grad((x * 2).sum(), [x, y], create_graph=True, materialize_grads=True)[1].sum(), x, materialize_grads=True
    ),
    "no input": lambda x, y: grad((x * y).sum(), []),
    "frozen": lambda x, y: grad((x * y).sum(), [x, y.detach()]),
    "no root": lambda x, y: grad(y.detach(), [x]),
    "no number": lambda x, y: grad(x * y, [x]),
}
BACKWARDS: dict[str, Callable[[Any, Any], Any]] = {
    "one": lambda x, y: backward((x * y).sum()),
    "two roots": lambda x, y: backward([(x * y).sum(), (x * x).sum()]),
    "a gradient": lambda x, y: backward(x * y, real.tensor([1.0, 2.0])),
    "an edge as root": lambda x, y: backward([get_gradient_edge((x * y).sum()), x.sum()], [real.ones(()), None]),
    "into one": lambda x, y: backward((x * y).sum(), inputs=x),
    "of the tensor into one": lambda x, y: (x * y).sum().backward(inputs=x),
    "of the tensor into an edge": lambda x, y: (x * y).sum().backward(inputs=get_gradient_edge(x)),
    "into a list": lambda x, y: (x * y).sum().backward(inputs=[y]),
    "into none": lambda x, y: backward((x * y).sum(), inputs=[]),
    "into a frozen one": lambda x, y: backward((x * y).sum(), inputs=[y.detach()]),
    "a gradient of another shape": lambda x, y: (x * y).backward(real.ones(3)),
}


def outcome(call: Callable[[Any, Any], Any], modules: tuple[Any, Any]) -> Any:
    """What a call returns and leaves in `.grad`, or its error."""
    x = modules[0].tensor([2.0, 3.0], requires_grad=True)
    y = modules[1].tensor([5.0, 7.0], requires_grad=True)

    def values(found: Any) -> Any:
        if isinstance(found, real.Tensor):
            return found.tolist()
        if isinstance(found, dict):
            return {name: values(each) for name, each in found.items()}
        return [values(each) for each in found] if isinstance(found, tuple) else found

    try:
        result = call(x, y)
    except Exception as error:
        return type(error), str(error)
    return values((result, x.grad, y.grad))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "modules", [(torch, torch), (torch, real), (real, torch)], ids=["both", "first", "second"]
)
@pytest.mark.parametrize(
    "call",
    [*GRADS.values(), *BACKWARDS.values()],
    ids=[*(f"grad, {name}" for name in GRADS), *(f"backward, {name}" for name in BACKWARDS)],
)
def test_a_call_gives_what_pytorchs_gives(call: Callable[[Any, Any], Any], modules: tuple[Any, Any]) -> None:
    assert outcome(call, modules) == outcome(call, (real, real))


def test_a_backward_pass_takes_a_dict_of_inputs() -> None:
    """PyTorch 2.11 refuses one."""
    x, y = (torch.tensor(values, requires_grad=True) for values in ([2.0, 3.0], [4.0, 5.0]))
    (x * y).sum().backward(inputs={"a": y})
    assert x.grad is None
    assert y.grad.tolist() == [2.0, 3.0]
