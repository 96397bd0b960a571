"""``python -m dragon.vm.doctor`` is ``dragon-vm doctor``."""

import sys

from dragon.vm.tune import console

if __name__ == "__main__":
    sys.exit(console(["doctor", *sys.argv[1:]]))
