"""``dragon-vm``: every option does what it says, prints it, and tells it by its exit status."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dragon.vm.cli import PAGE_WIDTH, app, seconds
from dragon.vm.tuning import commands, store
from dragon.vm.tuning.jobs import COMMON, JobError, plan_model_jobs, select_cases, select_variants
from dragon.vm.tuning.run import Tools
from dragon.vm.tuning.sizes import CASES, fingerprint

from .support import MACHINE, Clock, PlantedBench, PlantedCompiler, record
from .test_search import PLANTED, bowl


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": str(PAGE_WIDTH)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class Pool(PlantedCompiler):
    """Stands for the worker processes."""

    def __init__(self, cache: str | None = None) -> None:
        super().__init__()

    def __enter__(self) -> PlantedCompiler:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "present_gpu", lambda: None)
    monkeypatch.setattr(commands, "Workers", Pool)


@pytest.fixture
def planted_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, PlantedBench]:
    """A GPU whose benches are planted, by the name of their job's case."""
    benches: dict[str, PlantedBench] = {}
    clock = Clock()

    def tools(machine: object, compiler: object) -> Tools:
        return Tools(
            PlantedCompiler(),
            lambda job: benches.setdefault(job.case.name, PlantedBench(bowl, 0.01, clock=clock)),
            clock,
        )

    monkeypatch.setattr(commands, "present_gpu", lambda: MACHINE)
    monkeypatch.setattr(commands, "Workers", Pool)
    monkeypatch.setattr(commands, "device_tools", tools)
    return benches


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_one_line_says_so_and_offers_to_compile() -> None:
    result = invoke()
    assert result.exit_code == 1
    (line,) = result.stdout.strip().splitlines()
    assert "no CUDA or ROCm GPU" in line
    assert "--arch sm_90" in line


@pytest.mark.usefixtures("planted_gpu")
def test_a_run_stores_its_results_and_prints_them() -> None:
    result = invoke("--kernel", "adam bf16", "--case", "small", "--case", "large")
    assert result.exit_code == 0
    assert "4096/8 evict_first 4 persistent" in result.stdout
    found = {(entry.variant.state_dtype, entry.case): entry.config for _, entry in store.scan()[0]}
    assert {case for _, case in found} == {"small", "large"}
    assert set(found.values()) == {PLANTED}


def test_ctrl_c_keeps_what_is_measured_and_resume_ends_the_run(planted_gpu: dict[str, PlantedBench]) -> None:
    planted_gpu["transformer"] = PlantedBench(bowl, 0.01, interrupt_at=30)
    result = invoke("--kernel", "accumulate fp32", "--dtype", "fp32")
    assert result.exit_code == 1
    assert "dragon-vm tune --resume" in result.stdout
    assert len(store.scan()[0]) == 2
    planted_gpu["transformer"].interrupt_at = None
    result = invoke("--kernel", "accumulate fp32", "--resume")
    assert result.exit_code == 0
    assert "kept from an earlier run" in result.stdout
    assert {entry.finished for _, entry in store.scan()[0]} == {True}


@pytest.mark.usefixtures("no_gpu")
def test_arch_compiles_and_ranks_without_a_gpu(tmp_path: Path) -> None:
    bundle = tmp_path / "sm_90.json"
    result = invoke("--arch", "sm_90", "--kernel", "adam bf16", "--export", str(bundle))
    assert result.exit_code == 0
    rows = [line for line in result.stdout.splitlines() if line.startswith("| adam bf16 ")]
    assert sum("(default)" in row for row in rows) == len(select_variants("adam bf16"))
    assert len(store.read_bundle(bundle)) == 3 * len(select_variants("adam bf16"))


@pytest.mark.usefixtures("no_gpu")
def test_an_architecture_for_which_nothing_compiles_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Pool):
        def compile(self, variant: object, configs: object, arch: str) -> Iterator[object]:
            return ((config, "no such target") for config in configs)

    monkeypatch.setattr(commands, "Workers", Broken)
    result = invoke("--arch", "sm_42", "--kernel", "accumulate")
    assert result.exit_code == 1
    assert "does not compile: no such target" in result.stdout


@pytest.mark.usefixtures("no_gpu")
def test_a_dry_run_lists_what_would_run_and_runs_nothing() -> None:
    result = invoke("--dry-run", "--case", "small")
    assert result.exit_code == 0
    assert all(f"| {name} " in result.stdout for name in COMMON)
    assert f"{len(COMMON)} searches" in result.stdout
    assert store.scan() == ([], [])


@pytest.mark.usefixtures("planted_gpu")
def test_show_prints_what_is_in_force_and_why_and_what_is_ignored() -> None:
    path = store.save(record(PLANTED))
    broken = store.save(record(size="large"))
    broken.write_text("{")
    with pytest.warns(store.TuningWarning):
        result = invoke("--show", "--kernel", "adam fp32")
    assert result.exit_code == 0
    (row,) = [
        line for line in result.stdout.splitlines() if line.startswith("| adam fp32  ") and " small " in line
    ]
    assert "4096/8 evict_first 4 persistent" in row
    assert "user" in row
    assert "+10.0% against the default" in row
    assert f"ignored: {broken}: not JSON" in result.stdout
    assert str(path) not in result.stderr


@pytest.mark.usefixtures("no_gpu")
def test_show_answers_for_an_architecture_that_is_not_here() -> None:
    assert invoke("--show").exit_code == 1
    result = invoke("--show", "--arch", "sm_90", "--kernel", "adam fp32")
    assert result.exit_code == 0
    assert "estimated: by the compiler alone" in result.stdout


@pytest.mark.usefixtures("no_gpu")
def test_results_move_between_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle.json"
    assert invoke("--export", str(bundle)).exit_code == 1
    store.save(record(PLANTED))
    store.save(record(PLANTED, size="large"))
    assert invoke("--export", str(bundle)).exit_code == 0
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path / "elsewhere"))
    result = invoke("--import", str(bundle))
    assert result.exit_code == 0
    assert "2 of 2 results" in result.stdout
    assert {entry.size for _, entry in store.scan()[0]} == {"small", "large"}


@pytest.mark.usefixtures("no_gpu")
def test_estimates_stale_results_and_broken_files_are_not_imported(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.json"
    estimate = record(basis="estimated", device="", times=None)
    store.write_bundle(bundle, [record(kernel_hash="0" * 64), estimate])
    result = invoke("--import", str(bundle))
    assert result.exit_code == 1
    assert "stale" in result.stdout
    assert "an estimate" in result.stdout
    bundle.write_text(json.dumps({"schema": 9}))
    assert "schema version 9" in invoke("--import", str(bundle)).stdout
    assert store.scan() == ([], [])


@pytest.mark.usefixtures("planted_gpu")
def test_plot_writes_a_picture_of_what_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    assert invoke("--plot", str(path)).exit_code == 1
    assert not path.exists()
    assert invoke("--kernel", "adam fp32 amsgrad").exit_code == 0
    assert invoke("--plot", str(path)).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--case", "huge"), "large, transformer, small"),
        (("--kernel", "lion"), "adam fp32"),
        (("--kernel", "norm"), "nothing to tune"),
        (("--dtype", "int8"), "no kernel variant"),
        (("--arch", "hopper"), "sm_90"),
        (("--time-budget", "soon"), "90s"),
        (("--model", "torch"), "module:factory"),
        (("--model", "no_such_module:f"), "no_such_module"),
        (("--model", "math:tau_"), "tau_"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_is_right(arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in re.sub(r"[│\s]+", " ", result.stderr)


def make_model() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2).bfloat16())
    model[0].bias.requires_grad_(False)
    return model


def make_fickle_model() -> list[torch.nn.Parameter]:
    """A constructor that looks at values, which a model without memory does not have."""
    return [torch.nn.Parameter(torch.ones(int(torch.ones(()).item()) * 7))]


def test_a_model_is_tuned_for_its_own_shapes_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_model", sys.modules[__name__])
    jobs = plan_model_jobs("my_model:make_model", select_variants("adam"))
    numels = {job.variant.param_dtype: job.case.numels for job in jobs}
    assert numels == {"float32": (15,), "bfloat16": (10, 2)}
    assert {job.case.size for job in jobs} == {fingerprint((15,)), fingerprint((10, 2))}
    (job,) = plan_model_jobs("my_model:make_fickle_model", select_variants("sgd fp32 momentum"))
    assert job.case.numels == (7,)
    with pytest.raises(JobError, match="float32, bfloat16"):
        plan_model_jobs("my_model:make_model", select_variants("adam fp64"))


def test_variants_and_cases_are_chosen_by_name() -> None:
    assert list(select_variants()) == list(COMMON)
    assert {variant.param_dtype for variant in select_variants(dtype="bf16").values()} == {"bfloat16"}
    assert len(select_variants("all")) > len(COMMON)
    assert [case.name for case in select_cases(())] == list(CASES)


@pytest.mark.parametrize(("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), ("10m", 600), ("1h", 3600)])
def test_times_are_read_with_their_unit(text: str, expected: float) -> None:
    assert seconds(text) == expected


def test_the_doctor_is_a_command_and_its_findings_are_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for status in (0, 1):
        monkeypatch.setattr("dragon.vm.doctor.main", lambda status=status: status)
        assert CliRunner().invoke(app, ["doctor"]).exit_code == status


def test_the_optimizer_needs_nothing_of_the_command_line() -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'hypothesis', 'numpy.testing'): sys.modules[name] = None\n"
        "import dragon.vm.torch.optim._triton, dragon.vm.doctor\n"
        "from dragon.vm.tune import console\n"
        "console(['tune'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == 'typer is not installed: pip install "dragon-vm-torch[cli]"'
