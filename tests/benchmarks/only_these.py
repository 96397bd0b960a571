"""An environment in which only some distributions can be imported, for processes of a test."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from pathlib import Path

# Python imports this module when it starts: no top-level name of another distribution is found from then on.
SITECUSTOMIZE = """
import sys

class Finder:
    def __init__(self, inner):
        self.inner = inner

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.inner.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.inner, name)

sys.meta_path[:] = map(Finder, sys.meta_path)
"""

REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_requirements(roots: Sequence[str]) -> set[str]:
    """Distributions and all that they require, extras left out."""
    found: set[str] = set()
    queue = [_canonical(name) for name in roots]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in requirements:
            if "extra ==" not in requirement and (match := REQUIREMENT.match(requirement)):
                queue.append(_canonical(match[0]))
    return found


def only(folder: Path, *roots: str) -> dict[str, str]:
    """Environment variables of a process that can import only these distributions and what they require.

    Args:
        folder: an empty folder, for a module that Python imports at its start.
        roots: names of distributions.
    """
    allowed = _with_requirements(roots)
    hidden = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if not allowed & set(map(_canonical, distributions)) and name != "dragon"
    }
    # The hook of an editable install is a hidden module, too.
    hidden = {name for name in hidden if not name.startswith("__editable__")}
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(names=hidden))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
