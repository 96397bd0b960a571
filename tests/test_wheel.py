"""The wheel as a user gets it: checked by twine, and installed where nothing is but what it asks for."""

import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = {"torch", "triton", "typing-extensions", "threadpoolctl"}
STEP = """
import torch
from dragon.vm.torch.optim import Adam, AdamW, SGD

for make in (Adam, AdamW, SGD):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    make([parameter], lr=0.5, weight_decay=0).step()
    print([round(value, 6) for value in parameter.tolist()])
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run(command: list[str], cwd: Path, status: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def required(distribution: str) -> set[str]:
    """Names of the distributions that one needs here, without its extras."""
    packaging = pytest.importorskip("packaging.requirements")
    wanted = map(packaging.Requirement, metadata.requires(distribution) or [])
    return {canonical(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}


def closure(names: set[str]) -> set[str]:
    """These distributions and all that they need, as far as they are installed."""
    found: set[str] = set()
    queue = sorted(names)
    while queue:
        name = queue.pop()
        if name not in found and any(True for _ in metadata.distributions(name=name)):
            found.add(name)
            queue += required(name)
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the backend of this environment from a copy: setuptools leaves folders beside the sources."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dragon_vm", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-c", f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r})"], source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and of other packages only what it asks for."""
    folder = tmp_path_factory.mktemp("empty")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    visible = folder / "visible"
    visible.mkdir()
    for name in closure(NEEDED):
        files = metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            place = Path(str(metadata.distribution(name).locate_file(top)))
            if place.exists() and not (visible / top).exists():
                (visible / top).symlink_to(place)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "visible.pth").write_text(f"{visible}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)], folder)
    return python


def headers(wheel: Path) -> list[str]:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return archive.read(name).decode().split("\n\n", 1)[0].splitlines()


def test_twine_has_nothing_to_say_against_the_wheel(wheel: Path, tmp_path: Path) -> None:
    if find_spec("twine") is None:
        pytest.skip("twine is not installed (the dev extra has it for Python 3.11 and newer)")
    assert "PASSED" in run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], tmp_path)


def test_the_wheel_asks_only_for_what_a_step_needs(wheel: Path) -> None:
    lines = [line.partition(": ")[2] for line in headers(wheel) if line.startswith("Requires-Dist")]
    always = {canonical(re.split(r"[^\w.-]", line)[0]) for line in lines if "extra ==" not in line}
    assert always == NEEDED


def test_every_extra_is_documented(wheel: Path) -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    extras = {line.partition(": ")[2] for line in headers(wheel) if line.startswith("Provides-Extra")}
    assert extras == set(re.findall(r'`pip install "\.\[(\w+)\]"`', page))


def test_the_version_is_the_same_everywhere(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([\d.]+)\]", changelog, re.MULTILINE)[0] == version
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]


def test_a_step_runs_in_an_environment_with_nothing_else(empty: Path, tmp_path: Path) -> None:
    # PyTorch warns where there is no NumPy, which it does not ask for.
    strict = ["-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning"]
    assert run([str(empty), *strict, "-c", STEP], tmp_path).split("\n")[:3] == ["[0.5, 0.5, 0.5]"] * 3


def test_the_environment_really_hides_other_packages(empty: Path, tmp_path: Path) -> None:
    assert "No module named 'hypothesis'" in run([str(empty), "-c", "import hypothesis"], tmp_path, status=1)


def test_the_console_script_says_what_it_lacks(empty: Path, tmp_path: Path) -> None:
    assert 'pip install "dragon-vm-torch[cli]"' in run(
        [str(empty.parent / "dragon-vm"), "tune"], tmp_path, status=1
    )
