"""Which memory accesses the machine code makes on which path of a kernel, told by its source locations."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# A source location with the calls it was inlined through, innermost first, as the assembly printers comment it:
#   .loc 2 17 19   // formats.py:17:19 @[ update.py:73:63 @[ update.py:139:74 ] ]
LOCATION = re.compile(r"^\s*\.loc\s+(\d+ \d+ \d+)(?:.*\binlined_at (\d+ \d+ \d+))?.*?(?://|;)\s*(.*)")
INLINE = re.compile(r"^\s*// (begin|end) inline asm")
FRAME = re.compile(r"([\w.]+):(\d+)(?::\d+)?")

PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d+))?\.[bfus](\d+)\b")
# In words ("dwordx4", "ushort"), and since RDNA 3 in bits ("b128", "d16_hi_u16").
GCN_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_(?:(dword)x(\d+)|(?:d16_(?:hi_)?)?[biu](\d+)|([a-z]+))"
)
GCN_NBYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}

# Labels, directives and comments are no instructions; a predicate in front of one is no hindrance.
INSTRUCTION = re.compile(r"^\s+(?:@!?%\w+\s+)?[a-z][\w.:]*(?:\s|;|$)")


class Frame(NamedTuple):
    """One level of a location: file name without its folder, and line."""

    file: str
    line: int


class Lines(NamedTuple):
    """A range of lines of a source file, both ends included."""

    file: str
    first: int
    last: int

    def hold(self, frame: Frame) -> bool:
        """Whether the frame is on one of these lines."""
        return frame.file == self.file and self.first <= frame.line <= self.last


class Accesses(NamedTuple):
    """What one path does to tensors in global memory.

    Attributes:
        loads, stores: number of instructions by bytes an access.
        instructions: all of the path's instructions, address and scalar arithmetic included.
    """

    loads: Mapping[int, int]
    stores: Mapping[int, int]
    instructions: int

    @property
    def nbytes(self) -> int:
        """Bytes that a thread loads and stores."""
        return sum(width * n for counts in (self.loads, self.stores) for width, n in counts.items())


def lines_of(function: Any) -> Lines:
    """The lines of a `triton.jit` function."""
    lines, first = inspect.getsourcelines(function.fn)
    return Lines(Path(inspect.getfile(function.fn)).name, first, first + len(lines) - 1)


def calls_in(function: Any, callee: str) -> list[Lines]:
    """The lines of each call of `callee` in a `triton.jit` function, in the order of the source."""
    lines, first = inspect.getsourcelines(function.fn)
    file = Path(inspect.getfile(function.fn)).name
    tree = ast.parse(textwrap.dedent("".join(lines)))
    calls = [
        Lines(file, first + node.lineno - 1, first + (node.end_lineno or node.lineno) - 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == callee
    ]
    return sorted(calls)


def _access(line: str) -> tuple[bool, int] | None:
    """Whether the line stores to global memory, and how many bytes; None if it is no access."""
    if ptx := PTX_ACCESS.search(line):
        return ptx[1] == "st", int(ptx[2] or 1) * int(ptx[3]) // 8
    if gcn := GCN_ACCESS.search(line):
        nbytes = int(gcn[4]) // 8 if gcn[4] else GCN_NBYTES[gcn[2] or gcn[5]] * int(gcn[3] or 1)
        return gcn[1] == "store", nbytes
    return None


def _nearest(ways: Sequence[list[Frame]], before: Sequence[Frame]) -> list[Frame]:
    """Of the ways to a location, told last first, the one that parts last and nearest from the code before."""

    def distance(way: Sequence[Frame]) -> tuple[int, int]:
        gaps = [abs(own.line - other.line) for own, other in zip(reversed(way), reversed(before), strict=False)]
        n_common = next((i for i, gap in enumerate(gaps) if gap), len(gaps))
        return -n_common, sum(gaps[n_common : n_common + 1])

    return min(reversed(ways), key=distance, default=[])


def _instructions(assembly: str) -> Iterator[tuple[list[Frame], str]]:
    """Each instruction with the calls that it was inlined through, innermost first."""
    frames: list[Frame] = []
    # Triton 3.8 names the call alone that a location was inlined through:
    #   .loc 3 17 19, function_name $L__info_string0, inlined_at 1 73 63 // formats.py:17:19
    # Where that call stands has been said before, once for each way there.
    ways: defaultdict[str | None, list[list[Frame]]] = defaultdict(list)
    is_inline = False
    for line in assembly.splitlines():
        if inline := INLINE.match(line):
            is_inline = inline[1] == "begin"
        # Within inline assembly it counts one source line on for each line.
        elif not is_inline and (location := LOCATION.match(line)):
            found = [Frame(file, int(number)) for file, number in FRAME.findall(location[3])]
            found += _nearest(ways[location[2]], frames)
            known = ways[location[1]]
            known[:] = [*(way for way in known if way != found), found]
            # Line 0 stands for "merged or made by the compiler": it belongs to where it stands.
            frames = found if found and found[0].line else frames
        elif INSTRUCTION.match(line):
            yield frames, line


def _is_in(frames: Sequence[Frame], functions: Sequence[Lines]) -> bool:
    return bool(frames) and any(function.hold(frames[0]) for function in functions)


def accesses_by_path(
    assembly: str, paths: Mapping[str, Lines], table_readers: Sequence[Lines]
) -> dict[str, Accesses]:
    """Count the tensor accesses and instructions of each path.

    Args:
        assembly: PTX or AMD's, with line information.
        paths: by name, the lines of the call that is the path.
        table_readers: functions that read tables; their accesses are not to tensors and are not counted.

    Returns:
        The counts by path; a path of which nothing is left has zeros.
    """
    loads: dict[str, Counter[int]] = {name: Counter() for name in paths}
    stores: dict[str, Counter[int]] = {name: Counter() for name in paths}
    instructions: Counter[str] = Counter()
    for frames, line in _instructions(assembly):
        for name, path in paths.items():
            if any(map(path.hold, frames)):
                instructions[name] += 1
                access = _access(line)
                if access and not _is_in(frames, table_readers):
                    (stores if access[0] else loads)[name][access[1]] += 1
    return {name: Accesses(dict(loads[name]), dict(stores[name]), instructions[name]) for name in paths}


def loads_in(assembly: str, functions: Sequence[Lines]) -> int:
    """Count the load instructions that stand in some functions, wherever these were inlined."""
    accesses = (_access(line) for frames, line in _instructions(assembly) if _is_in(frames, functions))
    return sum(1 for access in accesses if access is not None and not access[0])
