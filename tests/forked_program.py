"""What a `Forking` runs: imports what it is told to, and forks a process for each program that it is sent."""

import atexit
import fcntl
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

# The standard ones, and what processes of multiprocessing inherit.
MAX_FILES = 16


class Child(NamedTuple):
    """A program that runs."""

    number: int
    """Of its process."""
    ending: int
    """A descriptor of it, which can be read once it has ended."""
    client: socket.socket
    """To whoever asked for it, and nothing more is received from there."""


def _settle(children: list[Child], ready: list[Any]) -> None:
    """Tell clients how their programs ended, and end the programs of clients that are gone."""
    for child in list(children):
        if child.ending in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(child.number, 0)[1])
            with suppress(OSError):
                child.client.send(str(status).encode())
            _forget(child)
            children.remove(child)
        elif child.client in ready:
            os.kill(child.number, signal.SIGKILL)


def _forget(child: Child) -> None:
    os.close(child.ending)
    child.client.close()


def program(address: str) -> list[str]:
    """Fork for each connection, also while others run: in a new process, its command line."""
    children: list[Child] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            # The end of the input is the end of whoever started this process.
            watched = [listener, 0, *(file for child in children for file in (child.ending, child.client))]
            ready = select.select(watched, [], [])[0]
            _settle(children, ready)
            if 0 in ready:
                for child in children:
                    os.kill(child.number, signal.SIGKILL)
                sys.exit()
            if listener in ready:
                connection, _ = listener.accept()
                message, files, *_ = socket.recv_fds(connection, 1 << 20, MAX_FILES)
                number = os.fork()
                if number == 0:
                    break
                list(map(os.close, files))
                children.append(Child(number, os.pidfd_open(number), connection))
    connection.close()
    list(map(_forget, children))
    arguments, folder, environment, passed = json.loads(message)
    # Out of the way of the numbers that they are to have.
    files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 100) for file in files]
    for number, file in zip((0, 1, 2, *passed), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # So torchrun names it, and others start what is given here.
    sys.executable = environment.get("PYTHON_EXEC", sys.executable)
    multiprocessing.set_executable(sys.executable)
    first = list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [*first, *(path for path in sys.path if path not in first)]
    return arguments


def hush_bindings(pid: int) -> None:
    """Let those of triton 3.9 say nothing of other processes than this one: of forks, which end within its calls.

    They take what these hold for leaks. At the end of all exits a program has said what it has to say.
    """
    with suppress(PackageNotFoundError):
        if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9):
            atexit.register(lambda: os.getpid() == pid or os.dup2(os.open(os.devnull, os.O_WRONLY), 2))


def run(arguments: list[str]) -> None:
    """As `python` does with such a command line; its options, such as `-u`, are those of this process."""
    first = next(i for i, word in enumerate(arguments) if word in ("-c", "-m") or not word.startswith("-"))
    arguments = arguments[first:]
    kind = arguments[0]
    if kind == "-m":
        sys.argv[:] = ["-m", *arguments[2:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(arguments[1])
    elif kind == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(os.path.abspath(kind), run_name="__main__")


if __name__ == "__main__":
    # This file's folder, in which others have names of packages.
    del sys.path[0]
    _, where, setup = sys.argv
    # First, for exits are in reverse order.
    hush_bindings(os.getpid())
    exec(setup)
    __import__("gc").freeze()
    # Behind it this process ends as Python does: by an exception, or at the end of the file.
    run(program(where))
