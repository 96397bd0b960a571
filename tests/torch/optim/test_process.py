"""A step needs nothing of a process but torch, and leaves the process as it found it."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._backends import threads

from .support import BACKENDS, give_gradients, home, parameters

HIDDEN = """
import importlib.metadata, re, sys

def closure(names):
    found, pending = set(), list(names)
    while pending:
        name = re.sub("[-_.]+", "-", pending.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                requires = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            pending += [re.match(r"[\\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return found

allowed = closure(["torch", "triton", "numpy"])
owners = importlib.metadata.packages_distributions()
hidden = {
    package for package, names in owners.items()
    if package != "dragon" and not any(re.sub("[-_.]+", "-", name).lower() in allowed for name in names)
}
assert "threadpoolctl" not in allowed and "pytest" in hidden

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
before = set(sys.modules)
import torch
from dragon.vm.torch.optim import SGD, Adam

# A single one need not be limited.
torch.set_num_threads(2)
for backend in (None, "native", "eager", "triton"):
    for make in (Adam, SGD):
        params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 20)]
        optimizer = make(params, lr=0.1, backend=backend, max_grad_norm=1.0)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert all((param < 1).all() for param in params)
print(sorted(hidden & (set(sys.modules) - before)))
"""


@pytest.mark.usefixtures("interpreted")
def test_a_step_runs_with_every_package_hidden_but_torch_triton_and_numpy():
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", HIDDEN],
        capture_output=True,
        text=True,
        env={name: os.environ[name] for name in os.environ if name != "DRAGON_VM_TUNING_DIR"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


IMPORTED_UNDER_FAKE_TENSORS = """
import torch
from torch._subclasses import FakeTensorMode

with FakeTensorMode():
    from dragon.vm.torch.optim import Adam
for flatten in (False, True):
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = Adam(params, lr=0.1, eps=0.0, flatten=flatten)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(torch.stack([*params]).detach(), torch.full((2, 3), -0.1))
"""


def test_a_step_is_real_where_the_library_was_imported_among_fake_tensors(forking, tmp_path):
    assert forking.run("-c", IMPORTED_UNDER_FAKE_TENSORS, cwd=tmp_path).code == 0


def process():
    """What a process-wide setting is now, as far as a step might have touched it."""
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "denormals": float(torch.tensor(1e-40) * 1),
        "anomaly": torch.is_anomaly_enabled(),
        "torch function": torch._C._is_torch_function_enabled(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": str(np.random.get_state()),
        "python's random numbers": random.getstate(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "interrupts": signal.getsignal(signal.SIGINT),
        "trace": (sys.gettrace(), sys.getprofile()),
        "garbage collection": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "running threads": threading.active_count(),
        "numpy's errors": np.geterr(),
    }


@pytest.fixture
def two_threads():
    """As many for operations of PyTorch: a single one need not be limited."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [Adam, SGD])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_a_step_leaves_the_process_as_it_found_it(algorithm, options, backend):
    params = parameters([(3,), (512,), (10_000,)], device=home(backend))
    # PyTorch's first optimizer imports the compiler, which adds filters of warnings.
    torch.optim.SGD(params)
    before = process()
    optimizer = algorithm(params, lr=0.1, backend=backend, **options)
    for seed in range(2):
        give_gradients(params, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert process() == before


@pytest.mark.usefixtures("two_threads")
def test_small_tensors_are_updated_by_one_thread_and_large_ones_by_all(monkeypatch):
    threads = {}
    fused = torch._fused_adam_

    def recorded(params, *args, **options):
        threads[params[0].numel()] = torch.get_num_threads()
        fused(params, *args, **options)

    monkeypatch.setattr(torch, "_fused_adam_", recorded)
    params = parameters([(3,), (10_000,)])
    give_gradients(params, 0)
    Adam(params, backend="native").step()
    assert threads == {3: 1, 10_000: 2}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("error", [OSError("not listed"), RuntimeWarning("two of OpenMP")], ids=str)
def test_a_step_needs_no_list_of_the_libraries_of_the_process(error, monkeypatch):
    def refuse():
        raise error

    monkeypatch.setattr(threads, "ThreadpoolController", refuse)
    params = parameters([(3,)])
    give_gradients(params, 0)
    threads._openmp_pools.cache_clear()
    try:
        Adam(params, backend="native").step()
        assert threads._openmp_pools() == []
    finally:
        threads._openmp_pools.cache_clear()


THREADS = """
import threading, torch
from dragon.vm.torch.optim import Adam

torch.set_num_threads(4)
params = [torch.nn.Parameter(torch.randn(512)) for _ in range(200)]
for param in params:
    param.grad = torch.ones_like(param)
optimizer, stop, seen = Adam(params, backend="native"), threading.Event(), set()

def train():
    while not stop.is_set():
        optimizer.step()

def other():
    torch.ones(2).sum()
    seen.add(torch.get_num_threads())

training = threading.Thread(target=train)
training.start()
for _ in range(300):
    worker = threading.Thread(target=other)
    worker.start()
    worker.join()
stop.set()
training.join()
print(seen)
"""


def test_threads_that_start_during_a_step_have_the_number_of_threads_that_was_set(forking, tmp_path):
    code, out, err = forking.run("-c", THREADS, cwd=tmp_path)
    assert code == 0, err
    assert out.strip() == "{4}"
