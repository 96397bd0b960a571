"""Which cases and contenders a command line means."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import CASES, PRECISIONS, Case, Precision
from benchmarks.contenders import CONTENDERS, TORCH_FUSED, Contender

SETS = ("quick", "full")


def _matching(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Known names that contain one of the texts, in their own order; a whole name means that one only."""
    chosen: set[str] = set()
    for text in names:
        found = [text] if text in known else [name for name in known if text.lower() in name.lower()]
        if not found:
            raise ValueError(f"no {what} is called {text!r}; there are {', '.join(known)}")
        chosen.update(found)
    return [name for name in known if name in chosen]


def choose_cases(names: Sequence[str], precisions: Sequence[str], which: str) -> list[tuple[Case, Precision]]:
    """Cases by parts of their names, or those of a set, with each of their dtypes that is wanted.

    Raises:
        ValueError: for a name that no case has.
    """
    if names:
        cases = [CASES[name] for name in _matching(names, list(CASES), "case")]
    else:
        cases = [case for case in CASES.values() if case.quick or which == "full"]
    wanted = _matching(precisions, list(PRECISIONS), "dtype") if precisions else list(PRECISIONS)
    if which == "quick" and not names and not precisions:
        wanted = ["fp32"]
    return [(case, precision) for case in cases for precision in case.precisions if precision.name in wanted]


def choose_contenders(names: Sequence[str], which: str) -> list[Contender]:
    """Contenders by parts of their names, or those of a set, with torch's fused Adam, which ratios are to.

    Raises:
        ValueError: for a name that no contender has.
    """
    chosen = {TORCH_FUSED, *_matching(names, list(CONTENDERS), "contender")}
    if not names:
        chosen = {name for name, contender in CONTENDERS.items() if which == "full" or not contender.slow}
    return [contender for name, contender in CONTENDERS.items() if name in chosen]
