"""The distribution: what the wheel holds, and that every way of installing it imports."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .forking import SETUP, Forking

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCES = {"dragon.vm": ROOT / "dragon_vm", "dragon.kernels": ROOT / "kernels"}
IMPORT_ALL = (
    "import pathlib, dragon.vm.torch, dragon.vm.torch.optim, dragon.vm.testing, dragon.kernels;"
    "print(pathlib.Path(dragon.vm.torch.__file__).resolve());"
    "print(pathlib.Path(dragon.kernels.__file__).resolve())"
)
TAKE_A_STEP = """
import torch
from dragon.vm.torch.optim import Adam

parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
Adam([parameter], lr=0.5).step()
print(Adam.__module__.partition(".")[0], [round(value, 6) for value in parameter.tolist()])
"""
# Python 3.13 and newer cut the indentation of docstrings when they compile.
CLEAN_DOCSTRINGS = """
import ast, importlib.machinery, sys
import torch, torch._dynamo, triton, hypothesis, numpy

seen = []

def source_to_code(self, data, path, *, _optimize=-1):
    tree = ast.parse(data)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body[0].value.value = ast.get_docstring(node)
            seen.append(node)
    return compile(tree, path, "exec")

# Compiled files of this Python must be neither read nor written.
sys.dont_write_bytecode = True
sys.pycache_prefix = "pycache"
importlib.machinery.SourceFileLoader.source_to_code = source_to_code
from dragon.vm.torch.optim import Adam, AdamW
assert len(seen) > 500, "the docstrings of this Python are not looked at"
assert "\\n    lr: " in Adam.__doc__ and "\\n    lr: " in AdamW.__doc__
import dragon.vm._run_options, dragon.vm.testing, dragon.kernels.update
"""


# This keeps `.pth` files, and with them the hook of the editable install, from being read.
OPTIONS = ("-S", "-W", "error")


def _with_path(*paths: Path) -> dict[str, str]:
    """The environment in which Python finds what is installed plus `paths`, and not this checkout."""
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, paths), *installed])}


def _python(code: str, *paths: Path, cwd: Path) -> str:
    """Run `code` on what is installed plus `paths`, without the editable install of this checkout."""
    command = [sys.executable, *OPTIONS, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=_with_path(*paths), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run_installed() -> Iterator[Callable[..., str]]:
    """The same, where torch and triton are imported already."""
    with Forking(_with_path(), f"{SETUP}, triton, hypothesis", OPTIONS) as forking:

        def run(code: str, *paths: Path, cwd: Path) -> str:
            ended = forking.run("-c", code, cwd=cwd, env=_with_path(*paths))
            assert ended.code == 0, ended.err
            return ended.out

        yield run


def _build(kind: str, source: Path, destination: Path, settings: str = "None") -> Path:
    """Call the build backend as pip does, in the environment of the tests: no network is needed."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(destination)!r}, config_settings={settings})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(destination.glob("*.whl"))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a distribution is built from: setuptools leaves its own folders beside it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("dragon_vm", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip installs it: an unpacked folder on the path."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def strict(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a strict editable install, of links that it makes beside the source."""
    return _build("editable", source, tmp_path_factory.mktemp("strict"), "{'editable_mode': 'strict'}")


@pytest.fixture(scope="session")
def lenient(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("editable", source, tmp_path_factory.mktemp("lenient"), "{'editable_mode': 'lenient'}")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def test_every_package_of_the_tree_is_listed_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tree = {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in SOURCES.items()
        for init in folder.rglob("__init__.py")
    }
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(tree)


def test_every_folder_with_sources_is_a_package() -> None:
    folders = {path.parent for folder in SOURCES.values() for path in folder.rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_wheel_holds_every_file_of_the_tree_and_nothing_else(wheel: Path, source: Path) -> None:
    expected = {
        str(Path(*name.split("."), path.relative_to(source / folder.name)))
        for name, folder in SOURCES.items()
        for path in _files(source / folder.name)
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {"dragon/vm/py.typed", "dragon/kernels/py.typed"} <= held
    assert "dragon/__init__.py" not in held, "`dragon` is a namespace package"


def test_the_wheel_carries_its_license_and_python_versions(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "Requires-Python: >=3.10\n" in metadata
    assert "License-Expression: BSD-2-Clause\n" in metadata


def test_the_wheel_imports_from_an_empty_folder(
    unpacked: Path, run_installed: Callable[..., str], tmp_path: Path
) -> None:
    places = run_installed(IMPORT_ALL, unpacked, cwd=tmp_path).split()
    assert places == [
        str(unpacked.resolve() / "dragon" / "vm" / "torch" / "__init__.py"),
        str(unpacked.resolve() / "dragon" / "kernels" / "__init__.py"),
    ]


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_imports_the_checkout(
    mode: str, request: pytest.FixtureRequest, source: Path, run_installed: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    zipfile.ZipFile(request.getfixturevalue(mode)).extractall(folder)
    # On the path as well, and first: this checkout's own hook is a module of the same name.
    code = f"import site; site.addsitedir({str(folder)!r}); {IMPORT_ALL}"
    mirror, kernels = map(Path, run_installed(code, folder, cwd=folder).split())
    assert mirror.samefile(source / "dragon_vm" / "torch" / "__init__.py")
    assert kernels.samefile(source / "kernels" / "__init__.py")


def test_the_strict_editable_install_has_folders_that_a_type_checker_can_follow(
    strict: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(strict).extractall(tmp_path)
    links = Path(next(tmp_path.glob("*.pth")).read_text(encoding="utf-8").strip())
    assert (links / "dragon" / "vm" / "torch" / "__init__.py").is_file()
    assert (links / "dragon" / "vm" / "py.typed").is_file()


def test_adam_is_imported_without_triton_and_takes_a_step_where_it_is_absent(
    unpacked: Path, tmp_path: Path
) -> None:
    """Triton takes most of a second to import, and who steps on a CPU never needs it."""
    code = "import sys, dragon.vm.torch.optim; print('triton' in sys.modules); sys.modules['triton'] = None"
    assert _python(code + TAKE_A_STEP, unpacked, cwd=tmp_path) == "False\ndragon [0.5, 0.5, 0.5]\n"


def test_it_imports_where_python_cuts_the_indentation_of_docstrings(
    unpacked: Path, run_installed: Callable[..., str], tmp_path: Path
) -> None:
    run_installed(CLEAN_DOCSTRINGS, unpacked, cwd=tmp_path)


def test_the_tests_see_this_checkout_and_no_other_install() -> None:
    import dragon.kernels
    import dragon.vm

    assert Path(dragon.vm.__path__[0]).resolve() == SOURCES["dragon.vm"]
    assert Path(dragon.kernels.__path__[0]).resolve() == SOURCES["dragon.kernels"]


USERS_SCRIPT = """
import torch as pytorch
from torch.optim.lr_scheduler import StepLR

import dragon.vm.torch.optim as optim
from dragon.vm import torch
from dragon.vm.torch.optim import SGD, Adam, AdamW, swap

model = pytorch.nn.Linear(2, 2)
adam: pytorch.optim.Adam = Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True, max_grad_norm=1.0)
adamw: pytorch.optim.AdamW = AdamW(model.named_parameters(), weight_decay=0.1, state_dtype=pytorch.float32)
sgd: pytorch.optim.SGD = SGD([{"params": model.parameters(), "lr": 0.1}], momentum=0.9, nesterov=True)
base: pytorch.optim.Optimizer = optim.Adam([torch.nn.Parameter(torch.ones(2, 3))], epsilon_hat=False)
taken: Adam = Adam.from_torch(pytorch.optim.Adam(model.parameters()))
mirrored: pytorch.optim.AdamW = torch.optim.AdamW(model.parameters())
nadam: pytorch.optim.Optimizer = torch.optim.NAdam(model.parameters())
StepLR(adam, 10).step()
loss = adam.step(lambda: model(torch.ones(1, 2)).sum().item())
taken.step(zero_grad=True)
adam.zero_grad(set_to_none=True)
taken.zero_grad()
adamw.load_state_dict(adamw.state_dict())
norm: pytorch.Tensor | None = taken.grad_norm
with swap(state_dtype=pytorch.float32) as swapped:
    print(swapped.report())


class Mine(AdamW):
    def __init__(self, model: pytorch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
"""
MISTAKES = {
    "Adam(model.parameters(), nonsense=1)": "nonsense",
    'Adam(model.parameters(), lr="high")': "lr",
    "AdamW(model.parameters()).no_such_method()": "no_such_method",
}


@pytest.fixture
def interpreter(request: pytest.FixtureRequest, unpacked: Path, strict: Path, tmp_path: Path) -> Path:
    """The Python of an environment with an install and what this one has."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    if request.param == "regular":
        shutil.copytree(unpacked, site, dirs_exist_ok=True)
    else:
        zipfile.ZipFile(strict).extractall(site)
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(installed), encoding="utf-8")
    return folder / "bin" / "python"


def _checked(checker: str, interpreter: Path, script: Path) -> tuple[int, str]:
    """Exit code and output of a type checker on a user's script."""
    commands = {
        "mypy": ["mypy", f"--python-executable={interpreter}", *_as_this_project(script.parent)],
        "pyright": ["pyright", "--pythonpath", str(interpreter)],
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [sys.executable, "-m", *commands[checker], script.name],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _as_this_project(folder: Path) -> list[str]:
    """Arguments with which mypy finds again what it found in torch for this project, if it ran: half a minute."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = re.findall(r"^\[+tool\.mypy\b.*?(?=^\[|\Z)", project, re.MULTILINE | re.DOTALL)
    config, cache = folder / "mypy.toml", folder / "mypy_cache"
    config.write_text(re.sub(r"(?m)^(packages|mypy_path) = .*$", "", "".join(tables)), encoding="utf-8")
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", cache)
    return [f"--config-file={config}", f"--cache-dir={cache}"]


# Whatever mypy finds in an editable install it finds in a regular one, in many seconds.
@pytest.mark.parametrize(
    ("checker", "interpreter"),
    [("mypy", "editable"), ("pyright", "editable"), ("pyright", "regular")],
    indirect=["interpreter"],
)
def test_a_type_checker_accepts_a_users_script_and_finds_its_mistakes(
    checker: str, interpreter: Path, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(USERS_SCRIPT + "\n".join(MISTAKES) + "\n", encoding="utf-8")
    code, output = _checked(checker, interpreter, script)
    assert code == 1
    first = USERS_SCRIPT.count("\n") + 1
    found = {int(number) for number in re.findall(r"train\.py:(\d+):", output)}
    assert found == {first + index for index in range(len(MISTAKES))}, output
    for number, name in enumerate(MISTAKES.values()):
        lines = [line for line in output.splitlines() if f"train.py:{first + number}:" in line]
        assert any(name in line for line in lines), output
