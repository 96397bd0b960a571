"""Checkpoints that PyTorch's optimizers write and ours read, and the other way round."""

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dragon.vm.torch import optim as ours

from .both import MODULES, NAMES

# PyTorch's own, of a checkpoint in one process.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.1, "weight_decay": 0.01},
    "AdamW": {"lr": 0.1, "amsgrad": True},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}
DIRECTIONS = [
    pytest.param(torch.optim, torch.optim, id="torch-to-torch"),
    pytest.param(torch.optim, ours, id="torch-to-ours"),
    pytest.param(ours, torch.optim, id="ours-to-torch"),
    pytest.param(ours, ours, id="ours-to-ours"),
]
each_direction = pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
each_name = pytest.mark.parametrize("name", [*NAMES, "SGD without momentum"])


class Training:
    """A model and an optimizer in the middle of a training."""

    def __init__(
        self, module: ModuleType, name: str, seed: int, n_steps: int, *, is_lazy: bool = False, **options: Any
    ) -> None:
        torch.manual_seed(seed)
        layers = (nn.LazyLinear(4), nn.LazyLinear(2)) if is_lazy else (nn.Linear(3, 4), nn.Linear(4, 2))
        self.model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
        last = list(self.model[2].parameters())
        groups = [{"params": list(self.model[0].parameters())}, {"params": last, "lr": 0.02}]
        plain = {"lr": 0.1} if name == "SGD without momentum" else OPTIONS[name]
        self.optimizer = getattr(module, name.split()[0])(groups, **plain, **options)
        for number in range(n_steps):
            self.step(number)

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        self.model(inputs).square().mean().backward()
        self.optimizer.step()

    def go_on_as(self, other: "Training") -> None:
        """Assert that both train alike from here."""
        self.model.load_state_dict(other.model.state_dict())
        for number in range(10, 13):
            self.step(number)
            other.step(number)
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@each_direction
@each_name
def test_a_state_dict_is_taken_over(writer: ModuleType, reader: ModuleType, name: str) -> None:
    saved, fresh = Training(writer, name, 0, 3), Training(reader, name, 1, 0)
    file = io.BytesIO()
    torch.save(saved.optimizer.state_dict(), file)
    file.seek(0)
    fresh.optimizer.load_state_dict(torch.load(file, weights_only=True))
    fresh.go_on_as(saved)


@each_name
def test_the_state_dicts_are_alike(name: str) -> None:
    theirs, mine = (Training(module, name, 0, 3).optimizer.state_dict() for module in (torch.optim, ours))
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert {k: v for k, v in mine["state"][key].items() if v is not None}.keys() == {
            k for k, v in state.items() if v is not None
        }


@each_direction
@each_name
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_the_default_planner_saves_and_loads(
    writer: ModuleType, reader: ModuleType, name: str, flat: bool, folder: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved, fresh = Training(writer, name, 0, 3), Training(reader, name, 1, 1)
    expected = copy.deepcopy(saved.model.state_dict())
    dcp.save(
        {"optim": get_optimizer_state_dict(saved.model, saved.optimizer, options=options)},
        checkpoint_id=folder,
        no_dist=True,
    )
    state = {"optim": get_optimizer_state_dict(fresh.model, fresh.optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state["optim"], options=options)
    assert all(map(torch.equal, saved.model.state_dict().values(), expected.values())), "saving wrote a parameter"
    fresh.go_on_as(saved)


@each_direction
@each_name
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_the_state_dict_utilities_convert(writer: ModuleType, reader: ModuleType, name: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved, fresh = Training(writer, name, 0, 3), Training(reader, name, 1, 0)
    state = get_optimizer_state_dict(saved.model, saved.optimizer, options=options)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, copy.deepcopy(state), options=options)
    fresh.go_on_as(saved)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_the_dict_does_not_know_survives_loading(name: str) -> None:
    saved = Training(torch.optim, name, 0, 3)
    fresh = Training(ours, name, 1, 0, ema_decay=0.5, max_grad_norm=1.0)
    fresh.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert [group["ema_decay"] for group in fresh.optimizer.param_groups] == [0.5, 0.5]
    fresh.step(3)
    assert all("ema" in state for state in fresh.optimizer.state.values())
    assert float(fresh.optimizer.grad_norm) > 0


@pytest.mark.parametrize("name", NAMES)
def test_own_states_and_options_come_back(name: str, folder: Path) -> None:
    saved, fresh = (Training(ours, name, seed, 3, ema_decay=0.5) for seed in (0, 1))
    dcp.save({"optim": get_optimizer_state_dict(saved.model, saved.optimizer)}, checkpoint_id=folder, no_dist=True)
    state = {"optim": get_optimizer_state_dict(fresh.model, fresh.optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state["optim"])
    for mine, theirs in zip(fresh.optimizer.state.values(), saved.optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert mine[key] is theirs[key] is None or torch.equal(mine[key], theirs[key]), key


def test_a_module_whose_import_is_forbidden_asks_for_no_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.state_dict", None)
    adam = ours.Adam([nn.Parameter(torch.ones(3))])

    # Of the name of PyTorch's function.
    def _get_optim_state_dict() -> dict[str, Any]:
        return adam.state_dict()

    assert _get_optim_state_dict()["state"] == {}


@each_direction
@each_name
def test_states_load_before_lazy_parameters_have_a_shape(
    writer: ModuleType, reader: ModuleType, name: str
) -> None:
    saved = Training(writer, name, seed=0, n_steps=2)
    going_on = Training(writer, name, seed=1, n_steps=0)
    going_on.model.load_state_dict(saved.model.state_dict())
    going_on.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    lazy = Training(reader, name, seed=2, n_steps=0, is_lazy=True)
    lazy.optimizer.load_state_dict(saved.optimizer.state_dict())
    lazy.model.load_state_dict(saved.model.state_dict())
    for number in range(2):
        going_on.step(number)
        lazy.step(number)
    for theirs, own in zip(going_on.model.parameters(), lazy.model.parameters(), strict=True):
        torch.testing.assert_close(own, theirs)


def test_formats_of_states_need_a_shape() -> None:
    saved = Training(ours, "Adam", seed=0, n_steps=1)
    lazy = Training(ours, "Adam", seed=2, n_steps=0, is_lazy=True, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"parameter 0 is uninitialized.*Run the model once"):
        lazy.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert not lazy.optimizer.state


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8])
def test_states_of_one_byte_become_the_parameters_as_in_pytorch(dtype):
    found = []
    for module in (torch.optim, ours):
        param = torch.nn.Parameter(torch.ones(4, 3))
        optimizer = module.Adam([param])
        moments = {name: torch.arange(12.0).view(4, 3).to(dtype) for name in ("exp_avg", "exp_avg_sq")}
        saved = {**optimizer.state_dict(), "state": {0: {"step": torch.tensor(3.0), **moments}}}
        optimizer.load_state_dict(saved)
        found.append([optimizer.state[param][name] for name in moments])
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=0)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_steps", [0, 1])
def test_a_flat_dict_is_loaded_beside_gradients(name: str, n_steps: int) -> None:
    """PyTorch creates states to find their names; where gradients keep it from that, it loads none."""
    saved, fresh = Training(ours, name, 0, 3), Training(ours, name, 1, 0)
    state = copy.deepcopy(get_optimizer_state_dict(saved.model, saved.optimizer, options=FLAT))
    first, *_, last = fresh.model.parameters()
    first.grad = torch.ones_like(first)
    if n_steps:
        # Other parameters stay without a state.
        fresh.optimizer.step()
        last.grad = torch.ones_like(last)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=FLAT)
    fresh.go_on_as(saved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_flat_dict_without_a_parameters_state_is_refused_as_a_nested_one(name: str, has_gradients: bool) -> None:
    saved, texts = Training(ours, name, 0, 3), []
    for options in (StateDictOptions(), FLAT):
        state = get_optimizer_state_dict(saved.model, saved.optimizer, options=options)
        if options is FLAT:
            state = {key: value for key, value in state.items() if not key.startswith("state.2.bias")}
        else:
            del state["state"]["2.bias"]
        fresh = Training(ours, name, 1, 0)
        if has_gradients:
            fresh.model(torch.ones(3)).sum().backward()
        with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter '2\.bias'") as caught:
            set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=options)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    lenient = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=lenient)
    missing = fresh.model[2].bias
    assert not fresh.optimizer.state.get(missing)
    assert len([param for param, entries in fresh.optimizer.state.items() if entries]) == 3


def freeze(training: Training) -> None:
    training.model[0].bias.requires_grad_(False)


def leave_momentum_out(training: Training) -> None:
    training.optimizer.param_groups[1]["momentum"] = 0.0


@pytest.mark.parametrize("change", [freeze, leave_momentum_out])
def test_a_flat_dict_needs_no_state_of_a_parameter_that_has_none(change: Callable[[Training], None]) -> None:
    saved, fresh = Training(ours, "SGD", 0, 0), Training(ours, "SGD", 1, 0)
    for training in (saved, fresh):
        change(training)
    saved.step(0)
    state = copy.deepcopy(get_optimizer_state_dict(saved.model, saved.optimizer, options=FLAT))
    fresh.model(torch.ones(3)).sum().backward()
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=FLAT)
    fresh.go_on_as(saved)


def test_a_flat_dict_of_an_optimizer_before_its_first_step_is_loaded() -> None:
    saved, fresh = Training(ours, "Adam", 0, 0), Training(ours, "Adam", 1, 0)
    for training in (saved, fresh):
        # So that PyTorch has no states made.
        training.model(torch.ones(3)).sum().backward()
    state = get_optimizer_state_dict(saved.model, saved.optimizer, options=FLAT)
    assert not any(key.startswith("state.") for key in state)
    set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=FLAT)
    fresh.go_on_as(saved)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", NAMES)
def test_no_states_are_made_beside_gradients(module: ModuleType, name: str) -> None:
    fresh = Training(module, name, 1, 0)
    fresh.model(torch.ones(3)).sum().backward()
    assert not get_optimizer_state_dict(fresh.model, fresh.optimizer)["state"]
    fresh.optimizer.zero_grad()
    assert len(get_optimizer_state_dict(fresh.model, fresh.optimizer)["state"]) == 4


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit"}], ids=str)
def test_states_are_given_away_themselves_and_those_of_8_bits_as_copies(options: dict[str, Any]) -> None:
    model = nn.Linear(64, 64)
    optimizer = ours.AdamW(model.parameters(), **options)
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    given = get_optimizer_state_dict(model, optimizer)["state"]["weight"]["exp_avg"]
    given.fill_(0.5)
    held = optimizer.state_dict()["state"][0]["exp_avg"]
    assert bool((held == 0.5).all()) == (options.get("state_dtype") != "8bit")
