"""`python -m examples.digits`: three runs from one seed, a table, a picture."""

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dragon.vm.measuring.arguments import device, positive
from dragon.vm.torch.optim import Adam
from examples.digits import report
from examples.digits.training import BuildOptimizer, Run, load, n_steps, train

LEARNING_RATE = 1e-3
REFERENCE, OURS, EPSILON_HAT = "torch", "ours", "ours, epsilon_hat=True"

CONTENDERS: dict[str, BuildOptimizer] = {
    REFERENCE: partial(torch.optim.Adam, lr=LEARNING_RATE),
    OURS: partial(Adam, lr=LEARNING_RATE),
    EPSILON_HAT: partial(Adam, lr=LEARNING_RATE, epsilon_hat=True),
}


def main(arguments: list[str] | None = None) -> None:
    """Train with every contender and report to the terminal and into the output folder."""
    options = _options(arguments)
    console = Console()
    runs = _run_all(options.device, options.epochs, options.seed, console)
    picture = options.out / "digits.png"
    report.plot(runs, REFERENCE, picture)
    where = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else str(options.device)
    title = f"{len(runs[REFERENCE].losses)} steps on 1,437 handwritten digits ({where})"
    console.print(report.table(runs, REFERENCE, title))
    console.print(report.conclusion(runs[REFERENCE], runs[OURS], runs[EPSILON_HAT]))
    console.print(f"Loss curves and differences: {picture}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser.add_argument("--device", type=device, default=best, help="default: a GPU if there is one")
    parser.add_argument("--epochs", type=positive, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the picture")
    return parser.parse_args(arguments)


def _run_all(device: torch.device, n_epochs: int, seed: int, console: Console) -> dict[str, Run]:
    digits = load(device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Convolutions that round alike in every run: else gradients differ before an optimizer sees them.
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=n_steps(digits, n_epochs)) for name in CONTENDERS}
        return {
            name: train(digits, build, n_epochs, seed, on_step=partial(progress.advance, tasks[name]))
            for name, build in CONTENDERS.items()
        }


if __name__ == "__main__":
    main()
