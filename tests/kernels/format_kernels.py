"""An Adam step of one chunk in every storage format: what `test_format_code.py` compiles and counts.

Run as a script it prints, as JSON, what the compiler makes of each case: ``python format_kernels.py sm_90``.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton import knobs

from dragon.kernels import blockwise, rounding
from dragon.kernels.inspect.compile import compile_kernel, scratch_cache

CHUNK, N_WARPS = 1024, 4
ELEMENTS = CHUNK // (N_WARPS * 32)

# Formats of the parameter, the first and the second moment, and whether divisions and roots are the fast ones.
CASES = {
    "float32": ("float32", "float32", "float32", False),
    "float32 fast": ("float32", "float32", "float32", True),
    "split16": ("split16", "float32", "float32", False),
    "split16 fast": ("split16", "float32", "float32", True),
    "bfloat16 nearest fast": ("bfloat16", "bfloat16", "bfloat16", True),
    "bfloat16 stochastic": ("bfloat16_stochastic", "bfloat16", "bfloat16_stochastic", False),
    "bfloat16 stochastic fast": ("bfloat16_stochastic", "bfloat16", "bfloat16_stochastic", True),
    "split8 + q8": ("split8", "q8_signed", "q8_square", False),
    "split8 + q8 fast": ("split8", "q8_signed", "q8_square", True),
    "split8 + q8 stochastic": ("split8_stochastic", "q8_signed", "q8_square_stochastic", False),
    "split8 + q8 stochastic fast": ("split8_stochastic", "q8_signed", "q8_square_stochastic", True),
    "float32 + q8 fast": ("float32", "q8_signed", "q8_square", True),
}


@triton.jit
def _pointer(tensors_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.multiple_of(tl.load(tensors_ptr + COLUMN).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _wide(tile):
    return rounding.wide_bfloat16(tile) if tile.dtype == tl.bfloat16 else tile


@triton.jit
def _load_param(param_ptr, remainder_ptr, PARAM: tl.constexpr):
    param = tl.load(param_ptr)
    if PARAM == "split8" or PARAM == "split8_stochastic":
        param = rounding.join_8(param, tl.load(remainder_ptr))
    elif PARAM == "split16":
        param = rounding.join_16(param, tl.load(remainder_ptr))
    else:
        param = _wide(param)
    return param


@triton.jit
def _store_param(param_ptr, remainder_ptr, param, words, PARAM: tl.constexpr):
    if PARAM == "split8" or PARAM == "split8_stochastic":
        half, remainder = rounding.split_8(param, words, PARAM == "split8_stochastic")
        tl.store(param_ptr, half)
        tl.store(remainder_ptr, remainder)
    elif PARAM == "split16":
        half, remainder = rounding.split_16(param)
        tl.store(param_ptr, half)
        tl.store(remainder_ptr, remainder)
    elif PARAM == "bfloat16_stochastic":
        tl.store(param_ptr, rounding.stochastic_bfloat16(param, words))
    elif PARAM == "bfloat16":
        tl.store(param_ptr, rounding.nearest_bfloat16(param))
    else:
        tl.store(param_ptr, param)


@triton.jit
def _store_states(
    exp_avg_ptr, exp_avg_scale_ptr, exp_avg_sq_ptr, exp_avg_sq_scale_ptr, exp_avg, exp_avg_sq, root, words,
    EXP_AVG_SQ: tl.constexpr,
):  # fmt: skip
    if EXP_AVG_SQ == "q8_square" or EXP_AVG_SQ == "q8_square_stochastic":
        codes, scale = blockwise.encode_signed(exp_avg)
        tl.store(exp_avg_ptr, codes)
        tl.store(exp_avg_scale_ptr, scale)
        codes, scale = blockwise.encode_square(exp_avg_sq, root, words, EXP_AVG_SQ == "q8_square_stochastic")
        tl.store(exp_avg_sq_ptr, codes)
        tl.store(exp_avg_sq_scale_ptr, scale)
    elif EXP_AVG_SQ == "bfloat16_stochastic":
        tl.store(exp_avg_ptr, rounding.nearest_bfloat16(exp_avg))
        tl.store(exp_avg_sq_ptr, rounding.stochastic_bfloat16(exp_avg_sq, words))
    elif EXP_AVG_SQ == "bfloat16":
        tl.store(exp_avg_ptr, rounding.nearest_bfloat16(exp_avg))
        tl.store(exp_avg_sq_ptr, rounding.nearest_bfloat16(exp_avg_sq))
    else:
        tl.store(exp_avg_ptr, exp_avg)
        tl.store(exp_avg_sq_ptr, exp_avg_sq)


@triton.jit
def _adam(param, grad, exp_avg, exp_avg_sq, scalars_ptr, BOUNDED: tl.constexpr, FAST: tl.constexpr):
    exp_avg = tl.load(scalars_ptr) * exp_avg + tl.load(scalars_ptr + 1) * grad
    exp_avg_sq = tl.load(scalars_ptr + 2) * exp_avg_sq + tl.load(scalars_ptr + 3) * grad * grad
    root = tl.sqrt(exp_avg_sq) if FAST else tl.sqrt_rn(exp_avg_sq)
    if BOUNDED:
        exp_avg = rounding.clamp_moment(exp_avg, root, tl.load(scalars_ptr + 6))
    denom = root + tl.load(scalars_ptr + 5)
    update = exp_avg / denom if FAST else tl.div_rn(exp_avg, denom)
    return param - tl.load(scalars_ptr + 4) * update, exp_avg, exp_avg_sq, root


@triton.jit
def format_kernel(
    # int64: addresses of param, remainder, grad, exp_avg, its scale, exp_avg_sq, its scale; then first element,
    # seed, step, stream
    tensors_ptr,
    # fp32, whatever its type: beta1, 1 - beta1, beta2, 1 - beta2, step size, eps, bound
    scalars_ptr,
    PARAM: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    FAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    IS_Q8: tl.constexpr = EXP_AVG == "q8_signed"
    STATE: tl.constexpr = tl.float32 if EXP_AVG == "float32" else tl.bfloat16
    REMAINDER: tl.constexpr = tl.int16 if PARAM == "split16" else tl.int8
    PARAM_DTYPE: tl.constexpr = tl.float32 if PARAM == "float32" else tl.bfloat16
    start = tl.program_id(0).to(tl.int64) * CHUNK
    offsets = start + tl.arange(0, CHUNK)
    blocks = start // 64 + tl.arange(0, CHUNK // 64)
    param_ptr = _pointer(tensors_ptr, 0, PARAM_DTYPE) + offsets
    remainder_ptr = _pointer(tensors_ptr, 1, REMAINDER) + offsets
    exp_avg_ptr = _pointer(tensors_ptr, 3, tl.int8 if IS_Q8 else STATE) + offsets
    exp_avg_scale_ptr = _pointer(tensors_ptr, 4, tl.float32) + blocks
    exp_avg_sq_ptr = _pointer(tensors_ptr, 5, tl.uint8 if IS_Q8 else STATE) + offsets
    exp_avg_sq_scale_ptr = _pointer(tensors_ptr, 6, tl.float32) + blocks

    param = _load_param(param_ptr, remainder_ptr, PARAM)
    grad = _wide(tl.load(_pointer(tensors_ptr, 2, PARAM_DTYPE) + offsets))
    exp_avg = tl.load(exp_avg_ptr)
    exp_avg_sq = tl.load(exp_avg_sq_ptr)
    if IS_Q8:
        exp_avg = blockwise.decode_signed(exp_avg, tl.load(exp_avg_scale_ptr))
        exp_avg_sq = blockwise.decode_square(exp_avg_sq, tl.load(exp_avg_sq_scale_ptr))
    else:
        exp_avg = _wide(exp_avg)
        exp_avg_sq = _wide(exp_avg_sq)
    param, exp_avg, exp_avg_sq, root = _adam(
        param, grad, exp_avg, exp_avg_sq, scalars_ptr.to(tl.pointer_type(tl.float32)), EXP_AVG != "float32", FAST
    )
    # Words that no format takes are not computed.
    first = tl.multiple_of(tl.load(tensors_ptr + 7), 8) + start
    words, others = rounding.random_words(
        first, tl.load(tensors_ptr + 8), tl.load(tensors_ptr + 9), tl.load(tensors_ptr + 10), CHUNK
    )
    _store_param(param_ptr, remainder_ptr, param, words, PARAM)
    _store_states(
        exp_avg_ptr, exp_avg_scale_ptr, exp_avg_sq_ptr, exp_avg_sq_scale_ptr, exp_avg, exp_avg_sq, root, others,
        EXP_AVG_SQ,
    )  # fmt: skip


def machine_code(cubin: bytes) -> list[str]:
    """The names of the instructions of a kernel, padding left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing)
    return [name for name in found if name != "NOP"]


def report(name: str, arch: str) -> dict[str, float]:
    param, exp_avg, exp_avg_sq, fast = CASES[name]
    constants = {"PARAM": param, "EXP_AVG": exp_avg, "EXP_AVG_SQ": exp_avg_sq, "FAST": fast, "CHUNK": CHUNK}
    compiled = compile_kernel(format_kernel, constants, {"num_warps": N_WARPS, "enable_fp_fusion": False}, arch)
    code = machine_code(bytes(compiled.asm["cubin"]))
    slow = ("MUFU", "F2F", "I2F", "F2I", "I2I")
    return {
        "instructions": len(code) / ELEMENTS,
        "slow": sum(name.startswith(slow) for name in code) / ELEMENTS,
        "shuffles": sum(name.startswith("SHFL") for name in code),
        "barriers": sum(name.startswith("BAR") for name in code),
        "spilled_nbytes": compiled.spilled_nbytes,
        "shared_nbytes": compiled.shared_nbytes,
        "registers": compiled.registers,
    }


if __name__ == "__main__":
    with scratch_cache():
        print(json.dumps({name: report(name, sys.argv[1]) for name in sys.argv[2:] or CASES}))
