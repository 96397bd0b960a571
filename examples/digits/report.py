"""Show what the runs have in common and where they part: a table and a picture."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from examples.digits.training import Run


def table(runs: dict[str, Run], reference: str, title: str) -> Table:
    """Return one row a run; differences are of parameters, from the run called `reference`."""
    result = Table(title=title)
    result.add_column("optimizer", no_wrap=True)
    for heading in ("test accuracy", "final loss", "largest difference", "ms a step"):
        result.add_column(heading, justify="right")
    for name, run in runs.items():
        difference = run.distance_to(runs[reference]).max()
        result.add_row(
            name,
            f"{run.test_accuracy:.2%}",
            f"{run.losses[-1]:.6f}",
            "-" if name == reference else f"{difference:.1e}",
            f"{run.step_ms:.3f}",
        )
    return result


def conclusion(reference: Run, ours: Run, epsilon_hat: Run) -> str:
    """Return three sentences that say what the runs have shown."""
    n_steps = len(reference.losses)
    apart, hat_apart = (run.distance_to(reference).max() for run in (ours, epsilon_hat))
    return (
        f"One network learnt the same {n_steps} batches by torch.optim.Adam and twice by this library. "
        f"With the import as the only change, no parameter was ever further than {apart:.1e} from torch's run. "
        f"With epsilon_hat=True, which adds eps before the bias correction, it was up to {hat_apart:.1e}."
    )


def plot(runs: dict[str, Run], reference: str, path: Path) -> None:
    """Write a PNG: the loss of every run, and how far its parameters are from those of `reference`."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, distances = figure.subplots(1, 2)
    for number, (name, run) in enumerate(runs.items()):
        losses.plot(run.losses, label=name, linewidth=2.5 - 0.8 * number)
        if name != reference:
            distances.plot(run.distance_to(runs[reference]), label=name, color=f"C{number}")
    losses.set(xlabel="step", ylabel="training loss", yscale="log", title="Handwritten digits")
    # Runs that agree to the last bit have distance 0, which a plain logarithmic axis cannot show.
    distances.set_yscale("symlog", linthresh=1e-9)
    distances.set(xlabel="step", ylabel="largest difference of a parameter", title=f"Distance to {reference}")
    distances.set_ylim(bottom=0)
    for axes in (losses, distances):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
