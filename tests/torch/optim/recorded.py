"""A CUDA graph without a GPU: what a capture would hold back, launches and uploads, runs at each replay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dragon.kernels.launch import Launcher
from dragon.vm.torch.optim import optimizer as optimizer_module
from dragon.vm.torch.optim._table.table import DeviceTable


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
            patch.setattr(DeviceTable, "captured_copy", lambda *args: self._record_copy(*args))
            plain = Launcher.__call__
            patch.setattr(Launcher, "__call__", lambda *args: self._record_launch(plain, *args))
            step()
        return self.replay

    def replay(self) -> None:
        for call in self._calls:
            call()

    def _record_launch(self, plain: Callable[..., None], launcher: Launcher, *tables: torch.Tensor) -> None:
        self.names.append(launcher.name)
        self._calls.append(lambda: plain(launcher, *tables))

    def _record_copy(self, table: DeviceTable, name: str, words: Any) -> torch.Tensor:
        source = torch.frombuffer(words, dtype=torch.int64).clone()
        target = torch.zeros_like(table.section(name))
        self.names.append("upload")
        self._calls.append(lambda: target[: len(source)].copy_(source))
        return target
