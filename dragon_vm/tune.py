"""``python -m dragon.vm.tune``, the same as ``dragon-vm tune``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command with this process's arguments."""
    try:
        from dragon.vm.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f'{error.name} is not installed: pip install "dragon-vm-torch[cli]"')
    app(["tune", *sys.argv[1:]], prog_name="dragon-vm")


if __name__ == "__main__":
    main()
