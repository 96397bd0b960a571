"""A process of `dragon.vm.tuning.compiler`: a configuration a line in, what became of it a line out."""

from __future__ import annotations

import json
import sys
from typing import Any

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import PATHS, compile_update
from dragon.kernels.launch import Variant
from dragon.vm.tuning.ranking import Facts


def facts_of(task: dict[str, Any]) -> Facts:
    """Compile one configuration.

    Raises:
        Exception: whatever triton or the assembler raise.
    """
    report = compile_update(Variant(**task["variant"]), LaunchConfig(**task["config"]), task["arch"])
    path = report.paths[PATHS[0]]
    return Facts(
        registers=report.registers,
        spilled_nbytes=report.spilled_nbytes,
        shared_nbytes=report.shared_nbytes,
        is_vectorized=report.is_vectorized,
        loaded_nbytes=sum(width * count for width, count in path.loads.items()),
        instructions=report.instructions_per_element or 0.0,
    )


def main() -> None:
    """Answer until there are no more tasks."""
    # The compiler may print; answers have the pipe to themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = facts_of(json.loads(line))._asdict()
        # Whatever a compiler raises is the answer.
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
