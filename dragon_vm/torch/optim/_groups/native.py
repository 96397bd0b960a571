"""The native form of a state: the parts of values by name, and the number that says how they are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dragon.vm.torch.optim._distributed.shards import local
from dragon.vm.torch.optim._formats.resolve import MOMENTS

# Entries of a state with what a parameter lacks of its master.
MASTER_PARTS = ("param_remainder", "param_master")
# The entry of PyTorch's form that has a master in fp32.
MASTER = "master_param"
# The entry of a native state that says how its parts are to be read. PyTorch's flat dicts take numbers alone: the
# version of the format, followed by the dimensions in the order in which the saved codes are walked, the innermost
# last and two digits each, if it is not that of a contiguous tensor.
FORMAT_KEY, FORMAT = "storage", 1
# The moments by the names of their codes.
CODES = {f"{name}_q8": name for name in MOMENTS}
_PARTS = {*MASTER_PARTS, MASTER, *CODES, *(f"{name}_scale" for name in MOMENTS)}


def parts_of(state: Mapping[str, Any]) -> set[str]:
    """Names of the entries that hold a part of something, and of the number that belongs to them."""
    found = _PARTS.intersection(state)
    return found | ({FORMAT_KEY} & state.keys() if found else set())


def format_number(state: Mapping[str, Any]) -> int:
    """The value of `FORMAT_KEY` for a state with parts."""
    for key in filter(state.__contains__, CODES):
        codes = local(state[key]) if local(state[key]).numel() else state[key]
        # Rows are outermost, also where a process has one of them.
        order = [0, *sorted(range(1, codes.ndim), key=lambda dim: -codes.stride(dim))]
        if [dim for dim in order if codes.shape[dim] > 1] != [d for d, n in enumerate(codes.shape) if n > 1]:
            return int(str(FORMAT) + "".join(f"{dim:02}" for dim in order))
    return FORMAT


def walking_order(number: Any, n_dims: int) -> list[int]:
    """The dimensions of saved codes in the order in which they are walked.

    Raises:
        ValueError: for what is no value of `FORMAT_KEY`.
    """
    digits = str(int(number)) if hasattr(number, "__int__") else ""
    order = [int(digits[i : i + 2]) for i in range(1, len(digits), 2)] or list(range(n_dims))
    if digits[:1] != str(FORMAT) or sorted(order) != list(range(n_dims)):
        raise ValueError(f"expected {FORMAT}, or {FORMAT} and the dimensions in walking order, got {number!r}")
    return order
