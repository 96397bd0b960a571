"""The options of ``python -m dragon.vm.run``: those of `swap`, as words of a command line."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._hints import hint, option_of
from dragon.vm.torch.optim._swap import own_options

# Options whose values no command line can hold.
_OBJECTS = ("process_group",)
_NUMBERS: dict[str, Callable[[str], Any]] = {"float": float, "int": int}


class UsageError(Exception):
    """The command line is wrong; the text says how."""


class Request(NamedTuple):
    """What a command line asks for.

    Attributes:
        options: of `swap`.
        program: the script and its arguments; the module's name and its arguments with `as_module`.
        as_module: whether it began with ``-m``.
    """

    options: dict[str, Any]
    program: list[str]
    as_module: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Formatter(argparse.HelpFormatter):
    """As wide as the rest of the help, whatever the terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=115)


def parse(arguments: Sequence[str]) -> Request:
    """Read a command line; what follows the script or the module is the program's.

    Raises:
        UsageError: if it is wrong.
    """
    parser = _option_parser()
    parser.add_argument("-m", dest="module", default=None, nargs=argparse.REMAINDER)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        option = unknown[0].partition("=")[0]
        name = option.lstrip("-").replace("-", "_")
        raise UsageError(f"unknown option {option}{hint(name, _names(), of_command=True)}")
    program, module = found.program, found.module
    options = {name: value for name, value in vars(found).items() if name not in ("program", "module")}
    return Request(options, program if module is None else module, module is not None)


def options_help() -> str:
    """A paragraph for each option."""
    return _option_parser().format_help().partition("\n\n")[2].rstrip()


def _names() -> list[str]:
    """The options in the order of the constructor."""
    return [name for name in inspect.signature(Adam).parameters if name in own_options() and name not in _OBJECTS]


def _option_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dragon.vm.run",
        formatter_class=_Formatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("options of the optimizers, in front of the script")
    meanings = _meanings()
    for name in _names():
        kind = str(inspect.signature(Adam).parameters[name].annotation)
        flag, meaning = option_of(name), meanings.get(name)
        if kind.startswith("bool"):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
        else:
            group.add_argument(flag, type=_NUMBERS.get(kind, _value), help=meaning, metavar="VALUE")
    return parser


def _value(text: str) -> Any:
    """A word, a dtype by its name, or one of both for each state: ``exp_avg=bfloat16,exp_avg_sq=float32``."""
    if "=" in text:
        pairs = (pair.partition("=") for pair in text.split(","))
        return {state: _value(value) for state, _, value in pairs}
    dtype = getattr(torch, text.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else text


def _meanings() -> dict[str, str]:
    """What the constructor's docstring says of each option, if there are docstrings."""
    arguments = inspect.cleandoc(Adam.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\nRaises:")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("`", "").replace("%", "%%") for name, text in found}
