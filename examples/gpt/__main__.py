"""Train a small GPT once in each memory mode, from one seed; print a table and draw the loss curves."""

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dragon.vm.measuring.arguments import device, positive
from examples.gpt import report
from examples.gpt.modes import MODES, why_not
from examples.gpt.training import Run, train


def main(arguments: list[str] | None = None) -> None:
    """Train in every mode that is asked for and report to the terminal and into the output folder."""
    options = _options(arguments)
    console = Console()
    refusals = {name: why_not(MODES[name]) for name in options.modes}
    runs = _run_all(options, [name for name, refusal in refusals.items() if refusal is None], console)
    for name, refusal in refusals.items():
        if refusal is not None:
            console.print(f"{name} is left out, this version has no such mode: {refusal}", markup=False)
    if not runs:
        return
    picture = options.out / "gpt.png"
    report.plot(runs, picture)
    n_params = next(iter(runs.values())).n_params
    title = f"{options.steps} steps of a GPT with {n_params:,} parameters ({options.device})"
    console.print(report.table(runs, title))
    console.print(
        "Each mode began with the same weights and saw the same text. The bytes are those of weights and states. "
        "They leave out gradients and activations.\n"
        f"Loss curves and memory: {picture}"
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.gpt", description=__doc__)
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser.add_argument("--steps", type=positive, default=300, help="of each mode; default: 300")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=list(MODES),
        metavar="MODE",
        help=f"default: all, {', '.join(MODES)}",
    )
    parser.add_argument("--device", type=device, default=best, help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/gpt"), help="folder for the picture")
    return parser.parse_args(arguments)


def _run_all(options: argparse.Namespace, names: list[str], console: Console) -> dict[str, Run]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=options.steps) for name in names}
        return {
            name: train(
                MODES[name],
                options.steps,
                options.seed,
                options.device,
                on_step=partial(progress.advance, tasks[name]),
            )
            for name in names
        }


if __name__ == "__main__":
    main()
