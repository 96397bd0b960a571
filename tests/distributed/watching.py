"""Counts the collectives that run in a block, and notices when the host waits for a device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What reads a tensor's values on the host.
_READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero")


class Watch(TorchDispatchMode):
    """Sees each operation of a block.

    Attributes:
        collectives: for each collective its name and the bytes of its tensors.
        waits: operations that read a value on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "barrier", "_wrap")):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.collectives.append((name.partition(".")[0], sum(tensor.nbytes for tensor in tensors)))
        elif namespace == "aten" and name.partition(".")[0] in _READS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))
