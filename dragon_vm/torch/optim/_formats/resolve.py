"""From the options of a group to the format of a parameter and of each of its states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Size

from dragon.vm.torch.optim._formats.blockwise import SignedQ8, SquareQ8
from dragon.vm.torch.optim._formats.format import BLOCK, Format
from dragon.vm.torch.optim._formats.rounding import Plain, StochasticBfloat16, UpwardBfloat16
from dragon.vm.torch.optim._formats.split import Master, Split8, Split16

EIGHT_BIT = "8bit"
StateDtype = torch.dtype | str | None
_NARROW = (torch.bfloat16, torch.float16, EIGHT_BIT)
# Of all algorithms.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
# Smaller tensors gain little, and are the sensitive ones: norms and biases.
SMALLEST_Q8 = 4096
# The largest beta2 with which second moments that are rounded to nearest decay. In bf16 the half step is 2^-8.
# In 8 bits a moment is the eighth power of its code, and half a step is 1/510 of the largest code.
_LARGEST_BETA2: dict[Format | None, float] = {
    Plain(torch.bfloat16): 1 - 2.0**-8,
    SquareQ8(False): (1 - 1 / 510) ** 8,
}


class StorageOptions(NamedTuple):
    """How a group's parameters and states are to be stored; see `Adam`."""

    state_dtype: StateDtype | Mapping[str, StateDtype] = None
    stochastic_rounding: bool | None = None
    master_weights: torch.dtype | str | None = None

    def asked(self, state: str) -> StateDtype:
        """What `state_dtype` says of one state."""
        return self.state_dtype.get(state) if isinstance(self.state_dtype, Mapping) else self.state_dtype

    def changed(self, change: Callable[[StateDtype], StateDtype]) -> StorageOptions:
        """The options with another `state_dtype` for all states, or for each that it names."""
        asked = self.state_dtype
        if isinstance(asked, Mapping):
            return self._replace(state_dtype={name: change(value) for name, value in asked.items()})
        return self._replace(state_dtype=change(asked))


class Storage(NamedTuple):
    """The formats of one parameter.

    Attributes:
        param: of the parameter.
        states: by the states' names.
        average: dtype of the exponential moving average.
        asked: names of the states that a dtype is asked for.
    """

    param: Format
    states: Mapping[str, Format]
    average: torch.dtype
    asked: frozenset[str]

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the parameter and of the states."""
        return (self.param, *self.states.values())

    def nbytes(self, numel: int) -> int:
        """Bytes of the parameter and its states, without gradient and average."""
        parts = [part for form in self.formats for part in form.parts]
        return sum(numel // part.elements * part.dtype.itemsize for part in parts)


def check_options(options: StorageOptions) -> None:
    """Check options for themselves, before any parameter is known.

    Raises:
        ValueError: a value that no parameter could have.
    """
    asked = options.state_dtype
    is_by_name = isinstance(asked, Mapping)
    for state, value in asked.items() if isinstance(asked, Mapping) else [("", asked)]:
        is_dtype = isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1
        if value is not None and value != EIGHT_BIT and not is_dtype:
            name = f"state_dtype[{state!r}]" if is_by_name else "state_dtype"
            raise ValueError(
                f'{name}: expected a floating point dtype of 2 bytes or more, "8bit" or None, got {value!r}'
            )
    if isinstance(asked, Mapping) and asked.get("max_exp_avg_sq") == EIGHT_BIT:
        raise ValueError('state_dtype["max_exp_avg_sq"]: the maximum has no 8-bit form, use bfloat16 or float32')
    if options.asked("exp_avg_sq") == torch.float16:
        raise ValueError(
            "state_dtype: float16 loses second moments below 6e-8; "
            'use bfloat16, or with Adam {"exp_avg": torch.float16} for the first moment alone'
        )
    if options.stochastic_rounding not in (None, True, False):
        raise ValueError(f"stochastic_rounding: expected a bool or None, got {options.stochastic_rounding!r}")
    if options.master_weights not in (None, torch.float32, "split16", "split8"):
        raise ValueError(
            f'master_weights: expected torch.float32, "split16", "split8" or None, got {options.master_weights!r}'
        )
    if options.stochastic_rounding and options.master_weights in (torch.float32, "split16"):
        raise ValueError(
            f"stochastic_rounding=True: an fp32 master is not rounded, master_weights={options.master_weights!r}; "
            'leave one of them out, or use master_weights="split8"'
        )


def _param_format(dtype: torch.dtype, options: StorageOptions) -> Format:
    master, stochastic = options.master_weights, options.stochastic_rounding
    if stochastic and dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"stochastic_rounding=True: expected float32 or bfloat16 parameters, got {dtype}")
    if master is None:
        return StochasticBfloat16() if stochastic and dtype == torch.bfloat16 else Plain(dtype)
    allowed = (torch.bfloat16, torch.float16) if master == torch.float32 else (torch.bfloat16,)
    if dtype not in allowed:
        names = " or ".join(str(name).removeprefix("torch.") for name in allowed)
        raise ValueError(f"master_weights={master!r}: expected {names} parameters, got {dtype}")
    if master == torch.float32:
        return Master(dtype)
    return Split16() if master == "split16" else Split8(stochastic is None or bool(stochastic))


def is_blockwise(shape: Size) -> bool:
    """Whether a tensor of this shape is large enough for 8 bits, and its rows are whole blocks.

    Ask with the global shape: the answer is then the same on every mesh.
    """
    return shape.numel() >= SMALLEST_Q8 and shape[1:].numel() % BLOCK == 0


def blockwise_format(state: str, stochastic: bool) -> Format:
    """The 8-bit format of a state; `stochastic` is for second moments."""
    return SquareQ8(stochastic) if state == "exp_avg_sq" else SignedQ8()


def _state_format(state: str, asked: StateDtype, shape: Size, stochastic: bool) -> Format:
    """The format of one state but the maximum; `stochastic` tells how a narrow second moment is rounded."""
    if not isinstance(asked, torch.dtype):
        return blockwise_format(state, stochastic) if is_blockwise(shape) else Plain(torch.float32)
    if asked == torch.bfloat16 and state == "exp_avg_sq" and stochastic:
        return StochasticBfloat16()
    return Plain(asked)


def _maximum_format(square: Format, asked: StateDtype, stochastic: bool) -> Format:
    """The format of the maximum: that of the second moments, or bf16 rounded upwards if they are narrow."""
    if isinstance(asked, torch.dtype):
        return UpwardBfloat16() if asked == torch.bfloat16 and stochastic else Plain(asked)
    return square if isinstance(square, Plain) else UpwardBfloat16()


def resolve(
    options: StorageOptions,
    dtype: torch.dtype,
    shape: Size,
    states: Sequence[str],
    *,
    differentiable: bool = False,
) -> Storage:
    """The formats of a parameter of a dtype and a global shape, by options that `check_options` has seen.

    Raises:
        ValueError: the options do not fit the parameter; the message names option, value and dtype.
    """
    param = _param_format(dtype, options)
    asked = {state: options.asked(state) for state in states}
    if EIGHT_BIT in asked.values() and (dtype == torch.float64 or dtype.is_complex):
        raise ValueError(f'state_dtype="8bit": expected real parameters of 4 bytes or less, got {dtype}')
    usual = dtype if options.master_weights is None else torch.float32
    single = dtype != torch.float64 and not differentiable
    formats: dict[str, Format] = {}
    for state, wanted in asked.items():
        # By default only what an option made narrow: a bf16 parameter alone means PyTorch's arithmetic.
        default = wanted is not None
        stochastic = single and (default if options.stochastic_rounding is None else options.stochastic_rounding)
        if state == "max_exp_avg_sq":
            formats[state] = _maximum_format(formats["exp_avg_sq"], wanted, stochastic)
        else:
            formats[state] = _state_format(state, usual if wanted is None else wanted, shape, stochastic)
    narrow = not isinstance(param, Plain) or any(wanted in _NARROW for wanted in asked.values())
    average = torch.float32 if narrow else next(iter(formats.values()), Plain(usual)).parts[0].dtype
    if not states and isinstance(options.state_dtype, torch.dtype):
        average = torch.promote_types(options.state_dtype, torch.float32)
    # Whether something is stored in less than the parameter's dtype.
    is_rounded = any(
        not isinstance(form, Plain) or form.dtype.itemsize < dtype.itemsize for form in (param, *formats.values())
    )
    if differentiable and (EIGHT_BIT in asked.values() or is_rounded):
        given = {name: value for name, value in options._asdict().items() if value is not None}
        raise ValueError(f"differentiable=True: autograd cannot see through rounding, got {given}")
    named = frozenset(state for state, wanted in asked.items() if isinstance(wanted, torch.dtype))
    return Storage(param, formats, average, named)


def cannot_forget(storage: Storage, beta2: float) -> bool:
    """Whether the second moment is rounded to nearest in steps too large for it to decay."""
    return beta2 > _LARGEST_BETA2.get(storage.states.get("exp_avg_sq"), 1.0)
