"""Kernels on a GPU and in triton's interpreter: what differs is taken out of these tests' way, and graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from dragon.vm.torch.optim._plan import widening

from .judging import make_params
from .recorded import RecordedGraph

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


@pytest.fixture(scope="module")
def at_once() -> Iterator[None]:
    """Plans for more parameters than have a gradient are made from the second set on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widening, "N_MISSED", 1)
        yield


def capture_on_device(step: Callable[[], Any]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphed(request: Any, device: torch.device) -> Iterator[Any]:
    """Where parameters live, and what turns a step into its replay."""
    if request.param == "cuda":
        yield torch.device("cuda"), capture_on_device
    elif device.type != "cpu":
        pytest.skip("a graph is captured rather than recorded")
    else:
        yield device, RecordedGraph().capture


@pytest.fixture
def theirs() -> Iterator[Any]:
    """PyTorch's module; whatever a test swaps in it is undone."""
    yield torch.optim
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        assert type(kind(make_params())) is kind, "a swap was left in force"
