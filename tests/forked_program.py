"""What a `Forking` runs: imports what it is told to, and forks a process for each program that it is sent."""

import json
import os
import runpy
import select
import socket
import sys


def program(address: str) -> list[str]:
    """Fork for each connection: in a new process, its command line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        # The end of the input is the end of whoever started this process.
        while listener in select.select([listener, 0], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
                child = os.fork()
                if child == 0:
                    break
                list(map(os.close, files))
                connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
        else:
            sys.exit()
    arguments, folder, environment = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first = list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [*first, *(path for path in sys.path if path not in first)]
    return arguments


def run(arguments: list[str]) -> None:
    """As `python` does with such a command line."""
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
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    # This file's folder, in which others have names of packages.
    del sys.path[0]
    _, where, setup = sys.argv
    exec(setup)
    __import__("gc").freeze()
    # Behind it this process ends as Python does: by an exception, or at the end of the file.
    run(program(where))
