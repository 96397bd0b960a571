"""The command ``python -m dragon.kernels.inspect``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dragon.kernels import inspect
from dragon.kernels.archs import ARCHS

SUMMARY = "Show registers, spills and the widths of accesses of every kernel. The GPUs need not be there."


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the command line is described by ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m dragon.kernels.inspect", description=SUMMARY)
    parser.add_argument("--arch", action="append", help=f"may be repeated; by default {', '.join(ARCHS)}")
    parser.add_argument(
        "--kernel", action="append", metavar="TEXT", help="only kernels with TEXT in their name; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="a list of reports instead of a table")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write IR, assembly and machine code to DIR")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        # triton has read it by now, and there is nothing to compile in this process.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "dragon.kernels.inspect", *(arguments or sys.argv[1:])]
        return subprocess.run(command, env=environment).returncode
    try:
        reports = inspect.inspect_kernels(options.arch or ARCHS, options.kernel or (), options.dump)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps([report.as_json() for report in reports]) if options.json else inspect.format_table(reports))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
