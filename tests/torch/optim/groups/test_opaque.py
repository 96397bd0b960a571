"""Tensors without memory that a kernel could write to: they go the eager way, through their own dispatch."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._backends.host import HostGroup

ALGORITHMS = [Adam, SGD]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
BACKENDS = [None, "native", "eager"]


def make(algorithm: Any, params: Any, **options: Any) -> Any:
    return algorithm(
        params, lr=0.1, **({"momentum": 0.9} if issubclass(algorithm, torch.optim.SGD) else {}), **options
    )


def wrapper(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(TwoTensor(torch.full((3,), values[0]), torch.full((3,), values[1])))


def train(optimizer: Any, params: list[Any]) -> None:
    for _ in range(3):
        for param in params:
            param.grad = None
        for param in params:
            (param * param).sum().backward()
        optimizer.step()


@each_algorithm
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrapper_is_updated_as_torch_does_with_states_of_its_kind(algorithm: Any, backend: str | None) -> None:
    ours, theirs = ([wrapper(1.0, 2.0), wrapper(3.0, 4.0)] for _ in range(2))
    optimizer = make(algorithm, ours, backend=backend)
    reference = make(getattr(torch.optim, algorithm.__name__), theirs)
    train(optimizer, ours)
    train(reference, theirs)
    for mine, their in zip(ours, theirs, strict=True):
        for part in ("a", "b"):
            torch.testing.assert_close(getattr(mine, part), getattr(their, part), rtol=1e-6, atol=1e-7)
        key = "momentum_buffer" if algorithm is SGD else "exp_avg"
        assert type(optimizer.state[mine][key]) is TwoTensor
        assert optimizer.state[mine].get("step", 3) == 3


@each_algorithm
def test_a_wrapper_beside_plain_tensors_leaves_them_their_backend(algorithm: Any) -> None:
    plain = [torch.nn.Parameter(torch.full((3,), 1.0)) for _ in range(2)]
    alone, beside = make(algorithm, plain[:1]), make(algorithm, [plain[1], wrapper(1.0, 2.0)])
    train(alone, plain[:1])
    train(beside, [plain[1], beside.param_groups[0]["params"][1]])
    assert torch.equal(plain[0], plain[1])


def test_a_misshapen_state_of_a_wrapper_is_refused_before_anything_is_written() -> None:
    param = wrapper(1.0, 2.0)
    optimizer = Adam([param])
    train(optimizer, [param])
    before = param.a.clone()
    optimizer.state[param]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"a parameter has shape \(3,\), but its state 'exp_avg' shape \(2,\)"):
        optimizer.step()
    assert torch.equal(param.a, before)


def test_a_gradient_of_another_shape_is_refused_on_meta_as_elsewhere() -> None:
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = Adam([param])
    param.grad = torch.ones(3, device="meta")
    optimizer.step()
    frozen = torch.nn.Parameter(torch.ones(2, dtype=torch.int32, device="meta"), requires_grad=False)
    optimizer.add_param_group({"params": [frozen]})
    frozen.grad = torch.ones(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"but got one of torch\.int32"):
        optimizer.step()


@each_algorithm
def test_meta_parameters_step_and_keep_meta_states(algorithm: Any) -> None:
    model = torch.nn.Linear(4, 2, device="meta")
    optimizer = make(algorithm, model.parameters())
    for _ in range(2):
        model(torch.ones(1, 4, device="meta")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert states
    assert all(state.is_meta and state.shape in ((2, 4), (2,)) for state in states)


@each_algorithm
def test_fake_tensors_step_and_keep_fake_states(algorithm: Any) -> None:
    with FakeTensorMode():
        model = torch.nn.Linear(4, 2)
        optimizer = make(algorithm, model.parameters())
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert states
    assert all(isinstance(state, FakeTensor) for state in states)


def test_narrow_states_of_tensors_without_memory_are_rounded_as_elsewhere() -> None:
    options: dict[str, Any] = {"state_dtype": {"exp_avg": torch.float16, "exp_avg_sq": torch.float32}}
    plain, whole = torch.nn.Parameter(torch.full((3,), 2.0)), wrapper(2.0, 2.0)
    for param in (plain, whole):
        optimizer = make(Adam, [param], backend="eager", **options)
        train(optimizer, [param])
    assert torch.equal(whole.a, plain)
    assert optimizer.state[whole]["exp_avg"].b.dtype == torch.float16
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(3))
        optimizer = make(Adam, [fake], **options)
        train(optimizer, [fake])
        assert isinstance(optimizer.state[fake]["exp_avg"], FakeTensor)


def test_an_explicit_kernel_is_not_given_what_has_no_memory() -> None:
    param = wrapper(1.0, 2.0)
    optimizer = Adam([param], backend="native")
    train(optimizer, [param])
    (group,) = optimizer._updater.plans.latest()[-1]._host.groups
    # In pieces it would be the native backend.
    assert isinstance(group, HostGroup)
    assert group._piece == 0


@each_algorithm
@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("is_fake", [False, True])
def test_what_needs_norms_is_refused_where_numbers_cannot_be_read(
    algorithm: Any, option: dict[str, Any], is_fake: bool
) -> None:
    with FakeTensorMode() if is_fake else torch.device("meta"):
        model = torch.nn.Linear(4, 2)
        optimizer = make(algorithm, model.parameters(), **option)
        model(torch.ones(1, 4)).sum().backward()
    where = "type FakeTensor on cpu" if is_fake else "type Tensor on meta"
    with pytest.raises(ValueError, match=f"need numbers that can be read, but a gradient is of {where}"):
        optimizer.step()
    assert all(float(state.get("step", 0)) == 0 for state in optimizer.state.values())


@each_algorithm
@pytest.mark.parametrize("changed", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn])
def test_a_parameter_without_a_storage_is_left_alone_while_it_has_no_gradient(
    algorithm: Any, changed: Any
) -> None:
    """As PyTorch leaves it. It was frozen when the optimizer was made."""
    param = torch.nn.Parameter(torch.ones(3))
    other = torch.nn.Parameter(changed(torch.ones(3, 3)), requires_grad=False)
    optimizer = make(algorithm, [param, other])
    other.requires_grad_(True)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert param.tolist() == pytest.approx([0.9] * 3)
    assert list(optimizer.state) == [param]
