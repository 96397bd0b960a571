"""What triton's interpreter does otherwise than a GPU is taken out of these tests' way."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_plain_convert = interpreter._convert_float


def _convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Convert between fp32 and bf16 as a GPU does: rounded to nearest even, subnormal numbers included."""
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.left_shift(data.astype(np.uint32), 16)
    return _plain_convert(data, source, target, rounding_mode)


@pytest.fixture(scope="module", autouse=True)
def interpreted_as_on_a_gpu() -> Iterator[None]:
    """The interpreter truncates fp32 to bf16, garbles subnormal numbers on the way, and warns of inf - inf."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", _convert_float)
        yield
