"""The options of ``python -m dragon.vm.run``: those of `swap`, as words of a command line."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch

from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._counterparts import own_options
from dragon.vm.torch.optim._hints import hint, option_of

# Options whose values no command line can hold.
_OBJECTS = {"process_group"}
# Of the launcher: neither "-m", "-mNAME" nor "--", which end the options, nor "-".
_OPTION = re.compile(r"-(?!m|-?\Z)")
_NUMBERS: dict[str, Callable[[str], Any]] = {"float": float, "int": int}


class UsageError(Exception):
    """The command line is wrong; the text says how."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str], bool]:
    """Read a command line; what follows the script or the module is the program's.

    Returns:
        The options of `swap`, the script or the name of the module with its arguments, and whether it is a module.

    Raises:
        UsageError: if the command line is wrong.
    """
    words, program, as_module = _split(arguments)
    found, unknown = _option_parser().parse_known_args(words)
    if unknown:
        option = unknown[0].partition("=")[0]
        name = option.lstrip("-").replace("-", "_")
        raise UsageError(f"unknown option {option}{hint(name, list(_converters()), of_command=True)}")
    return vars(found), program, as_module


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether an option in front of the script asks for the help."""
    return not {"-h", "--help"}.isdisjoint(_split(arguments)[0])


def _split(words: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """The options, the program with its arguments, and whether it is a module; divided as by `python`."""
    # By hand: argparse drops "--" from the program's arguments, and loses those of "-mNAME".
    with_value = {option_of(name) for name, convert in _converters().items() if convert}
    end = 0
    while end < len(words) and _OPTION.match(words[end]):
        end += 2 if words[end] in with_value else 1
    options, program = list(words[:end]), list(words[end:])
    if program[:1] == ["--"]:
        return options, program[1:], False
    if not program or not program[0].startswith("-m"):
        return options, program, False
    name = program[0].removeprefix("-m")
    return options, [name, *program[1:]] if name else program[1:], True


def options_help() -> str:
    """A paragraph for each option."""
    return _option_parser().format_help().partition("\n\n")[2].rstrip()


def _converters() -> dict[str, Callable[[str], Any] | None]:
    """What reads the value of each option, in the order of the constructor; None for a switch, which has none."""
    wanted = own_options() - _OBJECTS
    arguments = inspect.signature(Adam).parameters
    kinds = {name: str(argument.annotation) for name, argument in arguments.items() if name in wanted}
    return {name: None if kind.startswith("bool") else _NUMBERS.get(kind, _value) for name, kind in kinds.items()}


def _option_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dragon.vm.run",
        # As wide as the rest of the help, whatever the terminal.
        formatter_class=partial(argparse.HelpFormatter, width=115),
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("options of the optimizers, in front of the script")
    meanings = _meanings()
    for name, convert in _converters().items():
        flag, meaning = option_of(name), meanings.get(name)
        if convert:
            group.add_argument(flag, type=convert, help=meaning, metavar="VALUE")
        else:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
    return parser


def _value(text: str) -> Any:
    """A word, a dtype or None by its name, or one of them a state: ``exp_avg=bfloat16,exp_avg_sq=float32``."""
    if text == "None":
        return None
    if "=" in text:
        found: dict[str, Any] = {}
        for state, _, value in (pair.partition("=") for pair in text.split(",")):
            if state in found:
                raise argparse.ArgumentTypeError(f"{state} is named twice in {text!r}")
            found[state] = _value(value)
        return found
    dtype = getattr(torch, text.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else text


def _meanings() -> dict[str, str]:
    """What the constructor's docstring says of each option, if there are docstrings."""
    arguments = inspect.cleandoc(Adam.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\nRaises:")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("`", "").replace("%", "%%") for name, text in found}
