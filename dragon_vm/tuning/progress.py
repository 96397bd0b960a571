"""A progress bar with the best so far, and a line for each job that is over."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dragon.vm.tuning.candidates import describe
from dragon.vm.tuning.jobs import Job
from dragon.vm.tuning.record import Record
from dragon.vm.tuning.search import Standing


class ProgressBar:
    """A `dragon.vm.tuning.run.Listener` on a console, and a context in which its bar is shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[best]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0, best="")
        self._done, self._n_jobs = 0, 1
        self.results: list[tuple[Job, Record]] = []

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def job_started(self, job: Job, index: int, n_jobs: int) -> None:
        """A job starts."""
        self._done, self._n_jobs = index, n_jobs
        description = f"{index + 1}/{n_jobs} {job.name}, {job.case.name}"
        self._bar.update(self._task, description=description, completed=index / n_jobs, best="compiling")

    def progressed(self, standing: Standing) -> None:
        """Something was measured."""
        best = "" if standing.best_ms is None else f"{standing.best_ms:.4f} ms"
        self._bar.update(
            self._task,
            completed=(self._done + standing.done) / self._n_jobs,
            best=f"{standing.stage}, {standing.n_rivals} rivals; best so far {describe(standing.best)} {best}",
        )

    def job_ended(self, job: Job, record: Record | None, note: str) -> None:
        """A job is over."""
        if record is not None:
            self.results.append((job, record))
        if note or record is None:
            self._console.print(f"{job.name}, {job.case.name}: {note or 'nothing was measured'}", highlight=False)
