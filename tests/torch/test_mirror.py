"""What Dragon does not define is PyTorch's own: names, submodules, `dir()`, and nothing is changed in PyTorch."""

import importlib
import pickle
import subprocess
import sys
import threading

import pytest
import torch as real

import dragon.vm.torch.nn as nn
import dragon.vm.torch.nn.functional as F
import dragon.vm.torch.optim.lr_scheduler as lr_scheduler
from dragon.vm import torch
from dragon.vm.torch._mirror import MirrorFinder, install_finder
from dragon.vm.torch.utils.data import DataLoader


def test_names_that_dragon_does_not_define_are_pytorchs_own_objects():
    assert torch.cuda is real.cuda
    assert torch.float32 is real.float32
    assert torch.matmul is real.matmul
    assert torch.__version__ is real.__version__


def test_import_statements_give_pytorchs_own_modules():
    assert F is real.nn.functional
    assert lr_scheduler is real.optim.lr_scheduler
    assert DataLoader is real.utils.data.DataLoader
    assert nn is torch.nn


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Optimizer"])
def test_a_class_in_the_module_where_pytorch_has_it_is_dragons(name):
    own = importlib.import_module(f"dragon.vm.torch.optim.{name.lower()}")
    assert getattr(own, name) is getattr(torch.optim, name)
    theirs = importlib.import_module(f"torch.optim.{name.lower()}")
    for other in ("_use_grad_for_differentiable", "ParamsT", name.lower()):
        assert getattr(own, other, None) is getattr(theirs, other, None)
        assert hasattr(theirs, other) == (other in dir(own))
    with pytest.raises(AttributeError, match=rf"'dragon\.vm\.torch\.optim\.{name.lower()}' has no attribute"):
        _ = own.no_such_name


@pytest.mark.parametrize(
    "name", ["utils.data", "utils.checkpoint", "nn.modules.linear", "nn.utils", "amp", "autograd", "ops", "linalg"]
)
def test_a_submodule_is_one_object_under_both_names(name):
    assert importlib.import_module(f"dragon.vm.torch.{name}") is importlib.import_module(f"torch.{name}")


def test_another_thread_may_import_from_a_package_whose_alias_is_being_made(monkeypatch):
    load, found = importlib.import_module, []

    def load_after_another_thread(name):
        if name == "torch.utils.jit":
            thread = threading.Thread(target=lambda: found.append(load(f"dragon.vm.{name}.log_extract")))
            thread.start()
            thread.join(60)
        return load(name)

    for name in ("dragon.vm.torch.utils.jit", "dragon.vm.torch.utils.jit.log_extract"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib, "import_module", load_after_another_thread)
    load("dragon.vm.torch.utils.jit")
    assert found == [load("torch.utils.jit.log_extract")]


def test_an_alias_does_not_change_the_spec_of_pytorchs_module():
    importlib.import_module("dragon.vm.torch.utils.cpp_backtrace")

    module = importlib.import_module("torch.utils.cpp_backtrace")
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == "torch.utils.cpp_backtrace"


@pytest.mark.parametrize(
    "name", ["no_such_thing", "nn.no_such_thing", "utils.no_such_thing", "float32.no_such_thing"]
)
def test_a_module_that_neither_has_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match=f"dragon.vm.torch.{name.partition('.no')[0]}"):
        importlib.import_module(f"dragon.vm.torch.{name}")


def test_a_name_that_neither_has_is_an_attribute_error_of_the_dragon_module():
    with pytest.raises(AttributeError, match=r"module 'dragon\.vm\.torch' has no attribute 'no_such_name'"):
        _ = torch.no_such_name
    with pytest.raises(AttributeError, match=r"module 'dragon\.vm\.torch\.nn' has no attribute 'no_such_name'"):
        _ = torch.nn.no_such_name


def test_dir_lists_pytorchs_names_and_dragons():
    assert set(dir(real)) <= set(dir(torch))
    assert set(dir(real.nn)) <= set(dir(torch.nn))
    assert {"SGD", "lr_scheduler"} <= set(dir(torch.optim))


def test_a_star_import_gives_dragons_names_and_pytorchs():
    namespace = {}
    for name in ("dragon.vm.torch", "dragon.vm.torch.nn", "dragon.vm.torch.optim"):
        exec(f"from {name} import *", namespace)

    assert namespace["AdamW"] is torch.optim.AdamW
    assert namespace["RMSprop"] is real.optim.RMSprop
    assert namespace["ones"] is torch.ones
    assert namespace["Linear"] is torch.nn.Linear
    assert namespace["matmul"] is real.matmul


def test_the_finder_is_installed_once():
    install_finder()

    assert sum(isinstance(finder, MirrorFinder) for finder in sys.meta_path) == 1


@pytest.mark.parametrize(
    "name", ["ones", "arange", "Tensor", "nn.Parameter", "nn.Linear", "matmul", "optim.lr_scheduler.StepLR"]
)
def test_what_the_mirror_shows_can_be_pickled(name):
    value = torch
    for part in name.split("."):
        value = getattr(value, part)

    assert pickle.loads(pickle.dumps(value)) is value


def test_importing_dragon_changes_nothing_in_pytorch_and_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
import torch.nn.utils.parametrize
def snapshot():
    owners = (torch, torch.nn, torch.Tensor, torch.nn.Parameter, torch.nn.Linear)
    return {(owner.__name__, name): id(value) for owner in owners for name, value in vars(owner).items()}
before = snapshot()
import dragon.vm.torch
import dragon.vm.torch.utils.data
dragon.vm.torch.nn.Linear(2, 2)
after = snapshot()
changed = [key for key in before if after.get(key) != before[key]]
assert not changed, changed
assert type(torch.nn.Linear(2, 2).weight) is torch.nn.Parameter
assert type(torch.ones(2)) is torch.Tensor
"""
    subprocess.run([sys.executable, "-c", program], check=True)
