"""A whole run: compile, prune, check, search and store, with a clock and a timer of the test's own."""

from collections.abc import Callable, Sequence

import pytest
import torch

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES
from dragon.vm.tuning import lookup, scratch, store
from dragon.vm.tuning.bench import KernelBench
from dragon.vm.tuning.candidates import shapes
from dragon.vm.tuning.jobs import Job, plan_jobs
from dragon.vm.tuning.run import NOT_COMPILED, TimedBench, Tools, TuningRun
from dragon.vm.tuning.search import SLOWER
from dragon.vm.tuning.sizes import CASES, Case
from dragon.vm.tuning.statistics import FEWEST_PAIRS

from .support import DEFAULT, GOOD, JOB, MACHINE, Clock, Diary, PlantedBench, PlantedCompiler
from .test_search import PLANTED, bowl

JOBS = plan_jobs(CASES.values(), {name: UPDATES[name] for name in ("adam fp32", "sgd fp32 momentum")})


def run(
    bench: Callable[[Job], TimedBench],
    jobs: Sequence[Job] = (JOB,),
    compiler: PlantedCompiler | None = None,
    clock: Clock | None = None,
    budget: float = 600.0,
    resume: bool = False,
) -> tuple[Diary, bool]:
    diary = Diary()
    tools = Tools(compiler or PlantedCompiler(), bench, clock or Clock())
    return diary, TuningRun(MACHINE, tools, diary, resume).run(jobs, budget)


def test_what_is_found_is_stored_and_in_force() -> None:
    diary, finished = run(lambda job: PlantedBench(bowl, 0.01))
    assert finished
    assert lookup.config_for(JOB.variant, "90", MACHINE.name, JOB.case.numels) == PLANTED
    ((_, record, note),) = diary.ended
    assert record is not None
    assert (record.config, record.finished, note) == (PLANTED, True, "")
    assert store.scan()[0][0][1] == record
    assert record.times is not None
    assert record.times.best.median_ms < record.times.default.median_ms


def test_what_the_compiler_is_against_is_never_timed_nor_checked() -> None:
    spilling = [config for config in shapes(32) if config.chunk == 4096]
    bench = PlantedBench(bowl, 0.01)
    compiler = PlantedCompiler({config: GOOD._replace(spilled_nbytes=8) for config in spilling})
    diary, _ = run(lambda job: bench, compiler=compiler)
    assert not {config for config in bench.timed if config.chunk == 4096}
    record = diary.ended[0][1]
    assert record is not None
    outcomes = {trial.config: trial.outcome for trial in record.trials}
    assert {outcomes[config] for config in spilling} == {"spills 8 bytes a thread"}


def test_a_wrong_candidate_is_reported_and_never_stored_as_the_winner() -> None:
    diary, _ = run(lambda job: PlantedBench(bowl, 0.01, wrong=frozenset({PLANTED})))
    _, record, note = diary.ended[0]
    assert note == "1 wrong candidates, the first: planted"
    assert record is not None
    assert record.config != PLANTED


def test_a_wrong_default_stores_nothing_and_says_so() -> None:
    diary, _ = run(lambda job: PlantedBench(bowl, wrong=frozenset({DEFAULT})))
    assert diary.ended == [(JOB, None, "the default is wrong: wrong: planted")]
    assert store.scan() == ([], [])


@pytest.mark.parametrize("budget", [30.0, 120.0, 600.0])
@pytest.mark.parametrize(("compile_seconds", "check_seconds"), [(0.05, 0.05), (0.7, 0.0), (0.1, 0.4)])
def test_the_budget_of_time_is_respected(budget: float, compile_seconds: float, check_seconds: float) -> None:
    clock = Clock()
    compiler = PlantedCompiler(clock=clock, seconds=compile_seconds)
    bench = PlantedBench(bowl, 0.02, clock=clock, check_seconds=check_seconds, launch_seconds=0.005)
    diary, _ = run(lambda job: bench, JOBS, compiler, clock, budget)
    assert len(diary.ended) == len(JOBS)
    assert clock.now <= 1.1 * budget


def test_one_variant_is_compiled_once_for_all_cases() -> None:
    compiler = PlantedCompiler()
    run(lambda job: PlantedBench(bowl), JOBS[:3], compiler)
    assert len(compiler.compiled) == len(set(compiler.compiled))


def test_compiling_that_takes_too_long_leaves_candidates_out() -> None:
    clock = Clock()
    compiler = PlantedCompiler(clock=clock, seconds=10.0)
    diary, _ = run(lambda job: PlantedBench(bowl, clock=clock), (JOB,), compiler, clock, 200.0)
    record = diary.ended[0][1]
    assert record is not None
    assert NOT_COMPILED in {trial.outcome for trial in record.trials}
    assert clock.now <= 220.0


def test_ctrl_c_keeps_what_is_measured_and_resume_goes_on() -> None:
    benches = {job: PlantedBench(bowl, 0.01) for job in JOBS}
    benches[JOBS[1]].interrupt_at = 25
    diary, finished = run(benches.__getitem__, JOBS)
    assert not finished
    assert len(diary.ended) == 2
    assert [record and record.finished for _, record, _ in diary.ended] == [True, False]
    unfinished = diary.ended[1][1]
    assert unfinished is not None
    lost = {trial.config for trial in unfinished.trials if trial.outcome.startswith(SLOWER)}
    assert lost

    again = {job: PlantedBench(bowl, 0.01, seed=1) for job in JOBS}
    diary, finished = run(again.__getitem__, JOBS, resume=True)
    assert finished
    assert diary.ended[0][2] == "kept from an earlier run"
    assert again[JOBS[0]].n_repetitions == 0
    assert not again[JOBS[1]].timed & lost
    assert {record.config for _, record in store.scan()[0]} == {PLANTED}
    assert len(store.scan()[0]) == len(JOBS)


def test_ctrl_c_before_anything_is_measured_stores_nothing() -> None:
    def press(job: Job) -> TimedBench:
        raise KeyboardInterrupt

    diary, finished = run(press, JOBS)
    assert not finished
    assert diary.ended == [(JOBS[0], None, "interrupted before anything was measured")]
    assert store.scan() == ([], [])


def test_tensors_that_do_not_fit_are_skipped() -> None:
    def overflow(job: Job) -> TimedBench:
        if job == JOBS[0]:
            raise torch.OutOfMemoryError("planted")
        return PlantedBench(bowl)

    diary, finished = run(overflow, JOBS[:2])
    assert finished
    assert diary.ended[0][1:] == (None, "its tensors do not fit the device")
    assert diary.ended[1][1] is not None


class PlantedTimer:
    """Runs each launch for real, and says that it took what is planted for its configuration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        self.clock, self.launched = clock, []
        original = scratch.launch_update

        def launch(variant: object, config: LaunchConfig, *rest: object) -> None:
            self.launched.append(config)
            original(variant, config, *rest)

        monkeypatch.setattr(scratch, "launch_update", launch)

    def time_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        times = []
        for launch in launches:
            self.launched.clear()
            launch()
            self.clock.now += 0.001
            times.append(bowl(self.launched[0]) if self.launched else 0.5)
        return times


@pytest.mark.usefixtures("interpreted")
def test_the_whole_pipeline_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, name = Clock(), "adam fp32"
    timer = PlantedTimer(monkeypatch, clock)
    job = Job(name, UPDATES[name], Case("tiny", "small", (100, 33)))

    def bench(job: Job) -> KernelBench:
        return KernelBench(job.variant, job.case.numels, MACHINE.device, MACHINE.processor, timer)

    # Few shapes are left, so that few interpreted launches find the best of them.
    wanted = {(2048, 8), (4096, 8)}
    spilling = GOOD._replace(spilled_nbytes=8)
    compiler = PlantedCompiler(
        {config: spilling for config in shapes(32) if (config.chunk, config.n_warps) not in wanted}
    )
    monkeypatch.setattr("dragon.vm.tuning.candidates.EVICTIONS", ("", "evict_first"))
    monkeypatch.setattr("dragon.vm.tuning.search.FINAL_REPETITIONS", FEWEST_PAIRS)
    monkeypatch.setattr("dragon.vm.tuning.candidates.PROGRAMS_PER_PROCESSOR", (0, 4))
    diary, finished = run(bench, (job,), compiler, clock)
    assert finished
    record = diary.ended[0][1]
    assert record is not None
    assert record.config == PLANTED
    assert record.times is not None
    assert record.times.copy_ms == pytest.approx(0.5)
    assert record.times.nbytes == 28 * 133
    assert lookup.config_for(job.variant, "sm_90", MACHINE.name, (133, 0)) == PLANTED
