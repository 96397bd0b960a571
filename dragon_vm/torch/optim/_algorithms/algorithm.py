"""`Algorithm`: all that differs between Adam and SGD, in one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from dragon.vm.torch.optim._options import OWN_GROUP_DEFAULTS

Group = Mapping[str, Any]
Tensors = list[Tensor]

_is_tuple: Callable[[Any], bool] = tuple.__instancecheck__


class Maths(NamedTuple):
    """How an update is computed, beside its formula.

    Attributes:
        root: of fp32 or fp64; the correctly rounded one where kernels compute the same.
        is_bounded: clamp the first moment to what the second one allows.
    """

    root: Callable[[Tensor], Tensor]
    is_bounded: bool


@dataclass(frozen=True)
class Algorithm:
    """What an optimizer computes. All functions take a parameter group, a mapping of hyperparameters.

    Attributes:
        name: as the kernels know it.
        states: names of all state tensors that a parameter may have, in the order in which the update walks them.
        state_keys: those of them that a group's parameters have.
        counts_steps: whether the update needs a step counter.
        check: raises `ValueError` for hyperparameters out of range, with PyTorch's texts.
        columns: hyperparameters by the name of their column in the kernels' table.
        update: maps a tensor, its gradient, its states, its step count, the group and `Maths` to the new tensor
            and states. All tensors are real, fp32 or fp64, and none is written. The gradient is scaled and
            clipped. The count is from 1, or None where nothing counts.
        fused: updates lists of CPU tensors in place by one fused operation of torch, given parameters, gradients,
            states, counters, the group, keywords of the operation but for the learning rate, and the step count.
        fused_numbers: the algorithm's own keywords of that operation.
        fused_names: the hyperparameters, beside the learning rate, that tensors of one fused call must share.
        depends_on_step: whether what a fused call does depends on the step count.
        optional_keys: states that a saved group may lack, which then start anew.
        uncounted_steps: the count of a state that comes without one; None if it must have one.
        saves_steps: whether PyTorch's counterpart has step counters in its state dicts.
        own_group_defaults: further options that this counterpart lacks, with the value that means the same.
    """

    name: str
    states: tuple[str, ...]
    state_keys: Callable[[Group], tuple[str, ...]]
    counts_steps: Callable[[Group], bool]
    check: Callable[[Group], None]
    columns: Callable[[Group], dict[str, float]]
    update: Callable[[Tensor, Tensor, Sequence[Tensor], Tensor | None, Group, Maths], tuple[Tensor, list[Tensor]]]
    fused: Callable[[Tensors, Tensors, list[Tensors], Tensors, Group, dict[str, Any], float], None]
    fused_numbers: Callable[[Group], dict[str, Any]]
    fused_names: tuple[str, ...]
    depends_on_step: Callable[[Group], bool]
    optional_keys: Callable[[Group], frozenset[str]] = lambda saved_group: frozenset()
    uncounted_steps: float | None = None
    saves_steps: bool = True
    own_group_defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own_defaults(self) -> dict[str, Any]:
        """Options of groups that PyTorch's counterpart lacks, with the value that means the same."""
        return {**OWN_GROUP_DEFAULTS, **self.own_group_defaults}

    def check_storage(self, group: Group) -> None:
        """Check that a group asks for dtypes of the algorithm's own states, and for random words where it counts.

        Raises:
            ValueError: if it does not.
        """
        asked = group["state_dtype"]
        for state in asked if isinstance(asked, Mapping) else ():
            if state not in self.states:
                raise ValueError(f"state_dtype: expected states among {', '.join(self.states)}, got {state!r}")
        # Random words depend on the count of steps.
        value = group.get("stochastic_rounding", False)
        if self.own_defaults["stochastic_rounding"] is False and value is not False:
            raise ValueError(
                f"{self.name.upper()} rounds to nearest: stochastic_rounding must be left out, but got {value!r}"
            )

    def all_state_keys(self, group: Group) -> tuple[str, ...]:
        """`state_keys`, and "ema" if the group keeps an average."""
        keys = self.state_keys(group)
        return (*keys, "ema") if group["ema_decay"] else keys


def check_lr(group: Group) -> None:
    """Check a learning rate and weight decay with PyTorch's errors.

    Raises:
        ValueError: as PyTorch.
    """
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        # Of PyTorch's optimizers only those with betas refuse it.
        if "betas" in group and group["foreach"] and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def host_number(value: Any) -> float:
    """A hyperparameter as a float; 0 for a tensor on a device, which kernels read where it is."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.device.type == "cpu" else 0.0
    return float(value)


def kinds(rows: Sequence[Sequence[Any]]) -> set[type]:
    """The types of all values of hyperparameters, and of those within tuples."""
    values = list(chain.from_iterable(rows))
    return set(map(type, values)) | set(map(type, chain.from_iterable(filter(_is_tuple, values))))


def decayed(
    param: Tensor, grad: Tensor, group: Group, lr: float | Tensor, decoupled: bool
) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay, out of place."""
    weight_decay = for_maths(param, group["weight_decay"])
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        if decoupled:
            param = param * (1 - lr * weight_decay)
        else:
            grad = grad + weight_decay * param
    return param, grad


def for_maths(param: Tensor, value: float | Tensor) -> float | Tensor:
    """A hyperparameter for use with a tensor: a float, unless autograd must see it."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value.reshape(()).to(param.device)
    return float(value)
