"""The GPU stages run with the packages of a GPU machine, and leave an archive and a summary after each part."""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS

from ..forking import Forking
from .only_these import only

ROOT = Path(benchmarks.__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PACKAGES = ("torch", "triton", "numpy", "pytest", "hypothesis", "rich", "matplotlib")

# The scripts' kernels are interpreted as fast as those of the tests.
SETUP = "import torch, torch._dynamo; from tests.interpreter import speed_up; speed_up()"


@pytest.fixture(scope="module")
def gpu_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The Python of a machine that has only these packages, and its environment."""
    folder = tmp_path_factory.mktemp("site")
    environment = only(folder, *PACKAGES)
    path = os.pathsep.join([environment["PYTHONPATH"], str(ROOT)])
    with Forking({**environment, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}, SETUP) as forking:
        yield forking.executable(folder / "python"), environment


def run_stage(stage: str, folder: Path, parts: str, python: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run some parts of a stage without a GPU; the exit status and the summary."""
    done = subprocess.run(
        [SCRIPT, stage, "--dry", folder],
        env={**environment, "PYTHON": str(python), "ONLY": f"about|{parts}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (folder / f"summary-{stage}.txt").read_text() + done.stderr


# The other parts are tests that run anyway, or repeat these with other cases.
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("stage", "parts", "held"),
    [
        ("a", ("headline", "probe", "report"), {"benchmarks.jsonl", "probe.jsonl", "performance.md", "probe.log"}),
        ("b", ("ncu", "racecheck", "tune", "export"), {"tuning.json", "racecheck.log", "summary.txt"}),
    ],
)
def test_a_dry_stage_passes_with_the_packages_of_a_gpu_machine(
    stage: str, parts: tuple[str, ...], held: set[str], gpu_machine: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, summary = run_stage(stage, out, "|".join(parts), *gpu_machine)
    assert status == 0, summary
    assert re.findall(r"^(\w+): passed in", summary, re.MULTILINE) == ["about", *parts]
    assert {path.name for path in out.iterdir()} == {f"{stage}.tgz", f"summary-{stage}.txt"}
    with tarfile.open(out / f"{stage}.tgz") as archive:
        assert {Path(name).name for name in archive.getnames()} >= held


def test_packages_that_a_machine_has_not_are_hidden(tmp_path: Path) -> None:
    environment = only(tmp_path, "numpy")
    for package, code in (("numpy", 0), ("pytest", 1)):
        done = subprocess.run([sys.executable, "-c", f"import {package}"], env=environment, capture_output=True)
        assert done.returncode == code, done.stderr


def test_a_failed_part_is_the_exit_status_and_a_part_without_time_does_not_count(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "ONLY": "about|report|headline"}
    environment.pop("PYTHONPATH", None)
    script = tmp_path / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    for name in ("dragon_vm", "kernels", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    script.write_text(SCRIPT.read_text(encoding="utf-8"))
    script.chmod(0o755)
    command = [script, "a", "--dry", tmp_path / "out"]
    # There are no benchmarks beside this copy of the script.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.findall(r"^(\w+): FAILED", done.stdout, re.MULTILINE) == ["headline", "report"]
    late = subprocess.run(
        command, env={**environment, "TOTAL_S": "1", "ONLY": "report"}, capture_output=True, text=True, check=False
    )
    assert late.returncode == 0
    assert "report: not run: no time is left" in late.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["c"], ["--dry"], ["a", "--dri"], ["a", "one", "two"], ["a", "one", "--dry", "two"]]
)
def test_a_stage_must_be_named(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gpu.sh a|b" in done.stderr


def test_the_script_names_test_files_that_exist() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert SCRIPT.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    names = subprocess.run(
        ["bash", "-c", "echo " + " ".join(re.findall(r"tests/[\w/{},.]+", text))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_script_names_cases_and_contenders_that_exist() -> None:
    """A dry run takes smaller cases."""
    text = SCRIPT.read_text(encoding="utf-8")
    listed = re.search(r"local large=\((.*?)\) quick=\((.*?)\)", text)
    assert listed is not None
    cases = re.findall(r'"(.+?)"', " ".join(listed.groups()))
    assert len(cases) >= 9
    assert [name for name in cases if name not in CASES] == []
    contenders = re.findall(r'--contender (?:"(.+?)"|(\w+))', text)
    assert len(contenders) >= 8
    assert [name for pair in contenders for name in pair if name and name not in CONTENDERS] == []
