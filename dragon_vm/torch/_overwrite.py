"""Dragon's gradient rule: a leaf's next backward replaces its gradient, where PyTorch adds to it.

The rule is a tensor hook, `drop_old_gradient`, that a leaf carries. The autograd engine calls it once per
backward, with the sum of all contributions, just before that sum is accumulated into `.grad`.

One backward is one engine run, with an exception: reentrant checkpointing runs an engine within the engine,
one run a segment. A parameter that two segments share gets its gradient in several runs of one backward, and
they have to add up. So each outermost run has a record of the leaves it has reached; a nested run uses that of
the run around it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, cast

import torch

# Private, but there is no public way to ask what the engine is at; torch.utils.checkpoint and
# torch.autograd.graph stand on the same functions.
_current_task_id = torch._C._current_graph_task_id
_current_node = torch._C._current_autograd_node
_will_execute = torch._C._will_engine_execute_node
_AccumulateGrad: type = getattr(torch._C._functions, "AccumulateGrad")  # noqa: B009  # not in the stubs
_NO_TASK = -1


class _Backward:
    """The leaves that one outermost engine run has reached, by `id`.

    The engine run owns it, as a callback for its end; everybody else refers to it weakly. So it lives exactly
    as long as the run, also when that ends in an exception.
    """

    __slots__ = ("__weakref__", "leaves", "task_ids")

    def __init__(self) -> None:
        self.leaves: set[int] = set()
        self.task_ids: list[int] = []

    def __call__(self) -> None:
        """Do nothing at the end of the run: being held is all that is wanted."""

    def __del__(self) -> None:
        for task_id in self.task_ids:
            _backwards.pop(task_id, None)


class _Outermost(threading.local):
    """The run within which this thread has last recomputed a segment."""

    backward: weakref.ref[_Backward] | None = None


# By the engine's number of the run; a nested run has a number of its own and the record of the outermost.
_backwards: dict[int, weakref.ref[_Backward]] = {}
_outermost = _Outermost()


def overwrite_gradients(leaf: torch.Tensor) -> None:
    """Make the gradient of `leaf` follow Dragon's rule, if it wants one and does not follow it already.

    Args:
        leaf: A tensor of any shape and dtype. It is not kept: the rule holds no reference to it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if not (leaf.requires_grad and leaf.is_leaf):
            return
        hooks = leaf._backward_hooks
        if hooks is None or drop_old_gradient not in hooks.values():
            leaf.register_hook(drop_old_gradient)


def drop_old_gradient(gradient: torch.Tensor) -> None:
    """Drop the `.grad` that an earlier backward left in the leaf that the engine is about to accumulate into.

    `torch.autograd.grad` calls the hooks of a leaf too, and must leave its `.grad` alone; so must a backward
    that reaches a tensor which is no leaf any more.
    """
    node = _current_node()
    if type(node) is not _AccumulateGrad or not _accumulates(node):
        return
    leaf: torch.Tensor = cast(Any, node).variable
    leaves = _current_backward().leaves
    if id(leaf) not in leaves:
        leaves.add(id(leaf))
        with torch._C.DisableTorchFunctionSubclass():
            leaf.grad = None


# Read by PyTorch when it pickles: no warning that this hook stays behind, it is put on again.
drop_old_gradient.__torch_unserializable__ = True  # type: ignore[attr-defined]  # a mark on a function


def note_recomputation() -> None:
    """Remember the engine run in which this thread is, if it is in one.

    Called from each operation on a Dragon tensor. A reentrant checkpoint runs its segment again within the
    outer engine run, and then a nested one over it; this is where the two can be connected.
    """
    if _current_task_id() != _NO_TASK:
        _outermost.backward = weakref.ref(_current_backward())


def _accumulates(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # what PyTorch raises for a leaf in torch.autograd.grad
        return False


def _current_backward() -> _Backward:
    task_id = _current_task_id()
    known = _backwards.get(task_id)
    backward = known() if known is not None else None
    if backward is None:
        around = _outermost.backward() if _outermost.backward is not None else None
        backward = _Backward() if around is None else around
        # The run itself holds it. A nested run holds that of the outer one, which outlives it anyway.
        torch.autograd.Variable._execution_engine.queue_callback(backward)
        backward.task_ids.append(task_id)
        _backwards[task_id] = weakref.ref(backward)
    return backward
