"""Small programs that people run on PyTorch's optimizers. Each test holds for PyTorch's and for ours."""

import contextlib
import copy
import gc
import io
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from dragon.vm.torch import optim as ours
from dragon.vm.torch.optim import swap

from .both import MODULES, NAMES, WAYS, build

each_module = pytest.mark.parametrize("module", MODULES)
each_name = pytest.mark.parametrize("name", NAMES)
each_way = pytest.mark.parametrize("way", WAYS)


def stepped(module: ModuleType, name: str, n_params: int = 40, shape: tuple[int, ...] = (16, 16)) -> Any:
    params = [nn.Parameter(torch.randn(shape)) for _ in range(n_params)]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(module, name)(params, lr=1e-2, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@each_way
def test_a_rest_of_a_head_is_no_step_for_it(way: Any) -> None:
    """After a bare `zero_grad()`, a parameter that the loss does not reach has no gradient."""
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
    optimizer = build(way, "Adam", heads.parameters(), lr=1e-2)
    for number in range(60):
        inputs = torch.randn(16, 8)
        loss = (heads[number % 2](inputs) - inputs[:, :1]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(0.3818, abs=1e-4)
    assert {float(optimizer.state[param]["step"]) for param in heads.parameters()} == {30.0}


@each_way
def test_eps_is_pytorchs_for_tiny_gradients(way: Any) -> None:
    def train(optimizer: Any, model: nn.Module) -> float:
        for _ in range(20):
            optimizer.zero_grad()
            (model(torch.ones(4, 8)).mean() * 1e-4).backward()
            optimizer.step()
        return float(model.weight.detach().double().sum())

    sums = []
    for make in (lambda params: build(way, "Adam", params, lr=1e-2, eps=1e-5), None):
        torch.manual_seed(0)
        model = nn.Linear(8, 1)
        start = float(model.weight.detach().double().sum())
        if make is None:
            # Constant gradients of 1e-4: each update is lr * g / (g + eps).
            sums.append(start - 20 * 8 * 1e-2 * 1e-4 / (1e-4 + 1e-5))
        else:
            sums.append(train(make(model.parameters()), model))
    assert sums[0] == pytest.approx(sums[1], abs=1e-5)


@each_module
@each_name
def test_a_frozen_quantised_base_model_is_no_obstacle(module: ModuleType, name: str) -> None:
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    trained = nn.Parameter(torch.ones(2))
    optimizer = getattr(module, name)([frozen, trained], lr=0.1)
    trained.grad = torch.ones(2)
    optimizer.step()
    assert trained[0] < 1
    assert frozen.sum() == 0


@each_module
@pytest.mark.parametrize("key", ["global_step", ("a", 1)])
def test_foreign_entries_of_the_state_are_kept_and_saved(module: ModuleType, key: Any) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = module.Adam([param])
    optimizer.state[key] = 7
    for _ in range(2):
        optimizer.step()
    assert optimizer.state_dict()["state"][key] == 7
    other = module.Adam([param])
    other.load_state_dict(optimizer.state_dict())
    assert other.state[key] == 7
    other.step()
    assert float(other.state[param]["step"]) == 3


@each_module
@pytest.mark.parametrize("key", ["others", 7, -1])
@pytest.mark.parametrize("value", [{"step": 5, "a": 1}, {}, 0, torch.zeros(2)], ids=str)
def test_what_others_keep_under_keys_of_their_own_is_theirs(module: ModuleType, key: Any, value: Any) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = module.SGD(params, lr=0.1, momentum=0.9)
    params[0].grad = torch.ones(3)
    optimizer.step()
    optimizer.state[key] = value
    if hasattr(optimizer, "sum_grad"):
        optimizer.sum_grad()
    loaded = module.SGD(params, lr=0.1, momentum=0.9)
    loaded.load_state_dict(optimizer.state_dict())
    assert str(loaded.state[key]) == str(value)


FOREIGN = {
    "lr_scale": 0.5,
    "trust_scale": torch.tensor(2.0),
    "weight_q8": torch.zeros(3, dtype=torch.int8),
    "storage": "disk",
    0: [1, 2],
    "nothing": None,
    "empty": {},
}


@each_name
@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("n_steps", [0, 2])
def test_any_name_of_others_in_the_state_of_a_parameter_is_kept_and_saved(
    name: str, key: Any, n_steps: int
) -> None:
    """PyTorch's loader makes int8 fp32, and a string a generator; its Adam wants a step count beside any entry."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = getattr(ours, name)(params, lr=0.1)
    for _ in range(n_steps):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
    optimizer.state[params[0]][key] = FOREIGN[key]
    names = set(optimizer.state_dict()["state"][0])
    for _ in range(2):
        saved = optimizer.state_dict()["state"][0]
        assert saved.keys() == names
        assert str(saved[key]) == str(FOREIGN[key])
        loaded = getattr(ours, name)(params, lr=0.1)
        loaded.load_state_dict(optimizer.state_dict())
        optimizer = loaded
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert str(optimizer.state[params[0]][key]) == str(FOREIGN[key])


@each_module
@each_name
def test_meta_parameters_step(module: ModuleType, name: str) -> None:
    model = nn.Linear(4, 2, device="meta")
    optimizer = getattr(module, name)(model.parameters(), lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
    for _ in range(2):
        model(torch.ones(1, 4, device="meta")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert len(states) == (2 if name == "SGD" else 4)
    assert {value.device.type for value in states} == {"meta"}


@each_module
@each_name
def test_memory_estimators_step_fake_tensors(module: ModuleType, name: str) -> None:
    with FakeTensorMode():
        model = nn.Linear(4, 2)
        optimizer = getattr(module, name)(
            model.parameters(), lr=0.1, **({"momentum": 0.9} if name == "SGD" else {})
        )
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    keys = ["momentum_buffer"] if name == "SGD" else ["exp_avg", "exp_avg_sq"]
    sizes = [optimizer.state[param][key].numel() for param in model.parameters() for key in keys]
    assert sizes == [size for size in (8, 2) for _ in keys]


@each_way
@each_name
def test_a_learning_rate_that_is_a_numpy_array_is_read_at_each_step(way: Any, name: str) -> None:
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = build(way, name, [param])
    rate = np.array(0.01)
    optimizer.param_groups[0].update(lr=rate, weight_decay=0.0)
    for number in range(3):
        param.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        rate[...] = 0.1 * (number + 1)
    # A constant gradient of 1 moves each of the three by its rate.
    assert param.item() == pytest.approx(-(0.01 + 0.1 + 0.2), rel=1e-6)


@each_module
@each_name
def test_a_state_is_saved_and_copied_alone(module: ModuleType, name: str) -> None:
    def saved(value: Any) -> int:
        file = io.BytesIO()
        torch.save(value, file)
        return len(file.getvalue())

    optimizer = stepped(module, name, n_params=100)
    first, second, *_ = optimizer.param_groups[0]["params"]
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    one = optimizer.state[first][key]
    assert saved(one) < 16 * 16 * 4 + 2000
    assert saved({k: v for k, v in optimizer.state_dict()["state"].items() if k < 10}) < 40_000
    assert one.storage_offset() == 0
    assert copy.deepcopy(one).untyped_storage().nbytes() == 16 * 16 * 4
    one.untyped_storage().resize_(0)
    assert optimizer.state[second][key].untyped_storage().nbytes() == 16 * 16 * 4


def offload(state: Any) -> None:
    for entry in state.values():
        entry.update({key: value.clone() for key, value in entry.items() if isinstance(value, torch.Tensor)})


@each_module
@each_name
@pytest.mark.parametrize("take_away", [offload, lambda state: state.clear()], ids=["offload", "clear"])
def test_states_that_were_taken_away_are_freed(module: ModuleType, name: str, take_away: Any) -> None:
    optimizer = stepped(module, name)
    optimizer.zero_grad(set_to_none=True)
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    held = [weakref.ref(state[key].untyped_storage()) for state in optimizer.state.values()]
    take_away(optimizer.state)
    gc.collect()
    assert len(held) == 40
    assert [ref for ref in held if ref() is not None] == []


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this build of torch makes no fake CUDA tensors")
@pytest.mark.parametrize("option", ["fused", "capturable"])
@each_module
def test_fake_parameters_of_a_gpu_step_where_there_is_none(module: ModuleType, option: str) -> None:
    """Estimates of memory are made so, with the options that the run is to have."""
    with FakeTensorMode():
        param = nn.Parameter(torch.ones(4, device="cuda"))
        optimizer = module.AdamW([param], **{option: True})
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.state[param]["exp_avg"].device == param.device


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_meta_parameters_step_with_options_that_pytorch_refuses_for_them(option: str) -> None:
    param = nn.Parameter(torch.ones(4, device="meta"))
    optimizer = ours.AdamW([param], **{option: True})
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["step"] == 2


@each_module
@each_name
def test_a_wrapper_subclass_is_one_parameter(module: ModuleType, name: str) -> None:
    def train(make_param: Callable[[], nn.Parameter]) -> tuple[nn.Parameter, Any]:
        param = make_param()
        optimizer = getattr(module, name)([param], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            (param * param).sum().backward()
            optimizer.step()
        return param, optimizer.state[param]

    both, state = train(lambda: nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3) * 2)))
    one, plain = train(lambda: nn.Parameter(torch.ones(3)))
    two, _ = train(lambda: nn.Parameter(torch.ones(3) * 2))
    torch.testing.assert_close(both.a, one.detach())
    torch.testing.assert_close(both.b, two.detach())
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    assert type(state[key]) is TwoTensor
    torch.testing.assert_close(state[key].a, plain[key])
    if name != "SGD":
        assert float(state["step"]) == 3


@each_module
def test_two_wrapper_subclasses_share_no_memory(module: ModuleType) -> None:
    params = [nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))) for _ in range(2)]
    assert len(module.Adam(params).param_groups[0]["params"]) == 2


@pytest.mark.parametrize("context", [contextlib.nullcontext, swap], ids=["torch", "swapped"])
def test_a_swapped_script_keeps_its_meaning(context: Any) -> None:
    torch.manual_seed(0)
    used, seldom = nn.Linear(2, 2), nn.Linear(2, 2)
    with context():
        optimizer = torch.optim.AdamW([*used.parameters(), *seldom.parameters()], lr=1e-2, weight_decay=0.1)
    for number in range(10):
        optimizer.zero_grad()
        (used if number % 5 else seldom)(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    assert int(optimizer.state[seldom.weight]["step"]) == 2
    assert int(optimizer.state[used.weight]["step"]) == 8


@each_module
def test_sgd_takes_a_tensor_as_rate_with_foreach(module: ModuleType) -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = module.SGD([param], lr=torch.tensor(0.1), foreach=True)
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == pytest.approx(0.9)


@each_module
@each_name
def test_a_compiled_function_builds_an_optimizer(module: ModuleType, name: str) -> None:
    model = nn.Linear(4, 4)
    make = getattr(module, name)

    def build_it() -> Any:
        return make(model.parameters(), lr=0.1)

    optimizer = torch.compile(build_it, backend="eager")()
    assert type(optimizer) is make
    model(torch.ones(1, 4)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.weight)


@each_module
def test_the_step_count_follows_the_default_dtype(module: ModuleType) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        param = nn.Parameter(torch.ones(2))
        optimizer = module.Adam([param])
        param.grad = torch.ones(2)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[param]["step"].dtype == torch.float64


@each_name
@each_module
def test_names_in_subclasses_are_free(module: ModuleType, name: str) -> None:
    """As the Annotated Transformer's schedule in a subclass, which counts in `_step`."""

    class Scheduled(getattr(module, name)):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.0)
            self._step = self._update = self._reset = self._zero_grad = self._rate = self._count = 0

        def step(self, closure: Any = None) -> Any:
            self._step += 1
            for group in self.param_groups:
                group["lr"] = 0.1 * self._step
            return super().step(closure)

    param, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, plain = Scheduled([param]), getattr(torch.optim, name)([twin])
    for step in (1, 2, 3):
        plain.param_groups[0]["lr"] = 0.1 * step
        param.grad, twin.grad = torch.full((3,), 0.5), torch.full((3,), 0.5)
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
        assert param.grad is None
    torch.testing.assert_close(param, twin)
    assert copy.copy(optimizer).param_groups == optimizer.param_groups


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("cls", [ours.Adam, ours.SGD])
def test_a_subclass_that_passes_a_constructor_over_is_told(cls: Any, is_named: bool) -> None:
    """PyTorch's base takes any defaults, for a class that has a step of its own."""

    class Own(cls):
        def __init__(self, params: Any) -> None:
            base = torch.optim.Optimizer if is_named else super(cls, self)
            base.__init__(*(self,) * is_named, params, {"lr": 0.1, "gravity": 1.0})

    with pytest.raises(TypeError, match=r"derive the class from torch\.optim\.Optimizer"):
        Own([nn.Parameter(torch.ones(3))])
