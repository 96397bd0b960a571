"""``python -m dragon.vm.memory`` is ``dragon-vm memory``."""

import sys

from dragon.vm.tune import console

if __name__ == "__main__":
    sys.exit(console(["memory", *sys.argv[1:]]))
