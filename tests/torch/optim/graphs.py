"""A CUDA graph without a GPU: what a capture would hold back, launches and uploads, runs at each replay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dragon.kernels import launch
from dragon.vm.torch.optim import _triton
from dragon.vm.torch.optim import optimizer as optimizer_module
from dragon.vm.torch.optim._table import DeviceTable

RECORDED = [(launch, name) for name in ("launch_norm", "launch_advance", "launch_update")]
RECORDED.append((_triton, "follow_leaders"))


class RecordedGraph:
    """A capture without a GPU."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._calls: list[Callable[[], Any]] = []

    def capture(self, step: Callable[[], Any]) -> Callable[[], None]:
        """Record a step, of which nothing happens yet; returns what replays it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(optimizer_module, "check_capture", lambda *_: None)
            patch.setattr(DeviceTable, "upload", lambda table: self._record_upload(table))
            for module, name in RECORDED:
                patch.setattr(module, name, self._recorder(name, getattr(module, name)))
            step()
        return self.replay

    def replay(self) -> None:
        for call in self._calls:
            call()

    def _recorder(self, name: str, function: Callable[..., Any]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            self.names.append(name)
            self._calls.append(lambda: function(*args, **kwargs))

        return record

    def _record_upload(self, table: Any) -> None:
        first, end = table._changed
        words, target = table._words[first:end].clone(), table._buffer[first:end]
        table._changed = (0, 0)
        if len(words):
            self.names.append("upload")
            self._calls.append(lambda: target.copy_(words))
