"""Graphs on a GPU, and recorded ones without."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ..recorded import RecordedGraph


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
