"""Arrows point down only: the imports of every source file, held against the layers of docs/design.md.

The sources are parsed, not imported: an import inside a function or under `TYPE_CHECKING` is an arrow too.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"dragon.vm": ROOT / "dragon_vm", "dragon.kernels": ROOT / "kernels"}
OPTIM = "dragon.vm.torch.optim"

# Lowest first. A module imports from its own layer and from those before it, the package itself from all.
OPTIM_LAYERS = (
    {"_plan", "_scalars"},
    {"_gradients", "_identity", "_memory"},
    {"_containers", "_headers"},
    {"_ema", "_layout", "_norm", "_numbers", "_options", "_plain", "_state"},
    {"_watch"},
    {"_backend", "_chain", "_checks", "_context", "_flatten", "_fused", "_local", "_rows", "_table"},
    {"_flat", "_owner", "_triton", "_native", "_eager"},
    {"_capture", "_device", "_live", "_premises", "_step", "_sums"},
    {"_checkpoint", "_prepared", "optimizer"},
    {"_takeover"},
    {"adam", "adamw", "sgd"},
    {"_swap"},
    {"__init__"},
)

# What these modules must not reach, through any chain of imports.
OUT_OF_REACH = {
    f"{OPTIM}._plan": {"torch", "triton", "numpy"},
    f"{OPTIM}._scalars": {"torch", "triton", "numpy"},
    f"{OPTIM}._native": {"triton"},
    f"{OPTIM}._eager": {"triton"},
}

# Imported when a tensor first takes the triton path. `_backend` asks a kernel module once that is so.
TRITON_SIDE = {f"{OPTIM}.{stem}" for stem in ("_backend", "_context", "_device", "_rows", "_table", "_triton")}


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


@pytest.mark.parametrize("module", modules_of("dragon.kernels"))
def test_kernels_import_only_triton_and_the_standard_library(module: str) -> None:
    foreign = {
        name
        for name in imports(module)
        if not is_inside(name, "triton")
        and not is_inside(name, "dragon.kernels")
        and name.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign == set(), f"{module} imports {sorted(foreign)}; device code knows triton and nothing else"


@pytest.mark.parametrize("module", modules_of("dragon.vm.testing"))
def test_the_parity_kit_knows_nothing_of_what_it_judges(module: str) -> None:
    assert violations(module, {"dragon.vm.torch", "dragon.kernels"}) == []


@pytest.mark.parametrize("module", sorted(set(OUT_OF_REACH) & set(modules())))
def test_what_must_stay_out_of_reach_is(module: str) -> None:
    reached = violations(module, OUT_OF_REACH[module])
    assert reached == [], f"{module} reaches {reached}, directly or through what it imports"


@pytest.mark.parametrize("module", modules_of("dragon.vm.torch"))
def test_tensors_and_modules_know_nothing_of_optimizers(module: str) -> None:
    if module != "dragon.vm.torch" and not is_inside(module, OPTIM):
        assert violations(module, {OPTIM}) == []


@pytest.mark.parametrize("module", modules_of("dragon.vm"))
def test_only_the_triton_backend_imports_triton_or_kernels(module: str) -> None:
    # Tuning is about nothing but kernels: it is imported by the triton backend, and by its own commands.
    if module not in TRITON_SIDE and not is_inside(module, "dragon.vm.tuning"):
        direct = [n for n in imports(module) if is_inside(n, "triton") or is_inside(n, "dragon.kernels")]
        assert direct == [], f"{module} imports {direct}, but has to work where triton is absent"


def optim_layer(module: str) -> int:
    stem = modules()[module].stem
    layers = [layer for layer, stems in enumerate(OPTIM_LAYERS) if stem in stems]
    assert layers, f"{stem}.py has no layer yet: place it in OPTIM_LAYERS, as low as what it imports allows"
    return layers[0]


@pytest.mark.parametrize("module", modules_of(OPTIM))
def test_optimizer_modules_import_only_from_their_layer_and_below(module: str) -> None:
    layer = optim_layer(module)
    upward = {name for name in ours(module) if is_inside(name, OPTIM) and optim_layer(name) > layer}
    assert upward == set(), f"{module} (layer {layer}) imports {sorted(upward)} from above"


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: ours(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
