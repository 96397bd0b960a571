"""The modules of PyTorch that hold parameters: a parameter has no reference to them.

A search of the garbage collector's objects finds them. It takes 0.1 s in a large process, so it is for rare calls.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


def instances(module: str, name: str) -> Iterator[Any]:
    """All objects of exactly one class, if its module is imported and there is a process group.

    FSDP2 and FSDP1 keep gathered parameters with one process too.
    """
    found = getattr(sys.modules.get(module), name, None)
    if found is not None and dist.is_available() and dist.is_initialized():
        yield from [each for each in gc.get_objects() if type(each) is found]


def _fsdp2_groups() -> Iterator[Any]:
    return instances("torch.distributed.fsdp._fully_shard._fsdp_param_group", "FSDPParamGroup")


def reshard(params: Sequence[Tensor]) -> None:
    """Make FSDP2 gather certain parameters anew before it uses them the next time.

    FSDP2 keeps the parameters of a root module whole after a forward pass. It would not see changed shards.
    """
    wanted = set(map(id, params))
    for group in _fsdp2_groups():
        if any(id(each.sharded_param) in wanted for each in group.fsdp_params):
            group.reshard()


def check_accumulated(params: Sequence[Tensor]) -> None:
    """Check, where no parameter has a gradient, that FSDP2 holds none that it has not reduced.

    Raises:
        RuntimeError: if it does: a step would ignore them.
    """
    wanted = set(map(id, params))
    for group in _fsdp2_groups():
        # Sums over the shards of one replica.
        partial = getattr(group, "_partial_reduce_output", None)
        for each in group.fsdp_params:
            whole = getattr(each, "_unsharded_param", None)
            held = partial, each.unsharded_accumulated_grad, None if whole is None else whole.grad
            if id(each.sharded_param) in wanted and any(grad is not None for grad in held):
                raise RuntimeError(
                    "step() finds no gradient, for FSDP2 has not reduced those of the last backward passes: "
                    "before the last one of a step call set_requires_gradient_sync(True), and "
                    "set_requires_all_reduce(True) if replicas were left out"
                )


def check_gathered(params: Sequence[Tensor]) -> None:
    """Check that no trained parameter without a gradient is one that FSDP2 gathered for a pass and has freed.

    Raises:
        RuntimeError: if one is. The model has another one in its place, which no step would update.
    """
    left = (param for param in params if type(param) is Parameter and param.requires_grad and param.grad is None)
    # Others have no storage.
    strided = (param for param in left if param.layout == torch.strided)
    freed = {id(param) for param in strided if param.numel() and not param.untyped_storage().size()}
    groups = _fsdp2_groups() if freed else ()
    if any(id(getattr(each, "_unsharded_param", None)) in freed for group in groups for each in group.fsdp_params):
        raise RuntimeError(
            "the optimizer was made of parameters that FSDP2 had gathered, as after a forward pass, and its steps "
            "would not reach the model: make it before, or behind model.reshard()"
        )


class Replicas:
    """The DDP modules that reduce gradients of parameters, and whether they have reduced the last ones."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        wanted = set(map(id, params))
        modules = instances("torch.nn.parallel.distributed", "DistributedDataParallel") if wanted else ()
        self._modules = [
            weakref.ref(module) for module in modules if any(id(param) in wanted for param in _reduced_by(module))
        ]

    def __bool__(self) -> bool:
        """Whether any DDP module reduced gradients of a parameter at the construction."""
        return bool(self._modules)

    @property
    def are_gone(self) -> bool:
        """Whether some of them is no more: its parameters may have another one now."""
        return len(self._alive()) < len(self._modules)

    def _alive(self) -> list[Any]:
        return [module for reference in self._modules if (module := reference()) is not None]

    def check_joined(self) -> None:
        """Check that a reduction by the step finds all processes.

        Raises:
            RuntimeError: inside of `Join`: processes without batches take part in what DDP reduces alone.
        """
        if any(getattr(getattr(module, "_join_config", None), "enable", False) for module in self._alive()):
            raise RuntimeError(
                "sums of gradients from DDP's no_sync() cannot be reduced inside Join: processes without batches "
                "take no part. Leave no_sync() out there. Behind a Join, enter Join([model], enable=False)"
            )

    def unreduced(self) -> dict[int, Any]:
        """The process group of each parameter, by its id, whose last gradient is this process's alone.

        It is so if the last forward pass ran inside `no_sync`, wherever this is called. After a forward pass
        without gradients it says so too. The mean of means is the same mean then. After another forward pass, with
        gradients and outside of `no_sync`, it does not say so: nothing records which pass a gradient is from.
        """
        modules = [m for m in self._alive() if not m.require_forward_param_sync and m.process_group.size() > 1]
        return {id(param): module.process_group for module in modules for param in _reduced_by(module)}

    def wanting(self) -> set[int]:
        """The ids of parameters that DDP wants a gradient of after a pass inside `no_sync` that has used them.

        With `find_unused_parameters` it counts them as used at its next reduction, whether that pass uses them or
        not. It raises on a process where such a parameter has no gradient, and all others wait.
        """
        modules = [module for module in self._alive() if module.find_unused_parameters]
        return {id(param) for module in modules for param in _reduced_by(module)}


def _reduced_by(module: Any) -> Iterator[Tensor]:
    """The parameters of a DDP module that it was not told to ignore, by the names that it looks up itself."""
    for prefix, child in module.module.named_modules():
        for name, param in child.named_parameters(recurse=False):
            if f"{prefix}.{name}" not in module.parameters_to_ignore:
                yield param
