"""How a tensor is stored. The other kernel modules see tiles in the dtype of the maths, and addresses.

A tensor has one part or two, each with an address of its own in the tensor table. Three functions know the
formats; each takes its branch at compile time:

* `open_parts` turns the addresses of a tensor's parts into typed pointers;
* `load_tile` reads the parts of a tile and decodes them;
* `store_tile` encodes a tile, writes its parts, and returns the tile as the next load will see it.

A plain tensor has one part, and its format is the name of its dtype. The others are named as on the host:

* "bfloat16_stochastic", "bfloat16_upward": bf16 with another rounding;
* "split16", "split8", "split8_stochastic": a master as bf16 and what that lacks of it;
* "bfloat16_master", "float16_master": an fp32 master beside the parameter;
* "q8_signed", "q8_square", "q8_square_stochastic": 8-bit codes, and a scale for each block of 64.

A tile is described by `place`, the tuple ``(offsets, mask, first, end)``: elements ``first + arange``, of which
those before `end` exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dragon.kernels import blockwise, rounding
from dragon.kernels.maths import square_root

DTYPES: dict[str, tl.dtype] = {
    "float64": tl.float64,
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
}

# The dtypes of the parts of each format that is not plain.
PARTS: dict[str, tuple[tl.dtype, ...]] = {
    "bfloat16_stochastic": (tl.bfloat16,),
    "bfloat16_upward": (tl.bfloat16,),
    "split16": (tl.bfloat16, tl.int16),
    "split8": (tl.bfloat16, tl.int8),
    "split8_stochastic": (tl.bfloat16, tl.int8),
    "bfloat16_master": (tl.bfloat16, tl.float32),
    "float16_master": (tl.float16, tl.float32),
    "q8_signed": (tl.int8, tl.float32),
    "q8_square": (tl.uint8, tl.float32),
    "q8_square_stochastic": (tl.uint8, tl.float32),
}

BLOCK = blockwise.BLOCK


@triton.constexpr_function
def dtype_of(name):
    """The dtype of a plain format."""
    return DTYPES[name]


@triton.constexpr_function
def n_parts(name):
    """The number of a format's parts."""
    return 1 if name in DTYPES else len(PARTS[name])


@triton.constexpr_function
def part_dtype(name, index):
    """The dtype of one part."""
    return DTYPES[name] if name in DTYPES else PARTS[name][index]


@triton.constexpr_function
def is_one_of(name, names):
    """Whether a format is one of those named, with spaces between."""
    return name in names.split()


@triton.jit
def make_place(first, end, NUMEL: tl.constexpr):
    """The `place` of a tile of `NUMEL` elements from `first` on."""
    offsets = first + tl.arange(0, NUMEL)
    return offsets, offsets < end, first, end


@triton.jit
def _scale_place(place):
    """Offsets and mask of the scales of a tile of whole blocks."""
    N_SCALES: tl.constexpr = place[0].shape[0] // BLOCK
    offsets = place[2] // BLOCK + tl.arange(0, N_SCALES)
    return offsets, offsets < place[3] // BLOCK


@triton.jit
def _typed(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def open_parts(addresses, FORMAT: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The typed pointers to a tensor's parts, each known to be a multiple of `ALIGNMENT` bytes."""
    first = _typed(addresses[0], part_dtype(FORMAT, 0), ALIGNMENT)
    if n_parts(FORMAT) > 1:
        return first, _typed(addresses[1], part_dtype(FORMAT, 1), ALIGNMENT)
    else:
        return (first,)


@triton.jit
def load_tile(parts, place, FORMAT: tl.constexpr, COMPUTE_DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    """Load a tile in the dtype of the maths; elements outside the mask are 0."""
    if is_one_of(FORMAT, "bfloat16_master float16_master"):
        tile = tl.load(parts[1] + place[0], mask=place[1], other=0.0, eviction_policy=EVICTION)
    else:
        tile = tl.load(parts[0] + place[0], mask=place[1], other=0, eviction_policy=EVICTION)
        if is_one_of(FORMAT, "q8_signed q8_square q8_square_stochastic"):
            offsets, mask = _scale_place(place)
            scale = tl.load(parts[1] + offsets, mask=mask, other=0.0, eviction_policy=EVICTION)
            if is_one_of(FORMAT, "q8_signed"):
                tile = blockwise.decode_signed(tile, scale)
            else:
                tile = blockwise.decode_square(tile, scale)
        elif n_parts(FORMAT) > 1:
            rest = tl.load(parts[1] + place[0], mask=place[1], other=0, eviction_policy=EVICTION)
            tile = rounding.join_16(tile, rest) if is_one_of(FORMAT, "split16") else rounding.join_8(tile, rest)
        elif is_one_of(FORMAT, "bfloat16_stochastic bfloat16_upward"):
            tile = rounding.wide_bfloat16(tile)
    return tile.to(COMPUTE_DTYPE)


@triton.jit
def store_tile(parts, place, tile, words, FORMAT: tl.constexpr, EVICTION: tl.constexpr):
    """Store a tile, rounded to its format, and return the stored tile in the dtype of the maths.

    `words` are int32 in [0, 65536), one for each element; anything if the format is not stochastic.
    """
    if is_one_of(FORMAT, "q8_signed q8_square q8_square_stochastic"):
        _store_blocks(parts, place, tile, words, FORMAT, EVICTION)
        return tile
    elif n_parts(FORMAT) > 1:
        half, rest = _halves(tile, words, FORMAT)
        tl.store(parts[0] + place[0], half, mask=place[1], eviction_policy=EVICTION)
        tl.store(parts[1] + place[0], rest, mask=place[1], eviction_policy=EVICTION)
        # Of the formats that are split in two, only this one rounds.
        return rounding.join_8(half, rest) if is_one_of(FORMAT, "split8 split8_stochastic") else tile
    else:
        stored = _rounded(tile, words, FORMAT)
        tl.store(parts[0] + place[0], stored, mask=place[1], eviction_policy=EVICTION)
        return stored.to(tile.dtype)


@triton.jit
def _rounded(tile, words, FORMAT: tl.constexpr):
    """The only part of a tile."""
    if is_one_of(FORMAT, "bfloat16_stochastic"):
        return rounding.stochastic_bfloat16(tile, words)
    elif is_one_of(FORMAT, "bfloat16_upward"):
        return rounding.upward_bfloat16(tile)
    elif is_one_of(FORMAT, "bfloat16"):
        return rounding.nearest_bfloat16(tile.to(tl.float32))
    else:
        return tile.to(dtype_of(FORMAT))


@triton.jit
def _halves(tile, words, FORMAT: tl.constexpr):
    """The two parts of a parameter with a master."""
    if is_one_of(FORMAT, "split16"):
        return rounding.split_16(tile)
    elif is_one_of(FORMAT, "split8"):
        return rounding.split_8(tile, words, False)
    elif is_one_of(FORMAT, "split8_stochastic"):
        return rounding.split_8(tile, words, True)
    elif is_one_of(FORMAT, "bfloat16_master"):
        return rounding.nearest_bfloat16(tile), tile
    else:
        return tile.to(tl.float16), tile


@triton.jit
def _store_blocks(parts, place, tile, words, FORMAT: tl.constexpr, EVICTION: tl.constexpr):
    if is_one_of(FORMAT, "q8_signed"):
        codes, scale = blockwise.encode_signed(tile)
    else:
        STOCHASTIC: tl.constexpr = is_one_of(FORMAT, "q8_square_stochastic")
        codes, scale = blockwise.encode_square(tile, square_root(tile), words, STOCHASTIC)
    offsets, mask = _scale_place(place)
    tl.store(parts[0] + place[0], codes, mask=place[1], eviction_policy=EVICTION)
    tl.store(parts[1] + offsets, scale, mask=mask, eviction_policy=EVICTION)
