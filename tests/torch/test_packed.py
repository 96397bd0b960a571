"""Programs that this library is packed into, and processes in which kernels cannot be imported."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dragon.kernels
import dragon.vm
from dragon.vm.torch.optim._groups import eligibility

needs_triton = pytest.mark.skipif(eligibility.why_no_kernels() is not None, reason="needs triton")

ROOTS = {package.__name__: str(Path(package.__file__).parent) for package in (dragon.vm, dragon.kernels)}

# As Nuitka and PyInstaller do: no path leads to a module, and no module has a source.
FINDER = f"""
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

modules = {{}}
for package, folder in {ROOTS!r}.items():
    for file in Path(folder).rglob("*.py"):
        *parts, last = file.relative_to(folder).with_suffix("").parts
        is_package = last == "__init__"
        name = ".".join([package, *parts, *[last] * (not is_package)])
        modules[name] = compile(file.read_text(encoding="utf-8"), f"/gone/{{name}}.py", "exec"), is_package


class Packed:
    def find_spec(self, name, path=None, target=None):
        if name == "dragon":
            return ModuleSpec(name, None, is_package=True)
        return ModuleSpec(name, self, is_package=modules[name][1]) if name in modules else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(modules[module.__name__][0], vars(module))


sys.meta_path.insert(0, Packed())
"""

ARCHIVE = "import sys; sys.path.insert(0, {archive!r})"

TRAINING = """
import warnings
import torch
from dragon.vm import torch as own
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.utils.data import DataLoader

assert Adam is own.optim.Adam is not torch.optim.Adam
assert DataLoader is torch.utils.data.DataLoader and own.optim.lr_scheduler is torch.optim.lr_scheduler

def train(**options):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([param], lr=0.1, eps=0.0, **options)
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), -0.2))

train()
"""

IS_PACKED = "assert not Adam.__init__.__code__.co_filename.startswith(ROOTS)"

WITHOUT_KERNELS = """
from dragon.vm import doctor
from dragon.vm.torch.optim._groups import eligibility
from dragon.vm.tune import console

# The CPU as a GPU that kernels are made for.
eligibility._TRITON_DEVICES = ("cpu",)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    train()
assert [str(each.message) for each in caught if "far slower" in str(each.message) and REASON in str(each.message)]
try:
    train(backend="triton")
except ValueError as error:
    assert REASON in str(error)
doctor.SELF_TEST_SECONDS = 0.0
# A checkout that is not installed is wrong to the doctor.
doctor.PACKAGES = ("torch",)
assert console(["doctor"]) == 0 and console(["tune", "--dry-run"]) == 1
"""


BROKEN = """
import sys


class Broken:
    def find_spec(self, name, path=None, target=None):
        # From torch 2.15 on PyTorch itself imports triton.
        if name == "dragon.kernels.launch":
            raise ImportError("a library is missing")


sys.meta_path.insert(0, Broken())
"""
ABSENT = "import sys; sys.modules['triton'] = None"


def run(*parts):
    program = "\n".join((f"ROOTS = {tuple(ROOTS.values())!r}", *parts))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_program_that_finds_modules_by_name_trains_with_ours():
    done = run(FINDER, TRAINING, IS_PACKED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        # Triton asks for the source of a kernel.
        pytest.param(FINDER, "kernels cannot be imported: ", marks=needs_triton),
        (BROKEN, "kernels cannot be imported: ImportError: a library is missing"),
        (ABSENT, "triton is not installed"),
    ],
    ids=["no sources", "a broken triton", "no triton"],
)
def test_where_no_kernels_can_be_imported_pytorchs_operations_train_and_say_so(before, reason):
    done = run(f"REASON = {reason!r}", before, TRAINING, WITHOUT_KERNELS)
    assert done.returncode == 0, done.stderr
    assert f"There are no kernels to tune: {reason}" in done.stdout
    assert "passed: native on cpu, eager on cpu; not tested: triton on cpu." in done.stdout


def test_an_exception_of_a_signal_handler_is_no_reason_against_kernels(monkeypatch):
    alarms = [TimeoutError("an alarm")]

    def load(name):
        if alarms:
            raise alarms.pop()

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(TimeoutError, match="an alarm"):
        eligibility.why_no_kernels.__wrapped__()


def test_an_archive_trains_with_ours(tmp_path):
    archive = tmp_path / "application.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for package, folder in ROOTS.items():
            for path in Path(folder).rglob("*.py"):
                file.write(path, Path(*package.split("."), path.relative_to(folder)))
    done = run(ARCHIVE.format(archive=str(archive)), TRAINING, IS_PACKED)
    assert done.returncode == 0, done.stderr
