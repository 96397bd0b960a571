"""Processes that are forked from one that has imported torch, each as fresh as one of its own.

To import torch takes 1.7 s of a processor, and PyTorch's first optimizer imports its compiler in as long again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# What a step takes long to import; triton is among it.
SETUP = "import torch, torch._dynamo"

# Python without this process's part in its start, for a shell script. It passes on what descriptors it has.
CLIENT = """#!{python} -IS
import json, os, socket, sys

# But that of the folder itself, which is closed by now.
passed = [n for n in map(int, os.listdir("/dev/fd")) if n > 2 and os.path.exists(f"/dev/fd/{{n}}")]
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), passed])
    socket.send_fds(connection, [request.encode()], [0, 1, 2, *passed])
    status = int(connection.recv(16))
sys.exit(status if status >= 0 else 128 - status)
"""


class Ended(NamedTuple):
    """What became of a process."""

    code: int
    out: str
    err: str


class Forking:
    """A context in which command lines of `python` run in processes that are forked from one.

    Args:
        environment: of that one. What PyTorch and triton read when they are imported holds for all.
        setup: code that it runs.
        options: of its `python`.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, setup: str = SETUP, options: Sequence[str] = ()
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="forking-")
        self._address = str(Path(self._folder, "socket"))
        self._environment = environment
        script = str(Path(__file__).with_name("forked_program.py"))
        self._command = [sys.executable, *options, script, self._address, setup]

    def __enter__(self) -> Forking:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, env=self._environment, cwd=self._folder, stdin=pipe, stdout=pipe
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()
        shutil.rmtree(self._folder)

    def run(
        self,
        *arguments: object,
        cwd: str | Path,
        env: Mapping[str, str] | None = None,
        given: str = "",
        printing_to: int | None = None,
    ) -> Ended:
        """Run `python` with these arguments, of which the first is ``-m``, ``-c`` or a script.

        It reads `given` from its standard input, and may print to a descriptor of this process.
        """
        environment = dict(os.environ if env is None else env)
        with (
            tempfile.TemporaryFile() as source,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        ):
            source.write(given.encode())
            source.seek(0)
            connection.connect(self._address)
            request = json.dumps([list(map(str, arguments)), str(cwd), environment, []]).encode()
            socket.send_fds(connection, [request], [source.fileno(), printing_to or out.fileno(), err.fileno()])
            status = int(connection.recv(16))
            for file in (out, err):
                file.seek(0)
            return Ended(status, out.read().decode(), err.read().decode())

    def executable(self, path: Path) -> Path:
        """Write a program that a shell script or a launcher can call instead of `python`, and return its path."""
        path.write_text(CLIENT.format(python=sys.executable, address=self._address), encoding="utf-8")
        path.chmod(0o755)
        return path
