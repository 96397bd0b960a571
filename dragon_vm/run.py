"""Run an unmodified script with our optimizers: ``python -m dragon.vm.run script.py arguments ...``."""

from __future__ import annotations

import atexit
import builtins
import importlib.util
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.machinery import BuiltinImporter, ModuleSpec, SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple

from dragon.vm._children import flush_stdout, include_children, print_findings, print_report, say
from dragon.vm._run_options import UsageError, asks_for_help, options_help, parse
from dragon.vm.torch.optim import swap
from dragon.vm.torch.optim._swap import Swap

USAGE = "usage: python -m dragon.vm.run [option ...] {script.py | -m module} [argument ...]"
HELP = f"""{USAGE}

Run a script, a folder or a module as `python` does. torch.optim.Adam, AdamW and SGD build those of
dragon.vm.torch.optim in it. At the end a report on stderr says what was replaced, and what was not and why.

Processes that the script starts by multiprocessing build ours too. Those that it starts otherwise build PyTorch's:
put the launcher in front.
  torchrun --nproc-per-node 2 -m dragon.vm.run train.py --your-arguments
  accelerate launch --module dragon.vm.run train.py --your-arguments

The options are those of swap(), and hold for every optimizer that is replaced:
  python -m dragon.vm.run --state-dtype 8bit train.py --your-arguments

{options_help()}"""
HINT = """  Programs that a script starts build PyTorch's own; a launcher goes in front:
  torchrun -m dragon.vm.run script.py, or accelerate launch --module dragon.vm.run script.py"""

# What stands for the script if it comes from the standard input.
STDIN = "-"

# Of `main`, for a script that Ctrl-C ended.
INTERRUPTED = -2


class CannotRunError(Exception):
    """There is nothing to run; the text and the exit code are those of `python`."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class Program(NamedTuple):
    """What runs as `__main__`."""

    code: CodeType
    path: str
    loader: Any
    spec: ModuleSpec | None = None  # None for a script


def main(arguments: Sequence[str], end: ExitStack | None = None) -> int:
    """Run a script, or a module after ``-m``, as `python` would, and report what was replaced.

    Args:
        arguments: options of `swap`, then the script and its arguments.
        end: closed by the caller when the program's threads and exit handlers are done too: the swap is in force
            until then, and the report is printed there. None for the end of this call.

    Returns:
        The exit code: 0, 1 after an uncaught exception, without the module or a reader of the help, 2 without the
        script and for a wrong option.

    Raises:
        SystemExit: what the script raised.
    """
    if end is None:
        with ExitStack() as end:
            return main(arguments, end)
    if asks_for_help(arguments):
        return _print_help()
    try:
        options, argv, as_module = parse(arguments)
        if not argv:
            raise UsageError("there is nothing to run")
        swapped = end.enter_context(swap(**options))
    except (UsageError, TypeError, ValueError) as error:
        print(f"{USAGE}\npython -m dragon.vm.run: error: {error}", file=sys.stderr)
        return 2
    end.callback(include_children(swapped))
    try:
        code = _prepared(argv, as_module)
        end.callback(_report, swapped, os.getpid())
        exec(code, vars(sys.modules["__main__"]))
    except CannotRunError as error:
        print(f"{sys.executable}: {error}", file=sys.stderr)
        return error.status
    except SystemExit:
        raise
    # Some scripts raise classes of their own beside `Exception`.
    except BaseException as error:
        flush_stdout()
        _print_error(error)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _print_help() -> int:
    try:
        print(HELP, flush=True)
    except BrokenPipeError:
        # Python writes the rest of the output when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _report(swapped: Swap, process: int) -> None:
    if os.getpid() != process:
        # The script has forked it: a child that says what itself has built.
        print_findings(swapped)
        return
    print_report(swapped)
    if not swapped.replaced and swapped.rank == 0:
        say(HINT)


def _prepared(argv: list[str], as_module: bool) -> CodeType:
    """The code of the program, for which ``sys`` has its arguments, its folder and its ``__main__``."""
    sys.argv = argv
    name = argv[0]
    is_script = not as_module and (name == STDIN or pkgutil.get_importer(name) is None)
    # Python 3.10 has no flag of its own for it.
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        # The folder in which `python` would look for the script's own modules.
        folder = Path(name).resolve().parent if is_script else Path.cwd() if as_module else Path(name).absolute()
        sys.path[0] = "" if is_script and name == STDIN else str(folder)
    found = _script(name) if is_script else _module(name) if as_module else _folder(_absolute(name))
    if as_module:
        argv[0] = found.path
    module = ModuleType("__main__")
    module.__file__ = found.path
    module.__loader__ = found.loader
    module.__spec__ = found.spec
    module.__package__ = found.spec.parent if found.spec else None
    if "__cached__" in globals():
        # Python before 3.15.
        vars(module)["__cached__"] = found.spec.cached if found.spec else None
    # The module, whose attributes scripts read and set: `exec` would put its dictionary there.
    vars(module)["__builtins__"] = builtins
    # It stays: exit handlers and threads may outlast the script, and pickle its classes.
    sys.modules["__main__"] = module
    return found.code


def _absolute(path: str) -> str:
    """The path from the root on; ".." stays, since what is above a link's target is not above the link."""
    return str(Path(path).absolute())


def _script(path: str) -> Program:
    if path == STDIN:
        name = "<stdin>"
        # There is none if it was closed: to `python` that is an empty script.
        source = b"" if sys.stdin is None else sys.stdin.buffer.read()
        return Program(compile(source, name, "exec", dont_inherit=True), name, BuiltinImporter)
    absolute = _absolute(path)
    if path.endswith(".pyc"):
        loader = SourcelessFileLoader("__main__", absolute)
        code = loader.get_code("__main__")
        assert code is not None
        return Program(code, absolute, loader)
    try:
        with io.open_code(absolute) as file:
            source = file.read()
    except OSError as error:
        raise CannotRunError(
            f"can't open file {absolute!r}: [Errno {error.errno}] {error.strerror}", status=2
        ) from None
    code = compile(source, absolute, "exec", dont_inherit=True)
    return Program(code, absolute, SourceFileLoader("__main__", absolute))


def _folder(path: str) -> Program:
    """A folder or an archive with a module ``__main__``."""
    importer = pkgutil.get_importer(path)
    spec = None if importer is None else importer.find_spec("__main__", None)
    if spec is None:
        raise CannotRunError(f"can't find '__main__' module in {path!r}")
    return _of_spec(spec, "__main__")


def _module(name: str) -> Program:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        text = f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})"
        raise CannotRunError(text) from None
    if spec is not None and spec.submodule_search_locations is not None:
        package, name = name, f"{name}.__main__"
        spec = importlib.util.find_spec(name)
        if spec is None:
            text = f"No module named {name}; {package!r} is a package and cannot be directly executed"
            raise CannotRunError(text)
    if spec is None:
        raise CannotRunError(f"No module named {name}")
    return _of_spec(spec, name)


def _of_spec(spec: ModuleSpec, name: str) -> Program:
    # Not by class: the loader of archives is no `InspectLoader`.
    get_code = getattr(spec.loader, "get_code", None)
    code = None if get_code is None else get_code(name)
    if code is None:
        raise CannotRunError(f"No code object available for {name}")
    return Program(code, spec.origin or code.co_filename, spec.loader, spec)


def _print_error(error: BaseException) -> None:
    """Print an uncaught exception as `python` would, without the frames that ran the script."""
    error = error.with_traceback(_inside(error.__traceback__))
    # Exit handlers read these to tell whether the script failed.
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    sys.excepthook(type(error), error, error.__traceback__)


def _inside(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that is below this file and the import system; None if nothing is."""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        # Frozen, or a file in Python 3.10.
        if name not in (__file__, importlib.util.__file__) and not name.startswith("<frozen importlib"):
            break
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    end = ExitStack()
    # Registered before the script's handlers, it is called behind them.
    atexit.register(end.close)
    exit_code = main(sys.argv[1:], end)
    if exit_code == INTERRUPTED:
        # `python` ends by the signal, after its exit handlers. The traceback has been printed.
        sys.excepthook = lambda *_: None
        raise KeyboardInterrupt
    sys.exit(exit_code)
