"""A whole run: prune, check, search and store, with a clock and a timer of the test's own."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES
from dragon.kernels.spec import Spec
from dragon.vm.measuring.machine import INTERPRETER
from dragon.vm.torch.optim._backends import configs
from dragon.vm.tuning import candidates, scratch, store
from dragon.vm.tuning import run as run_module
from dragon.vm.tuning.candidates import shapes
from dragon.vm.tuning.jobs import CASES, REHEARSAL, Job, plan_jobs
from dragon.vm.tuning.run import KernelBench, run, tools_of

from .support import DEFAULT, JOB, MACHINE, Clock, PlantedBench, planted_tools
from .test_search import PLANTED, bowl

JOBS = [job for name in ("adam fp32", "sgd fp32 momentum") for job in plan_jobs([name], [], rehearsal=True)]


def tune(
    bench: Callable[[Job], Any],
    jobs: Sequence[Job] = (JOB,),
    clock: Clock | None = None,
    budget: float = 600.0,
    pruned: dict[LaunchConfig, str] | None = None,
) -> tuple[list[store.Result], list[str]]:
    lines: list[str] = []
    results = run(jobs, budget, MACHINE, planted_tools(bench, clock, pruned), lines.append)
    return results, lines


def stored() -> list[store.Result | str]:
    return [found for _, found in store.scan()]


def test_a_result_is_stored_and_in_force() -> None:
    (result,), (line,) = tune(lambda job: PlantedBench(bowl, 0.01))
    assert LaunchConfig(**result["config"]) == PLANTED
    assert "4096/8 evict_first 4 persistent" in line
    assert f"{0.5 / result['best_ms']['median']:.0%} of copy_" in line
    assert configs.config_for(JOB.spec, "sm_90", MACHINE.name, JOB.numels) == PLANTED
    assert result["best_ms"]["median"] < result["default_ms"]["median"]
    assert len(stored()) == 1


def test_candidates_that_the_compiler_is_against_are_not_timed() -> None:
    spilling = {config: "spills 8 bytes a thread" for config in shapes(32) if config.chunk == 4096}
    bench = PlantedBench(bowl, 0.01)
    (result,), _ = tune(lambda job: bench, pruned=spilling)
    assert not {config for config in bench.timed if config.chunk == 4096}
    outcomes = {LaunchConfig(**trial["config"]): trial["outcome"] for trial in result["trials"]}
    assert {outcomes[config] for config in spilling} == {"spills 8 bytes a thread"}


def test_a_wrong_candidate_is_reported_and_never_stored_as_the_winner() -> None:
    (result,), lines = tune(lambda job: PlantedBench(bowl, 0.01, wrong=frozenset({PLANTED})))
    assert "1 wrong configuration, the first: wrong: planted" in lines[0]
    assert LaunchConfig(**result["config"]) != PLANTED


def test_a_wrong_default_stores_nothing_and_says_so() -> None:
    results, lines = tune(lambda job: PlantedBench(bowl, wrong=frozenset({DEFAULT})))
    assert results == stored() == []
    assert lines[-1] == "adam fp32, small: nothing is stored: the default is wrong: planted"


@pytest.mark.parametrize("budget", [30.0, 120.0, 600.0])
@pytest.mark.parametrize("check_seconds", [0.05, 0.4])
def test_the_budget_of_time_is_respected(budget: float, check_seconds: float) -> None:
    clock = Clock()
    bench = PlantedBench(bowl, 0.02, clock=clock, check_seconds=check_seconds, launch_seconds=0.005)
    results, _ = tune(lambda job: bench, JOBS, clock, budget)
    assert len(results) == len(JOBS)
    assert clock.now <= 1.1 * budget


def test_ctrl_c_keeps_the_results_of_finished_searches() -> None:
    benches = {job: PlantedBench(bowl, 0.01) for job in JOBS}
    benches[JOBS[1]].interrupt_at = 25
    with pytest.raises(KeyboardInterrupt):
        tune(benches.__getitem__, JOBS)
    (found,) = stored()
    assert isinstance(found, dict)
    assert (found["kernel"], found["size"]) == JOBS[0][::2]


def test_tensors_that_do_not_fit_are_skipped() -> None:
    def overflow(job: Job) -> PlantedBench:
        if job == JOBS[0]:
            raise torch.OutOfMemoryError("planted")
        return PlantedBench(bowl)

    results, lines = tune(overflow, JOBS[:2])
    assert len(results) == 1
    assert lines[0].endswith("its tensors do not fit the device")


def test_a_copy_that_does_not_fit_ends_no_run() -> None:
    class Full(PlantedBench):
        def copy_ms(self) -> float:
            raise torch.OutOfMemoryError("planted")

    results, lines = tune(lambda job: (Full if job == JOBS[0] else PlantedBench)(bowl), JOBS[:2])
    assert [result["size"] for result in results] == [JOBS[1].size]
    assert lines[0].endswith("its tensors do not fit the device")


def test_without_time_nothing_is_stored() -> None:
    clock = Clock()
    results, lines = tune(lambda job: PlantedBench(bowl, clock=clock, check_seconds=1.0), clock=clock, budget=0.5)
    assert results == stored() == []
    assert lines == ["adam fp32, small: nothing is stored: nothing else was measured"]


def test_each_kernel_is_compiled_once_in_a_share_of_the_time_of_its_first_job() -> None:
    asked: list[tuple[object, float]] = []
    tools = planted_tools(lambda job: PlantedBench(bowl))

    def prune(spec: Spec, configs: Sequence[LaunchConfig], seconds: float) -> dict[LaunchConfig, str | None]:
        asked.append((spec, seconds))
        return tools.prune(spec, configs, seconds)

    run(JOBS, 600.0, MACHINE, tools._replace(prune=prune), str)
    assert [spec for spec, _ in asked] == [JOBS[0].spec, JOBS[3].spec]
    # Of 600 seconds for six jobs, and, on a clock that stands, of 600 for the last three.
    assert [seconds for _, seconds in asked] == pytest.approx([15.0, 30.0])


@pytest.mark.usefixtures("interpreted")
def test_a_configuration_is_checked_once_for_the_jobs_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Spec] = []
    monkeypatch.setattr(run_module, "check_candidate", lambda spec, config, machine: checked.append(spec))
    tools = tools_of(INTERPRETER)
    for job in (JOBS[0], JOBS[1], JOBS[3], JOBS[0]):
        assert tools.bench(job).check(DEFAULT) is None
    assert checked == [JOBS[0].spec, JOBS[3].spec]


def test_nothing_is_compiled_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "compile_all", None)
    assert tools_of(INTERPRETER).prune(JOB.spec, [DEFAULT], 1.0) == {DEFAULT: None}


def test_the_tensors_of_a_job_are_freed_before_the_next_one_allocates() -> None:
    made: list[weakref.ref[PlantedBench]] = []
    alive: list[int] = []

    def bench(job: Job) -> PlantedBench:
        alive.append(sum(reference() is not None for reference in made))
        new = PlantedBench(bowl)
        made.append(weakref.ref(new))
        return new

    tune(bench, JOBS[:3])
    assert alive == [0, 0, 0]


def test_jobs_are_chosen_by_name() -> None:
    assert {job.name for job in plan_jobs(["adam fp32"], [])} == {"adam fp32"}
    assert {job.name for job in plan_jobs(["amsgrad"], [])} == {name for name in UPDATES if "amsgrad" in name}
    assert {job.name for job in plan_jobs(["all"], ["small"])} == set(UPDATES)
    assert [(job.size, job.numels) for job in plan_jobs(["adam bf16"], [])] == list(CASES.items())
    assert {job.numels for job in plan_jobs([], [], rehearsal=True)} == {REHEARSAL}
    for size, numels in CASES.items():
        assert configs.size_class(numels) == size
    assert [job.size for job in plan_jobs(["adam fp32"], ["small"])] == ["small"]
    with pytest.raises(ValueError, match=r"'lion'.*adam fp32"):
        plan_jobs(["lion"], [])
    with pytest.raises(ValueError, match="is not tuned"):
        plan_jobs(["norm"], [])


class PlantedTimer:
    """Runs each launch for real, and says that it took what is planted for its configuration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        self.clock, self.launched = clock, []
        original = scratch.update_launcher

        def launcher(spec: object, config: LaunchConfig, *rest: object) -> Callable[..., None]:
            launch = original(spec, config, *rest)

            def noted(*tables: object) -> None:
                self.launched.append(config)
                launch(*tables)

            return noted

        monkeypatch.setattr(scratch, "update_launcher", launcher)

    def device_ms(self, launches: Sequence[Callable[[], None]]) -> list[float]:
        times = []
        for launch in launches:
            self.launched.clear()
            launch()
            self.clock.now += 0.001
            times.append(bowl(self.launched[0]) if self.launched else 0.5)
        return times


@pytest.mark.usefixtures("interpreted")
def test_the_whole_pipeline_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, known = Clock(), dict[LaunchConfig, str | None]()
    timer = PlantedTimer(monkeypatch, clock)
    # Few shapes are left, so that few interpreted launches find the best of them.
    wanted = {(2048, 8), (4096, 8)}
    pruned = {config: "spills" for config in shapes(32) if (config.chunk, config.n_warps) not in wanted}
    monkeypatch.setattr(candidates, "EVICTIONS", ("", "evict_first"))
    monkeypatch.setattr(candidates, "PROGRAMS_PER_PROCESSOR", (0, 4))
    monkeypatch.setattr("dragon.vm.tuning.search.FINAL_REPETITIONS", 9)
    monkeypatch.setattr(run_module, "LARGEST_COPY", 28 * 133 // 4)
    (result,), _ = tune(lambda job: KernelBench(job, MACHINE, timer, known), (JOB,), clock, pruned=pruned)
    assert LaunchConfig(**result["config"]) == PLANTED
    # Of half of the bytes that a launch moves.
    assert result["copy_ms"] == pytest.approx(2 * 0.5)
    assert result["nbytes"] == 28 * 133
    assert configs.config_for(JOB.spec, "sm_90", MACHINE.name, (133, 0)) == PLANTED
