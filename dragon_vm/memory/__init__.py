"""``dragon-vm memory`` or ``python -m dragon.vm.memory``: the bytes that each memory mode takes for a model.

The model is built without memory.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm._words import counted
from dragon.vm.torch.optim._formats.resolve import StorageOptions
from dragon.vm.torch.optim._groups.storage import storage_of

STATES = ("exp_avg", "exp_avg_sq")
# Largest first; bytes of each.
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


class ModelError(ValueError):
    """There is no table of the model that was named; the text says why."""


class Row(NamedTuple):
    """One mode of a table."""

    dtype: torch.dtype  # of the parameters
    arguments: str  # of the optimizer
    kept: int  # bytes of parameters, masters and states
    gradients: int  # bytes


MODES: tuple[tuple[torch.dtype, StorageOptions], ...] = (
    (torch.float32, StorageOptions()),
    (torch.float32, StorageOptions(torch.bfloat16)),
    (torch.float32, StorageOptions("8bit")),
    (torch.bfloat16, StorageOptions(torch.float32, None, torch.float32)),
    (torch.bfloat16, StorageOptions(torch.float32, None, "split16")),
    (torch.bfloat16, StorageOptions(torch.bfloat16, None, "split16")),
    (torch.bfloat16, StorageOptions(torch.bfloat16, None, "split8")),
    (torch.bfloat16, StorageOptions("8bit", None, "split8")),
    (torch.bfloat16, StorageOptions(torch.float32, True)),
    (torch.bfloat16, StorageOptions(torch.bfloat16, True)),
    (torch.bfloat16, StorageOptions("8bit", True)),
)

_REFUSED: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (torch.nn.parameter.is_lazy, "lazy parameters, which have no shape yet"),
    # Their states have their own dtype, which no mode changes.
    (Tensor.is_complex, "complex parameters, for which there are no modes"),
    (lambda param: param.layout != torch.strided, "sparse parameters, which Adam does not take"),
)


def make_on_meta(path: str) -> torch.nn.Module:
    """Call a factory of a module, "package.module:factory", on the meta device.

    Raises:
        ModelError: for a path that names no such factory, and for a model that has no table.
        RuntimeError: for an `OSError` of the module or the factory.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ModelError(f'--model: expected "module:factory", got {path!r}')
    if module.startswith("."):
        raise ModelError(f"--model: the module must be absolute, got {path!r}")
    try:
        factory = _find(module, name)
        with torch.device("meta"):
            model = factory()
    except OSError as error:
        # Not one of this command, which would be a line without a traceback.
        raise RuntimeError(f"--model: {path} failed: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"--model: {path} must return a torch.nn.Module, got {type(model).__name__}")
    for is_refused, text in _REFUSED:
        trained = ((name, param) for name, param in model.named_parameters() if param.requires_grad)
        if names := [name for name, param in trained if is_refused(param)]:
            raise ModelError(f"--model: {path} has {text}: {', '.join(names)}")
    return model


def _find(module: str, name: str) -> Callable[[], Any]:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # One that this module imports is an error of its own, with a traceback.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModelError(
            f"--model: there is no module {error.name!r} in this folder, PYTHONPATH or the installed packages"
        ) from None
    if not hasattr(found, name):
        raise ModelError(f"--model: {module} has no {name!r}")
    factory: Callable[[], Any] = getattr(found, name)
    if isinstance(factory, torch.nn.Module):
        raise ModelError(f"--model: {module}:{name} is a module already: name a function or a class that makes it")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(f"--model: {module}:{name} cannot be called without arguments: {error}") from None
    except ValueError:
        # A builtin that does not tell its arguments.
        pass
    return factory


def rows(params: Sequence[Tensor]) -> list[Row]:
    """The table of parameters that lie in memory as these do, for each mode."""
    found = []
    for dtype, options in MODES:
        group = {**options._asdict(), "differentiable": False}
        stored = [torch.empty_like(param, dtype=dtype, device="meta") for param in params]
        kept = sum(storage_of(param, group, STATES).nbytes(param.numel()) for param in stored)
        gradients = sum(param.nbytes for param in stored)
        arguments = [f"{name}={value!r}" for name, value in options._asdict().items() if value is not None]
        found.append(Row(dtype, ", ".join(arguments), kept, gradients))
    return found


def unit_of(nbytes: int) -> str:
    """The largest unit of which a number of bytes is a tenth or more: three decimals are three digits then."""
    return next((name for name, scale in UNITS.items() if nbytes >= scale / 10), "KiB")


def main(path: str) -> int:
    """Print the table; modules of the present folder are found, as with ``python -m``."""
    sys.path.insert(0, "")
    params = [param for param in make_on_meta(path).parameters() if param.requires_grad]
    numel = sum(param.numel() for param in params)
    print(f"{path}: {numel:,} trained parameters in {counted(len(params), 'tensor')}")
    if not numel:
        return 1
    table = rows(params)
    unit = unit_of(min(row.kept for row in table))
    scale = UNITS[unit]
    print(f"{'weights':9} {'bytes a parameter':>17} {unit:>9} {f'{unit} with grads':>14}  arguments of Adam")
    for row in table:
        dtype = str(row.dtype).removeprefix("torch.")
        sizes = f"{row.kept / numel:17.3f} {row.kept / scale:9.3f} {(row.kept + row.gradients) / scale:14.3f}"
        print(f"{dtype:9} {sizes}  {row.arguments}")
    return 0
