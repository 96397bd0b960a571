"""``dragon-vm memory``: the table of a model of one's own, and what a wrong ``--model`` is told."""

import sys
from pathlib import Path

import pytest
import torch

from dragon.vm import memory, tune
from dragon.vm.torch.optim import Adam

from .forking import Forking

MODEL = """
import torch

def make():
    return torch.nn.Linear(64, 64)

def frozen():
    module = make()
    module.bias.requires_grad_(False)
    module.phases = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64), requires_grad=False)
    return module

def wide(width):
    return make()

def lazy():
    return torch.nn.LazyLinear(8)

def odd():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return module

def sparse():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.empty(5, layout=torch.sparse_coo))
    return module

made = make()

def wrong():
    raise ValueError("an error of the model's own")

def absent_file():
    open("absent.json")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with the package that the guide names."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "model.py").write_text(MODEL, encoding="utf-8")
    (package / "broken.py").write_text("import not_installed\n", encoding="utf-8")
    (package / "similar.py").write_text("import my_pack\n", encoding="utf-8")
    (package / "nameless.py").write_text("raise ModuleNotFoundError('no backend')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_model_of_the_present_folder_is_found(folder: Path, forking: Forking) -> None:
    code = "from dragon.vm.tune import console; console(['memory', '--model', 'my_package.model:make'])"
    # Isolated, as a console script is: without the present folder in the path.
    ended = forking.run("-c", f"import sys; sys.path.remove(''); {code}", cwd=folder)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("my_package.model:make: 4,160 trained parameters in 2 tensors\n")
    assert "state_dtype='8bit', master_weights='split8'" in ended.out


def test_it_is_a_module_too(folder: Path, forking: Forking) -> None:
    ended = forking.run("-m", "dragon.vm.memory", "--model", "my_package.model:make", cwd=folder)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("my_package.model:make: 4,160 trained parameters in 2 tensors\n")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_package.model", "expected \"module:factory\", got 'my_package.model'"),
        (":make", "expected \"module:factory\", got ':make'"),
        ("my_package.model:", "expected \"module:factory\", got 'my_package.model:'"),
        ("absent.model:make", "there is no module 'absent' in this folder"),
        ("my_package.absent:make", "there is no module 'my_package.absent' in this folder"),
        ("my_package.model:absent", "my_package.model has no 'absent'"),
        ("my_package.model:wide", "my_package.model:wide cannot be called without arguments: missing a required"),
        ("my_package.model:MODEL", "my_package.model has no 'MODEL'"),
        ("my_package.model:torch", "my_package.model:torch cannot be called without arguments: "),
        (
            "my_package.model:lazy",
            "my_package.model:lazy has lazy parameters, which have no shape yet: weight",
        ),
        (
            "my_package.model:odd",
            "my_package.model:odd has complex parameters, for which there are no modes: weight",
        ),
        (
            "my_package.model:sparse",
            "my_package.model:sparse has sparse parameters, which Adam does not take: weight",
        ),
        ("my_package.model:made", "my_package.model:made is a module already: name a function or a class"),
        (".model:make", "the module must be absolute, got '.model:make'"),
        ("builtins:dict", "builtins:dict must return a torch.nn.Module, got dict"),
        ("argparse:Namespace", "argparse:Namespace must return a torch.nn.Module, got Namespace"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_wrong_model_is_named(path: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.console(["memory", "--model", path])
    assert stopped.value.code == 2
    assert f"--model: {message}" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_a_frozen_parameter_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main("my_package.model:frozen") == 0
    assert capsys.readouterr().out.startswith("my_package.model:frozen: 4,096 trained parameters in 1 tensor\n")


@pytest.mark.usefixtures("folder")
def test_a_model_takes_no_memory() -> None:
    model = memory.make_on_meta("my_package.model:make")
    assert {param.device.type for param in model.parameters()} == {"meta"}


@pytest.mark.usefixtures("folder")
def test_a_model_without_trained_parameters_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main("torch.nn:ReLU") == 1
    assert capsys.readouterr().out == "torch.nn:ReLU: 0 trained parameters in 0 tensors\n"


def test_every_row_is_what_an_optimizer_allocates_for_parameters_of_each_layout() -> None:
    shapes = ((64, 64), (3, 5), (64, 2, 8, 8), ())
    params = [torch.randn(shape) for shape in shapes]
    # What is not row by row in memory keeps fp32 states.
    params += [torch.randn(64, 128).t(), torch.randn(64, 64, 4, 4).to(memory_format=torch.channels_last)]
    for row, (dtype, options) in zip(memory.rows(params), memory.MODES, strict=True):
        trained = [torch.nn.Parameter(param.to(dtype)) for param in params]
        for param in trained:
            param.grad = torch.zeros_like(param)
        optimizer = Adam(trained, **options._asdict())
        optimizer.step()
        found = optimizer.memory()
        assert row.gradients == found["gradients"], row
        assert row.kept == found["parameters"] + found["states"] + found["masters"], row


@pytest.mark.usefixtures("folder")
def test_an_error_inside_of_the_model_keeps_its_traceback() -> None:
    for module, error in (("broken", "not_installed"), ("similar", "my_pack"), ("nameless", "no backend")):
        with pytest.raises(ModuleNotFoundError, match=error):
            tune.console(["memory", "--model", f"my_package.{module}:make"])
    with pytest.raises(ValueError, match="an error of the model's own"):
        tune.console(["memory", "--model", "my_package.model:wrong"])
    with pytest.raises(RuntimeError, match=r"my_package\.model:absent_file failed: .*absent\.json") as raised:
        tune.console(["memory", "--model", "my_package.model:absent_file"])
    assert isinstance(raised.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (1, "float32              12.000     0.023          0.031"),
        (64, "float32              12.000    48.750         65.000"),
        # A tenth of a MiB in the largest row alone.
        (128, "float32              12.000   193.500        258.000"),
        (1024, "float32              12.000    12.012         16.016"),
        (2**14, "float32              12.000     3.000          4.000"),
    ],
)
def test_sizes_are_in_a_unit_that_fits_the_model(
    width: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = {1: "KiB", 64: "KiB", 128: "KiB", 1024: "MiB", 2**14: "GiB"}[width]
    monkeypatch.setattr(memory, "make_on_meta", lambda path: torch.nn.Linear(width, width, device="meta"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert memory.main("a:model") == 0
    _, head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[4:8] == [unit, unit, "with", "grads"]
    assert first.rstrip() == line


def test_a_unit_is_taken_from_a_tenth_of_it_on() -> None:
    units = {0: "KiB", 104_857: "KiB", 104_858: "MiB", 107_374_182: "MiB", 107_374_183: "GiB", 2**40: "GiB"}
    assert {nbytes: memory.unit_of(nbytes) for nbytes in units} == units
