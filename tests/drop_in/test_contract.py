"""Plain torch parameters follow PyTorch, Dragon's own follow Dragon's page."""

import collections
import inspect
import math
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dragon.vm.torch import optim as ours
from dragon.vm.torch.nn import Parameter

from .both import BACKENDS, MODULES, NAMES, WAYS, build

each_module = pytest.mark.parametrize("module", MODULES)
each_name = pytest.mark.parametrize("name", NAMES)
each_way = pytest.mark.parametrize("way", WAYS)
ADAMS = [ours.Adam, ours.AdamW]


def plain(numel: int = 2) -> nn.Parameter:
    return nn.Parameter(torch.ones(numel))


def own(numel: int = 2) -> Any:
    return Parameter(torch.ones(numel))


@each_name
def test_the_public_classes_are_pytorchs(name: str) -> None:
    optimizer = getattr(ours, name)([plain()], lr=0.1)
    assert isinstance(optimizer, getattr(torch.optim, name))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, ours.Optimizer)
    assert isinstance(optimizer, torch.optim.Adam) == (name != "SGD")
    assert type(optimizer).__name__ == name


@pytest.mark.parametrize("make", ADAMS)
@pytest.mark.parametrize(
    ("params", "resolved"),
    [([plain()], False), ([own()], True), ([own(), plain()], False)],
    ids=["plain", "own", "both"],
)
@pytest.mark.parametrize("given", [None, False, True])
def test_epsilon_hat_is_resolved_once_to_a_bool(make: Any, params: list[Any], resolved: bool, given: Any) -> None:
    expected = resolved if given is None else given
    for arguments in ({"epsilon_hat": given}, {} if given is None else {"epsilon_hat": given}):
        assert make(params, **arguments).param_groups[0].get("epsilon_hat", False) is expected


@pytest.mark.parametrize("make", ADAMS)
def test_each_group_is_resolved_by_its_own_parameters(make: Any) -> None:
    optimizer = make([{"params": [plain()]}, {"params": [own()]}, {"params": [own()], "epsilon_hat": False}])
    optimizer.add_param_group({"params": [own()]})
    assert [group.get("epsilon_hat", False) for group in optimizer.param_groups] == [False, True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make_param", "hat"), [(plain, False), (own, True)], ids=["plain", "own"])
def test_the_formula_is_that_of_the_parameters(backend: str, make_param: Any, hat: bool) -> None:
    param = make_param()
    optimizer = ours.Adam([param], lr=0.1, betas=(0.9, 0.99), eps=0.5, backend=backend)
    with torch.no_grad():
        param.grad = torch.full((2,), 0.25)
    optimizer.step()
    avg, root = 0.1 * 0.25, math.sqrt(0.01) * 0.25
    step = avg / 0.1 / (root / math.sqrt(0.01) + 0.5) if not hat else math.sqrt(0.01) / 0.1 * avg / (root + 0.5)
    assert param.detach()[0].item() == pytest.approx(1 - 0.1 * step, rel=1e-6)


@each_name
@pytest.mark.parametrize("given", [None, False, True])
@pytest.mark.parametrize("kind", ["plain", "own", "both"])
def test_zero_grad_follows_each_parameter_unless_it_is_told(name: str, given: bool | None, kind: str) -> None:
    params = {"plain": [plain()], "own": [own()], "both": [plain(), own()]}[kind]
    optimizer = getattr(ours, name)(params, lr=0.1)
    for param in params:
        param.grad = torch.ones(2)
    optimizer.zero_grad(*([] if given is None else [given]))
    for param in params:
        is_none = (type(param) is nn.Parameter) if given is None else given
        assert (param.grad is None) is is_none
        assert param.grad is None or not param.grad.any()


@each_way
@each_name
def test_a_bare_zero_grad_sets_to_none(way: Any, name: str) -> None:
    param = plain()
    optimizer = build(way, name, [param], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.zero_grad()
    assert param.grad is None


@each_name
def test_own_group_keys_are_saved_only_where_they_differ_from_pytorchs_meaning(name: str) -> None:
    theirs = getattr(torch.optim, name)([plain()], lr=0.1).state_dict()["param_groups"][0]
    group = getattr(ours, name)([plain()], lr=0.1).state_dict()["param_groups"][0]
    assert group == theirs
    changed = getattr(ours, name)([plain()], lr=0.1, ema_decay=0.5, clip_value=2.0).state_dict()["param_groups"][0]
    assert {key: changed[key] for key in changed if key not in theirs} == {"ema_decay": 0.5, "clip_value": 2.0}


@pytest.mark.parametrize("make", ADAMS)
def test_a_resumed_optimizer_has_the_formula_of_the_saved_one(make: Any) -> None:
    saved = make([own()]).state_dict()
    assert saved["param_groups"][0]["epsilon_hat"] is True
    resumed = make([plain()])
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0].get("epsilon_hat", False) is True


@pytest.mark.parametrize("make", ADAMS)
def test_a_choice_against_dragons_page_is_saved_too(make: Any) -> None:
    resumed = make([own()])
    resumed.load_state_dict(make([own()], epsilon_hat=False).state_dict())
    assert resumed.param_groups[0].get("epsilon_hat", False) is False


@pytest.mark.parametrize("make", ADAMS)
def test_taking_over_keeps_pytorchs_formula_for_any_parameter(make: Any) -> None:
    original = getattr(torch.optim, make.__name__)([own()])
    assert make.from_torch(original).param_groups[0].get("epsilon_hat", False) is False
    assert make.from_torch(original, epsilon_hat=True).param_groups[0].get("epsilon_hat", False) is True


@each_name
def test_the_signature_shows_every_keyword_with_pytorchs_defaults(name: str) -> None:
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    found = inspect.signature(getattr(ours, name)).parameters
    assert {key: found[key].default for key in theirs if key in found} == {k: p.default for k, p in theirs.items()}
    assert not any(param.kind in (param.VAR_KEYWORD, param.VAR_POSITIONAL) for param in found.values())
    positional = [key for key, param in theirs.items() if param.kind is param.POSITIONAL_OR_KEYWORD]
    assert list(found)[: len(positional)] == positional
    documented = getattr(ours, name).__doc__
    assert [key for key in found if f"{key}:" not in documented.replace(",", ":")] == []


@each_name
def test_programs_that_pass_on_only_known_options_find_them_as_in_pytorchs(name: str) -> None:
    theirs, found = getattr(torch.optim, name).__init__, getattr(ours, name).__init__
    assert inspect.getfullargspec(found).args == inspect.getfullargspec(theirs).args
    assert found.__defaults__ == theirs.__defaults__
    known = found.__code__.co_varnames
    assert [key for key in inspect.signature(theirs).parameters if key not in known] == []
    options = {key: value for key, value in {"lr": 0.5, "unknown": 1}.items() if key in known}
    assert getattr(ours, name)([plain(3)], **options).param_groups[0]["lr"] == 0.5


@each_name
@pytest.mark.parametrize(
    "options", [{}, {"fused": True, "max_grad_norm": 1.0, "state_dtype": torch.float64}], ids=str
)
def test_an_optimizer_can_be_rebuilt_from_its_groups_and_defaults(name: str, options: dict[str, Any]) -> None:
    first = getattr(ours, name)([{"params": [plain(3)], "lr": 0.5}, {"params": [plain()]}], lr=0.1, **options)
    groups = [dict(group) for group in first.param_groups]
    second = type(first)(groups, **first.defaults)
    assert second.defaults == first.defaults
    assert [set(group) for group in second.param_groups] == [set(group) for group in first.param_groups]
    for param in (param for group in groups for param in group["params"]):
        param.grad = torch.full_like(param, 1e4)
    first.step()
    after = [param.detach().clone() for group in groups for param in group["params"]]
    for param in (param for group in groups for param in group["params"]):
        with torch.no_grad():
            param.fill_(1.0)
        param.grad = torch.full_like(param, 1e4)
    second.step()
    assert all(map(torch.equal, after, [param for group in groups for param in group["params"]]))


@each_module
@each_name
@pytest.mark.parametrize("fused", [None, False, True])
def test_a_scaler_leaves_unscaling_to_the_step_for_fused_alone(module: ModuleType, name: str, fused: Any) -> None:
    optimizer = getattr(module, name)([plain()], lr=0.1, fused=fused)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is (fused is True)


@pytest.mark.parametrize("names", [True, False], ids=["named", "plain"])
def test_a_parameter_listed_twice_is_refused_by_name_or_position(names: bool) -> None:
    shared, other = plain(), plain()
    params: list[Any] = [other, shared, shared]
    if names:
        params = list(zip(("other", "first", "second"), params, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own base class warns first
        with pytest.raises(ValueError, match="PyTorch") as caught:
            ours.Adam(params)
    assert all(word in str(caught.value) for word in (("first", "second") if names else ("1", "2")))


@each_module
def test_the_groups_own_list_of_betas_stays_a_list_that_may_be_written_to(module: ModuleType) -> None:
    param = plain()
    optimizer = module.Adam([{"params": [param], "betas": [0.5, 0.9]}, {"params": [plain()]}], betas=[0.9, 0.99])
    assert [type(group["betas"]) for group in optimizer.param_groups] == [list, tuple]
    assert optimizer.defaults["betas"] == (0.9, 0.99)
    optimizer.param_groups[0]["betas"][0] = 0.0
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.ones(2))


class Settings:
    """A sequence as those of libraries for settings: no list, and without a hash."""

    __hash__ = None

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> float:
        return self.values[index]

    def __setitem__(self, index: int, value: float) -> None:
        self.values[index] = value


@each_way
@pytest.mark.parametrize("sequence", [list, np.array, collections.UserList, collections.deque, Settings])
def test_betas_of_a_group_may_be_any_sequence_that_is_written_to(
    way: Any, sequence: Any, interpreted: None
) -> None:
    """As OmegaConf's `ListConfig`, of which Hydra makes the groups."""
    param, betas = plain(), sequence([0.5, 0.9])
    optimizer = build(way, "Adam", [{"params": [param], "betas": betas}])
    for beta in (0.5, 0.0):
        betas[0] = beta
        param.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.param_groups[0]["betas"] is betas
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.ones(2))


@each_module
@pytest.mark.parametrize("is_loaded", [False, True])
def test_states_have_their_entries_in_pytorchs_order(module: ModuleType, is_loaded: bool) -> None:
    param = plain()
    optimizer = module.Adam([param], amsgrad=True)
    param.grad = torch.ones(2)
    optimizer.step()
    if is_loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    assert list(optimizer.state[param]) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
