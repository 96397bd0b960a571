"""`python -m benchmarks.probe`: each measurement is one JSON line, the most valuable ones first.

A part that fails says so in a line, and the next part runs; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, in triton's interpreter, tiny tensors")
    parser.add_argument("--part", action="append", default=[], help="a part's name; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("build", "benchmarks", "probe.jsonl"), metavar="FILE")
    options = parser.parse_args(arguments)
    if options.dry:
        # Read once, when triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.probe.harness import Probe
    from benchmarks.probe.parts import PARTS

    if unknown := set(options.part) - set(PARTS):
        parser.error(f"--part {sorted(unknown)[0]!r} is unknown; there are {', '.join(PARTS)}")
    try:
        made = Probe(options.out, options.dry)
    except RuntimeError as error:
        parser.error(str(error))
    with made as probe:
        for name, part in PARTS.items():
            if not options.part or name in options.part:
                probe.run(name, part)
    return 1 if probe.n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
