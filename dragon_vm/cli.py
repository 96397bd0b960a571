"""The console script ``dragon-vm``: what its options are. What they do is in `dragon.vm.tuning.commands`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Tools around dragon.vm.torch.")

# Seconds. A GPU's common kernels take less than ten minutes, the compiler alone less than two.
TUNING_BUDGET, RANKING_BUDGET = 540.0, 105.0

PAGE_WIDTH = 240

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """A time such as "90", "90s", "10m" or "1h" in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f'expected a time like "90s" or "10m", got {text!r}')
    return float(found[1]) * _UNITS[found[2]]


def arch(text: str) -> str:
    """An architecture's name."""
    from dragon.vm.tuning.identity import is_arch

    if not is_arch(text):
        raise typer.BadParameter(f'expected a name like "sm_90" or "gfx942", got {text!r}')
    return text


def make_console() -> Console:
    """The terminal, or a page wide enough for every table where nobody watches."""
    console = Console()
    return console if console.is_terminal else Console(width=PAGE_WIDTH)


@app.command()
def tune(
    case: Annotated[
        list[str] | None, typer.Option(help="large, transformer or small; may be repeated; all without it.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Part of a kernel variant's name, such as adam; or all.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the parameters: fp32, bf16, fp16, fp64.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODULE:FACTORY", help="Tune for the shapes of your model.")
    ] = None,
    time_budget: Annotated[
        float | None, typer.Option(parser=seconds, metavar="TIME", help="As in 90s or 10m.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run ended.")] = False,
    arch: Annotated[
        str | None,
        typer.Option(parser=arch, metavar="ARCH", help="Compile and rank for a GPU that is not here, as sm_90."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print what is in force, and why.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write results to a file; with --arch, its estimates.", dir_okay=False)
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Store results of another machine.", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of time over configurations.", dir_okay=False)
    ] = None,
) -> None:
    """Tune the kernels on the present GPU, on scratch memory, and store what is fastest."""
    console = make_console()
    if importlib.util.find_spec("triton") is None:
        console.print("triton is not installed, and there are no kernels to tune without it.")
        raise typer.Exit(1)
    from dragon.vm.tuning import commands
    from dragon.vm.tuning.jobs import JobError, plan_jobs, plan_model_jobs, select_cases, select_variants

    try:
        variants = select_variants(kernel, dtype)
        jobs = plan_model_jobs(model, variants) if model else plan_jobs(select_cases(case or []), variants)
    except JobError as error:
        raise typer.BadParameter(str(error)) from None
    if import_ is not None:
        status = commands.import_results(console, import_)
    elif show:
        status = commands.show(console, jobs, arch)
    elif plot is not None:
        status = commands.plot_results(console, plot, arch)
    elif dry_run:
        status = commands.dry_run(console, jobs, arch)
    elif arch is not None:
        status = commands.rank_here(console, jobs, arch, time_budget or RANKING_BUDGET, export)
    elif export is not None:
        status = commands.export_results(console, export)
    else:
        status = commands.tune_here(console, jobs, time_budget or TUNING_BUDGET, resume)
    raise typer.Exit(status)


@app.command()
def doctor() -> None:
    """Print versions, devices, backends and tuning files, and test each backend for a second."""
    from dragon.vm.doctor import main as examine

    raise typer.Exit(examine())
