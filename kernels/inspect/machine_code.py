"""In which order NVIDIA's machine code issues the loads of a tile, told by its disassembly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dragon.kernels.inspect.assembly import Frame, Lines

# As `nvdisasm -g -c` prints them:
#   //## File "/folder/formats.py", line 60
#           /*0590*/              @!P0 LDG.E.128 R4, desc[UR12][R34.64] ;
LOCATION = re.compile(r'//## File "(?:.*/)?([^/"]+)", line (\d+)')
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
REGISTER = re.compile(r"\bR(\d+)\b")

# A load of 16 bytes fills as many registers of 4 bytes.
N_REGISTERS = 4


class Instruction(NamedTuple):
    """One instruction: its source line, its name with modifiers, and its operands."""

    frame: Frame
    name: str
    operands: str


def _instructions(code: str) -> Iterator[Instruction]:
    frame = Frame("", 0)
    for line in code.splitlines():
        if location := LOCATION.search(line):
            frame = Frame(location[1], int(location[2]))
        elif found := INSTRUCTION.search(line):
            yield Instruction(frame, found[1], found[2])


def _is_store(name: str) -> bool:
    return name.startswith("ST")


def late_loads(code: str, loader: Lines) -> int | None:
    """Count the tile loads of 16 bytes that are issued after the first use of another one's data.

    The processor waits for the memory once more for such a load.

    Args:
        code: what `nvdisasm -g -c` prints; empty where there is none.
        loader: the function that loads tiles.

    Returns:
        The number; None if no load of 16 bytes was found.
    """
    loaded: set[int] = set()
    is_used = False
    n_loads = n_late = 0
    for frame, name, operands in _instructions(code):
        first, _, rest = operands.partition(",")
        if name.startswith("LDG") and name.endswith(".128") and loader.hold(frame):
            n_loads += 1
            n_late += is_used
            base = int(REGISTER.findall(first)[0])
            loaded.update(range(base, base + N_REGISTERS))
        elif loaded.intersection(map(int, REGISTER.findall(operands if _is_store(name) else rest))):
            is_used = True
    return n_late if n_loads else None
