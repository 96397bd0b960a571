"""``python -m dragon.vm.tune``, the same as ``dragon-vm tune``, and the way in of the console script."""

from __future__ import annotations

import sys


def console(arguments: list[str] | None = None) -> None:
    """Run the console script, or say what it lacks."""
    try:
        from dragon.vm.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f'{error.name} is not installed: pip install "dragon-vm-torch[cli]"')
    app(arguments, prog_name="dragon-vm")


if __name__ == "__main__":
    console(["tune", *sys.argv[1:]])
