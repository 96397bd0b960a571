"""What interrupts a call at a bytecode."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

# Python reports what is raised in the callback of a weak reference, and goes on: nobody can raise there.
WEAKREF_CALLBACK = WeakIdKeyDictionary()._remove.__code__


class Interrupt(KeyError, IndexError, AttributeError, RuntimeError, TypeError):
    """Raised in the middle of a step. It is of each type that an `except` could swallow."""


class Tracer:
    """Counts the bytecodes of a call, and raises at one of them.

    Args:
        at: the bytecode; None to count only.
        folder: of the source files whose bytecodes count; empty for all.
    """

    def __init__(self, at: int | None, folder: str = "") -> None:
        self.at, self.folder, self.count = at, folder, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "call":
            if not self._counts_in(frame):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self
        if event == "exception" and isinstance(arg, tuple) and arg[0] is GeneratorExit:
            # Python ignores what is raised where it closes a generator. No signal handler runs there.
            frame.f_trace_opcodes = False
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise Interrupt
        return self

    def _counts_in(self, frame: FrameType) -> bool:
        callers = [each.f_code for each in (frame, frame.f_back) if each]
        return frame.f_code.co_filename.startswith(self.folder) and WEAKREF_CALLBACK not in callers

    def _instruction(self, code: CodeType, offset: int) -> None:
        frame = sys._getframe(1)
        if code is not Tracer.run.__code__ and self._counts_in(frame):
            self(frame, "opcode", None)

    def run(self, call: Callable[[], Any]) -> None:
        if sys.version_info >= (3, 13):
            # There `sys.settrace` forgets about bytecodes once something was raised.
            monitoring, tool = sys.monitoring, sys.monitoring.DEBUGGER_ID
            monitoring.use_tool_id(tool, "tests")
            monitoring.register_callback(tool, monitoring.events.INSTRUCTION, self._instruction)
            monitoring.set_events(tool, monitoring.events.INSTRUCTION)
            try:
                call()
            finally:
                monitoring.set_events(tool, 0)
                monitoring.free_tool_id(tool)
            return
        before = sys.gettrace()
        # Python 3.12 counts bytecodes only if it was asked to before.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)
