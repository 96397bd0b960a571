"""Arrows point down only: the imports of every source file, held against the floors of docs/design.md.

The sources are parsed, not imported: an import inside a function or under `TYPE_CHECKING` is an arrow too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"dragon.vm": ROOT / "dragon_vm", "dragon.kernels": ROOT / "kernels"}
OPTIM = "dragon.vm.torch.optim"
KERNELS = "dragon.kernels"

# The floors of the house, from top to bottom: folders, and files that are a station on their own.
# A station imports from floors below its own.
FLOORS = (
    {"_swap", "adamw"},
    {"_counterparts"},
    {"adam", "sgd"},
    {"optimizer"},
    {"_takeover"},
    {"_storage"},
    {"_accumulate"},
    {"_release"},
    {"_plan", "_averages", "_sums"},
    {"_backends", "_checkpoint"},
    {"_groups", "_table"},
    {"_algorithms"},
    {"_formats", "_gradients"},
    {"_distributed", "_graphs", "_options", "_hints", "_hooks", KERNELS},
    {"_introspection", "_devices", "_modes"},
)
FOLDERS_OF_OPTIM = {
    "_plan", "_backends", "_groups", "_table", "_algorithms", "_formats", "_gradients", "_distributed", "_graphs",
}  # fmt: skip

# Who knows what kernels are: these are imported once a tensor takes the triton path, or they import kernels within
# a function.
TRITON_SIDE = {
    f"{OPTIM}._backends.triton", f"{OPTIM}._backends.context", f"{OPTIM}._backends.configs",
    f"{OPTIM}._backends.partials", f"{OPTIM}._backends.launches",
    f"{OPTIM}._table.group_table", f"{OPTIM}._groups.eligibility",
}  # fmt: skip

# What these modules must not reach, through any chain of imports.
OUT_OF_REACH = {f"{OPTIM}._table.chunks": {"torch", "triton", "numpy"}}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ATTRIBUTES, MAX_WAY_LINES = 300, 60, 10, 2000


@cache
def modules() -> dict[str, Path]:
    """Every module of the two import packages with its file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(source: str, package: str) -> Iterator[str]:
    """Yield the absolute name of everything that `source`, a module of `package`, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules() else base


@cache
def imports(module: str) -> tuple[str, ...]:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return tuple(imported(path.read_text(encoding="utf-8"), package))


@cache
def ours(module: str) -> frozenset[str]:
    """The modules of this project that `module` imports."""
    return frozenset(name for name in imports(module) if name in modules() and name != module)


def reach(module: str) -> set[str]:
    """All names that `module` imports, and what those import, and so on."""
    reached: set[str] = set()
    pending = [module]
    while pending:
        for name in imports(pending.pop()):
            if name not in reached:
                reached.add(name)
                if name in modules():
                    pending.append(name)
    return reached


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(module: str, forbidden: set[str]) -> list[str]:
    return sorted(name for name in reach(module) for package in forbidden if is_inside(name, package))


def modules_of(package: str) -> list[str]:
    return sorted(name for name in modules() if is_inside(name, package))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import triton.language as tl", "triton.language"),
        ("from triton import language", "triton"),
        ("def f():\n    import torch", "torch"),
        ("if TYPE_CHECKING:\n    from torch import Tensor", "torch"),
        ("from . import nn", "dragon.vm.torch.nn"),
        ("from .nn import Parameter", "dragon.vm.torch.nn"),
        ("from .. import testing", "dragon.vm.testing"),
        ("from dragon.vm import torch", "dragon.vm.torch"),
    ],
)
def test_every_form_of_import_is_seen(source: str, name: str) -> None:
    assert list(imported(source, "dragon.vm.torch")) == [name]


def station(module: str) -> str:
    """The folder of the optimizers, or the file, that a module belongs to; of other packages their name."""
    if not is_inside(module, OPTIM):
        return KERNELS if is_inside(module, KERNELS) else module
    return module.removeprefix(OPTIM).lstrip(".").split(".")[0]


def floor(module: str) -> int:
    floors = [index for index, stations in enumerate(FLOORS) if station(module) in stations]
    assert floors, f"{module} stands on no floor yet: place it in FLOORS, as low as what it imports allows"
    return floors[0]


STATIONED = [module for module in modules_of(OPTIM) if module != OPTIM]


def test_every_folder_of_the_house_exists_and_no_other() -> None:
    folders = {path.parent.name for path in (FOLDERS["dragon.vm"] / "torch" / "optim").glob("*/*.py")}
    assert folders == FOLDERS_OF_OPTIM
    stations = set().union(*FLOORS)
    assert stations == {station(module) for module in STATIONED} | {KERNELS}


def test_the_page_has_the_same_floors() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| floor | what it does |\n|---|---|\n")[2].partition("\n\n")[0]
    floors = [set(re.findall(r"`([\w.]+)`", row.split("|")[1])) for row in table.splitlines()]
    assert floors == list(FLOORS)


@pytest.mark.parametrize("module", STATIONED)
def test_arrows_between_folders_point_down_only(module: str) -> None:
    upward = {
        name
        for name in ours(module)
        if (is_inside(name, OPTIM) or is_inside(name, KERNELS))
        and station(name) != station(module)
        and floor(name) <= floor(module)
    }
    assert upward == set(), f"{module} (floor {floor(module)}) imports {sorted(upward)}, which is no floor below"


@pytest.mark.parametrize("module", modules_of(KERNELS))
def test_kernels_import_only_triton_and_the_standard_library(module: str) -> None:
    foreign = {
        name
        for name in imports(module)
        if not is_inside(name, "triton")
        and not is_inside(name, KERNELS)
        and name.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign == set(), f"{module} imports {sorted(foreign)}; device code knows triton and nothing else"


@pytest.mark.parametrize("module", modules_of("dragon.vm.testing"))
def test_the_parity_kit_knows_nothing_of_what_it_judges(module: str) -> None:
    assert violations(module, {"dragon.vm.torch", KERNELS}) == []


@pytest.mark.parametrize("module", sorted(OUT_OF_REACH))
def test_what_must_stay_out_of_reach_is(module: str) -> None:
    reached = violations(module, OUT_OF_REACH[module])
    assert reached == [], f"{module} reaches {reached}, directly or through what it imports"


@pytest.mark.parametrize("module", modules_of("dragon.vm.torch"))
def test_tensors_and_modules_know_nothing_of_optimizers(module: str) -> None:
    if module != "dragon.vm.torch" and not is_inside(module, OPTIM):
        assert violations(module, {OPTIM}) == []


@pytest.mark.parametrize("module", modules_of("dragon.vm.torch"))
def test_only_the_triton_side_imports_triton_or_kernels(module: str) -> None:
    if module not in TRITON_SIDE:
        direct = [n for n in imports(module) if is_inside(n, "triton") or is_inside(n, KERNELS)]
        assert direct == [], f"{module} imports {direct}, but has to work where triton is absent"


@pytest.mark.parametrize("module", modules_of("dragon.vm.torch"))
def test_optimizers_import_nothing_of_tuning_or_testing(module: str) -> None:
    assert violations(module, {"dragon.vm.tuning", "dragon.vm.testing"}) == []


@pytest.mark.parametrize("module", modules_of("dragon.vm.torch"))
def test_nothing_reads_raw_memory(module: str) -> None:
    assert not [name for name in imports(module) if is_inside(name, "ctypes") or is_inside(name, "_ctypes")]


SOURCES = [module for package in ("dragon.vm.torch", KERNELS) for module in modules_of(package)]


def n_lines(module: str) -> int:
    return len(modules()[module].read_text(encoding="utf-8").splitlines())


def n_doc_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return len((ast.get_docstring(node, clean=False) or "").splitlines())


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_read_on_a_page(module: str) -> None:
    assert n_lines(module) < MAX_FILE_LINES
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1 - n_doc_lines(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length >= MAX_FUNCTION_LINES} == {}


def attributes(node: ast.ClassDef) -> set[str]:
    """Names that the methods of a class write to on their first argument."""
    return {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute)
        and isinstance(child.ctx, ast.Store)
        and isinstance(child.value, ast.Name)
        and child.value.id == "self"
    }


@pytest.mark.parametrize("module", SOURCES)
def test_no_class_keeps_more_than_ten_attributes(module: str) -> None:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    counts = {node.name: len(attributes(node)) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert {name: count for name, count in counts.items() if count > MAX_ATTRIBUTES} == {}


def test_the_way_of_one_step_is_read_in_an_evening() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    chapter = page.split("## Read it in an evening")[1].split("## ")[0]
    files: list[str] = re.findall(r"`([\w/]+\.py)`", chapter)
    paths = [
        path for name in files for path in (ROOT / name, ROOT / "dragon_vm/torch/optim" / name) if path.exists()
    ]
    assert len(re.findall(r"^\d+\. `", chapter, re.MULTILINE)) == 10
    assert len(paths) == len(files) == 13
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert sum(map(len, map(str.splitlines, texts))) <= MAX_WAY_LINES
    # Where the page names a method, it is there.
    named = re.findall(r"`([\w/]+\.py)`: `\w+\.(\w+)`", chapter)
    assert len(named) == 3
    for name, method in named:
        assert f"def {method}(" in texts[files.index(name)]


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: ours(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
