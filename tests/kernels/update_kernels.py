"""The vector path of the real update in memory modes: what `test_update_code.py` compiles and counts.

Run as a script it prints, as JSON, what the compiler makes of each case: ``python update_kernels.py sm_90``.
"""

import json
import re
import sys
from pathlib import Path

import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))

from dragon.kernels.config import default_config
from dragon.kernels.formats import make_place
from dragon.kernels.inspect.compile import compile_kernel, scratch_cache
from dragon.kernels.inspect.variants import MODES
from dragon.kernels.launch import update_constants, update_options
from dragon.kernels.spec import Spec
from dragon.kernels.tile import VECTOR_NUMEL, load_pair, load_scalars, load_tensors
from dragon.kernels.update import update_kernel, update_tile


@triton.jit
def vector_kernel(
    chunks_ptr, tensors_ptr, grads_ptr, scalars_ptr,
    SPEC: tl.constexpr, CONFIG: tl.constexpr, WARP_SIZE: tl.constexpr,
):  # fmt: skip
    # Triton 3.6 passes text to a function only as a constexpr.
    EVICTION: tl.constexpr = CONFIG.eviction
    row, index = load_pair(chunks_ptr + 2 * (tl.program_id(0).to(tl.int64) + 1), WARP_SIZE)
    row = row.to(tl.int64)
    first = index.to(tl.int64) * CONFIG.chunk
    scalars = load_scalars(scalars_ptr, row, SPEC, WARP_SIZE)
    numel, tensors, source = load_tensors(tensors_ptr, grads_ptr, row, WARP_SIZE)
    whole = tl.multiple_of(numel // VECTOR_NUMEL * VECTOR_NUMEL, VECTOR_NUMEL)
    update_tile(tensors, source, scalars, make_place(first, whole, CONFIG.chunk), None, SPEC, EVICTION, 16)


def straight_pieces(listing: str) -> list[list[str]]:
    """The names of a kernel's instructions, padding left out, cut at labels and after branches."""
    pieces: list[list[str]] = [[]]
    for line in listing.splitlines():
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if found and found[1] != "NOP":
            pieces[-1].append(found[1])
        if line.startswith(".L_") or (found and found[1] == "BRA"):
            pieces.append([])
    return pieces


def report(spec: Spec, arch: str) -> dict[str, float]:
    config = default_config(arch, spec)
    constants, options = update_constants(spec, config), update_options(config)
    listing = compile_kernel(vector_kernel, constants, options, arch).machine_code
    code = [name for piece in straight_pieces(listing) for name in piece]
    # The functions that the kernel calls come behind it: of quotients and roots of numbers out of the usual range.
    own = listing.split("\n$__internal")[0]
    usual = [piece for piece in straight_pieces(own) if "CALL" not in " ".join(piece)]
    whole = compile_kernel(update_kernel, {**constants, "grad_scale_ptr": None}, options, arch)
    elements = config.chunk / (config.n_warps * 32)
    return {
        "instructions": len(code) / elements,
        "usual": sum(map(len, usual)) / elements,
        "shuffles": sum(name.startswith("SHFL") for name in code),
        "spilled_nbytes": whole.spilled_nbytes,
        "registers": whole.registers,
    }


if __name__ == "__main__":
    with scratch_cache():
        print(json.dumps({name: report(spec, sys.argv[1]) for name, spec in MODES.items()}))
