"""Names of options that other libraries have: none is taken for ours, and the error says what ours is."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from dragon.vm.torch.optim._introspection import with_parameters_of

_S = TypeVar("_S")
_P = ParamSpec("_P")


class Ours(NamedTuple):
    """What to write here."""

    argument: str  # in Python
    word: str  # on a command line
    why: str = ""  # a relative clause about the difference; empty if there is none


_EIGHT_BIT = Ours('state_dtype="8bit"', "--state-dtype 8bit")
_DTYPE = Ours("state_dtype=dtype", "--state-dtype DTYPE")
_FIRST = Ours('state_dtype={"exp_avg": dtype}', "--state-dtype exp_avg=DTYPE")
_SECOND = Ours('state_dtype={"exp_avg_sq": dtype}', "--state-dtype exp_avg_sq=DTYPE")
_STOCHASTIC = Ours("stochastic_rounding=True", "--stochastic-rounding")
_SPLIT8 = Ours('master_weights="split8"', "--master-weights split8", 'or "split16", which is exact')
_SPLIT16 = Ours('master_weights="split16"', "--master-weights split16", "which is exact")

# By the names of bitsandbytes, torchao, FlashOptim, Transformer Engine, torchtitan, optimi and torchdistx.
ELSEWHERE = {
    "bf16_stochastic_round": _STOCHASTIC,
    "exp_avg_dtype": _FIRST,
    "exp_avg_sq_dtype": _SECOND,
    "kahan": _SPLIT16,
    "kahan_sum": _SPLIT16,
    "master_weight_bits": _SPLIT8,
    "moment_dtype": _DTYPE,
    "momentum_dtype": _FIRST,
    "optim_bits": _EIGHT_BIT,
    "quantize": _EIGHT_BIT,
    "state_bits": _EIGHT_BIT,
    "store_param_remainders": _SPLIT16,
    "use_8bit": _EIGHT_BIT,
    "use_kahan_summation": _SPLIT16,
    "variance_dtype": _SECOND,
}


def hint(name: str, known: Iterable[str], *, of_command: bool = False) -> str:
    """What to write in the place of an option that is not there, to be put behind an error; may be empty.

    Args:
        name: of the option, as in Python.
        known: names of the options that are there, likewise.
        of_command: answer in the spelling of a command line.
    """
    if ours := ELSEWHERE.get(name):
        text = ours.word if of_command else ours.argument
        return f": here {text}" + f", {ours.why}" * bool(ours.why)
    similar = difflib.get_close_matches(name, list(known), 1)
    if not similar:
        return ""
    return f". Did you mean {option_of(similar[0]) if of_command else repr(similar[0])}?"


def option_of(name: str) -> str:
    """The spelling of an option on a command line."""
    return "--" + name.replace("_", "-")


def with_hints(init: Callable[Concatenate[_S, _P], None]) -> Callable[Concatenate[_S, _P], None]:
    """Let a constructor's error about an unknown keyword say what to write."""
    known = frozenset(inspect.signature(init).parameters)

    def checked(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{init.__qualname__}() got an unexpected keyword argument {name!r}{hint(name, known)}"
                )
        init(self, *args, **kwargs)

    return with_parameters_of(init, checked)
