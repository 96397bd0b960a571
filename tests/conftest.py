"""How every test process is set up: threads, device, Hypothesis profiles and the `gpu` marker."""

import gc
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch starts its threads. The tests' tensors are small, and pytest-xdist already fills the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from .forking import Forking

HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()

# Before anything imports triton, which reads it once. A subprocess that compiles kernels for a named GPU
# removes it from its environment.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A kernel is compiled again after a change alone: triton compares its source, and that of all functions that it
# calls, with the numbers of their lines.
COMPILED = Path(__file__).parents[1] / ".cache" / "triton"
os.environ.setdefault("TRITON_CACHE_DIR", str(COMPILED))
KEPT_S = 3 * 86_400

# Nobody's tuning results reach the tests.
TUNING_DIR = os.environ["DRAGON_VM_TUNING_DIR"] = tempfile.mkdtemp(prefix="dragon-vm-tuning-")

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETING:
    from .interpreter import speed_up

    speed_up()

# No deadlines: an interpreted kernel takes seconds on a busy machine, and that is no defect.
settings.register_profile("dev", max_examples=50, deadline=None)
# Fewer than on a desk: the whole suite is to take less than a quarter of an hour on two cores.
settings.register_profile(
    "ci",
    max_examples=20,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "soak",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Forget kernels that were compiled long ago, before test processes start."""
    if not hasattr(config, "workerinput") and COMPILED.is_dir():
        for folder in COMPILED.iterdir():
            if time.time() - folder.stat().st_mtime > KEPT_S:
                shutil.rmtree(folder, ignore_errors=True)


def pytest_unconfigure() -> None:
    """Leave no folder behind."""
    shutil.rmtree(TUNING_DIR, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where its kernels are only interpreted."""
    if HAS_GPU and not IS_INTERPRETING:
        return
    reason = "kernels are interpreted (TRITON_INTERPRET=1)" if HAS_GPU else "no CUDA, ROCm or XPU device"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _only_tests_are_collected() -> None:
    """Take the million objects of imported modules out of every garbage collection."""
    # PyTorch's first optimizer imports its compiler.
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that triton's kernels run on here: a GPU, or the CPU under the interpreter."""
    if IS_INTERPRETING:
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "xpu")


@pytest.fixture(scope="session")
def forking() -> Iterator[Forking]:
    """What runs Python in processes that need not import torch."""
    with Forking() as python:
        yield python


@pytest.fixture
def link() -> Callable[[Path, Path], None]:
    """Make a symbolic link, or skip the test where the system lets this user make none."""

    def make(path: Path, target: Path) -> None:
        try:
            path.symlink_to(target)
        except (OSError, NotImplementedError) as error:
            pytest.skip(f"no symbolic link can be made here: {error}")

    return make


@pytest.fixture
def interpreted() -> None:
    """Skip the test where kernels are compiled: it looks inside triton's interpreter or at CPU tensors."""
    if not IS_INTERPRETING:
        pytest.skip("kernels are compiled here; needs TRITON_INTERPRET=1")
