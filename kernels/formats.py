"""How a tensor is stored. The other kernel modules see tiles in the dtype of the maths, and addresses.

A tensor has one part or several, each with an address of its own in the tensor table. Three functions know the
formats; each takes its branch at compile time:

* `open_parts` turns the addresses of a tensor's parts into typed pointers;
* `load_tile` reads the parts of a tile and decodes them;
* `store_tile` encodes a tile, writes its parts, and returns the tile as the next load will see it.

A plain tensor has one part, and its format is the name of its dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

DTYPES: dict[str, tl.dtype] = {
    "float64": tl.float64,
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
}


@triton.constexpr_function
def dtype_of(name):
    """The dtype of a plain format."""
    return DTYPES[name]


@triton.jit
def open_parts(addresses, FORMAT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The typed pointers to a tensor's parts, each known to be a multiple of `ALIGNMENT` bytes."""
    return (tl.multiple_of(addresses[0].to(tl.pointer_type(dtype_of(FORMAT))), ALIGNMENT),)


@triton.jit
def load_tile(parts, offsets, mask, FORMAT: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    """Load a tile in the dtype of the maths; elements outside the mask are 0."""
    return tl.load(parts[0] + offsets, mask=mask, other=0.0, eviction_policy=EVICTION).to(COMPUTE_DTYPE)


@triton.jit
def store_tile(parts, offsets, tile, mask, FORMAT: tl.constexpr, EVICTION: tl.constexpr):
    """Store a tile, rounded to its format, and return the stored tile in the dtype of the maths."""
    stored = tile.to(dtype_of(FORMAT))
    tl.store(parts[0] + offsets, stored, mask=mask, eviction_policy=EVICTION)
    return stored.to(tile.dtype)
