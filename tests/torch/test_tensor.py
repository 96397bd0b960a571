"""`dragon.vm.torch.Tensor`: which results are Dragon tensors, and what they keep of PyTorch's own type."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch as real
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm import torch

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(*shape))


OPERATIONS = {
    "times": lambda x: x * 2,
    "from the left": lambda x: 2 * x,
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.T,
    "item": lambda x: x[0],
    "slice": lambda x: x[:, 1:],
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "to": lambda x: x.to(torch.float64),
    "function": torch.relu,
    "functional": lambda x: torch.nn.functional.linear(x, x),
    "comparison": lambda x: x > 0,
    "list": lambda x: torch.stack([x, x]),
    "new": lambda x: x.new_zeros(3),
    "where": lambda x: torch.where(x > 0, x, 0),
    "matmul": lambda x: x @ x.t(),
    "linalg": lambda x: torch.linalg.norm(x),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("make", [parameter, torch.ones], ids=["parameter", "tensor"])
def test_an_operation_gives_a_dragon_tensor_and_never_a_parameter(operation, make):
    assert type(operation(make(2, 3))) is torch.Tensor


def test_all_tensors_of_a_result_are_dragons_and_its_type_is_kept():
    largest = torch.max(parameter(2, 3), dim=1)

    assert type(largest) is real.return_types.max
    assert type(largest.values) is type(largest.indices) is torch.Tensor
    assert {type(part) for part in parameter(2, 3).unbind()} == {torch.Tensor}
    assert {type(row) for row in parameter(2, 3)} == {torch.Tensor}


def test_plain_tensors_give_plain_tensors():
    plain = real.ones(2)

    assert type(torch.relu(plain)) is type(plain + plain) is real.Tensor


def test_plain_tensors_and_parameters_mix_with_dragons():
    plain, plain_parameter = real.ones(2), real.nn.Parameter(real.ones(2))

    assert type(plain + torch.ones(2)) is type(torch.ones(2) * plain_parameter) is torch.Tensor
    assert type(plain_parameter) is real.nn.Parameter


FUNCTIONS_IN_PYTHON = {
    "loss": torch.nn.functional.mse_loss,
    "product": lambda x, y: torch.einsum("i,i->", x, y),
    "one of a list": lambda x, y: torch.broadcast_tensors(x, y, x + y)[2],
    "gradient": lambda x, y: torch.autograd.grad(x * y, [x, y], torch.ones(2))[0],
}


@pytest.mark.parametrize("function", FUNCTIONS_IN_PYTHON.values(), ids=FUNCTIONS_IN_PYTHON)
def test_the_order_of_plain_tensors_and_dragons_decides_nothing(function):
    """PyTorch asks the type of each argument in turn, where a function is one of Python's."""
    plain, dragon = (module.ones(2, requires_grad=True) for module in (real, torch))

    assert type(function(plain, dragon)) is type(function(dragon, plain)) is torch.Tensor
    torch.nn.functional.mse_loss(dragon, plain, reduction="none").backward()


def test_a_type_that_is_no_tensor_has_the_word_beside_dragons():
    class Foreign:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "foreign"

    for make in (parameter, torch.ones):
        assert torch.add(make(2), Foreign()) == torch.add(Foreign(), make(2)) == "foreign"


def test_a_plain_tensor_that_an_operation_returns_stays_plain():
    plain, dragon = real.ones(2), torch.ones(2)

    assert plain.add_(dragon) is plain
    assert plain.to(dragon) is plain
    assert torch.mul(dragon, 3, out=plain) is plain
    assert torch.broadcast_tensors(plain, dragon)[0] is not dragon
    assert type(plain) is real.Tensor
    assert plain.tolist() == [3, 3]


def test_in_place_operations_return_the_tensor_itself():
    x, p = torch.ones(2), parameter(2)

    with torch.no_grad():
        assert x.add_(1) is x
        assert p.mul_(2) is p
    assert type(p) is torch.nn.Parameter


def test_results_carry_no_extra_node_and_are_no_views():
    y = torch.ones(2, requires_grad=True) * 2

    assert y.grad_fn.name() == "MulBackward0"
    assert not y._is_view()
    assert y.view(1, 2)._is_view()


def test_a_users_tensor_type_keeps_its_type():
    class Mine(torch.Tensor):
        pass

    mine = torch.ones(2).as_subclass(Mine)

    assert type(mine + 1) is type(mine + parameter(2)) is type(torch.ones(2) + mine) is Mine


def test_pytorchs_tensors_are_instances_as_code_that_asks_means_them():
    assert isinstance(real.ones(2), torch.Tensor)
    assert isinstance(real.nn.Parameter(real.ones(2)), torch.nn.Parameter)
    assert not isinstance(real.ones(2), torch.nn.Parameter)
    assert not isinstance(3, torch.Tensor)
    assert isinstance(parameter(2), real.nn.Parameter)
    assert not isinstance(torch.ones(2), real.nn.Parameter)


@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_text_is_pytorchs(shape, requires_grad):
    plain, dragon = (module.ones(shape, requires_grad=requires_grad) for module in (real, torch))

    assert repr(dragon) == repr(plain)
    assert repr(dragon * 2) == repr(plain * 2)
    assert repr(torch.nn.Parameter(dragon, requires_grad)) == repr(real.nn.Parameter(plain, requires_grad))


def test_a_number_can_be_formatted():
    assert f"{torch.tensor(1.25, requires_grad=True):.1f} {torch.tensor(7):03d}" == "1.2 007"
    with pytest.raises(TypeError, match="format"):
        f"{torch.ones(2):.1f}"


def test_numpy_sees_the_memory():
    x = torch.ones(2)
    x.numpy()[0] = 5

    assert x.tolist() == [5, 1]


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def saved(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled, saved])
@pytest.mark.parametrize(
    "make", [torch.nn.Parameter, lambda x, flag: x.requires_grad_(flag)], ids=["parameter", "tensor"]
)
@given(shape=SHAPES, requires_grad=st.booleans())
def test_copies_keep_type_values_flag_and_rule(duplicate, make, shape, requires_grad):
    x = make(torch.rand(shape), requires_grad)
    x.note = "kept"

    duplicated = duplicate(x)

    assert type(duplicated) is type(x)
    assert duplicated.requires_grad == requires_grad
    assert duplicated.is_leaf
    assert real.equal(duplicated.detach(), x.detach())
    assert type(x) is torch.nn.Parameter or duplicated.note == "kept"
    if requires_grad:
        for factor in (2, 3):
            (duplicated * factor).backward()
        assert duplicated.grad.tolist() == torch.full(shape, 3.0).tolist()


def test_a_deep_copy_keeps_shared_memory_and_gradients_as_pytorchs_does():
    base = torch.ones(4)
    leaf = torch.ones(2, requires_grad=True)
    (leaf * 2).backward()

    whole, half, copied = copy.deepcopy((base, base[:2], leaf))

    half[0] = 7
    assert whole.tolist() == [7, 1, 1, 1]
    assert base.tolist() == [1, 1, 1, 1]
    assert copied.grad.tolist() == [2, 2]
    assert copied.grad is not leaf.grad


def test_a_result_that_autograd_follows_cannot_be_copied_deeply():
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(torch.ones(2, requires_grad=True) * 2)


def test_pytorchs_parameter_of_dragon_data_is_dragons():
    of_tensor, of_parameter = real.nn.Parameter(torch.ones(2)), real.nn.Parameter(parameter(2), False)

    assert type(of_tensor) is type(of_parameter) is torch.nn.Parameter
    assert (of_tensor.requires_grad, of_parameter.requires_grad) == (True, False)


def test_pytorchs_parameter_of_a_users_tensor_type_is_a_parameter_of_that_type():
    class Mine(torch.Tensor):
        pass

    parameter = real.nn.Parameter(torch.ones(2).as_subclass(Mine))
    for each in (parameter, copy.deepcopy(parameter), copy.copy(parameter)):
        module = torch.nn.Module()
        module.weight = each
        assert type(each) is Mine
        assert isinstance(each, torch.nn.Parameter)
        assert list(module.parameters()) == [each]
    assert not isinstance(parameter * 1, real.nn.Parameter)
    for factor in (2, 3):
        (parameter * factor).sum().backward()
    assert parameter.grad.tolist() == [3, 3]


@pytest.mark.parametrize("make", [parameter, lambda n: torch.ones(n, requires_grad=True)])
def test_a_tensor_dies_with_its_last_reference(make):
    gc.disable()
    try:
        x = make(3)
        (x * 2).backward()
        alive = weakref.ref(x)
        del x
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_function_transforms_work():
    x = torch.arange(6.0).view(2, 3)

    assert torch.vmap(lambda row: row.sum())(x).tolist() == [3, 12]
    assert torch.func.grad(lambda y: (y**2).sum())(x).tolist() == (2 * x).tolist()
    assert torch.func.jacrev(lambda y: y * 2)(x[0]).tolist() == (2 * torch.eye(3)).tolist()
    assert torch.autograd.gradcheck(torch.sin, torch.ones(3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_data_loader_gives_dragon_batches(n_workers):
    data = torch.utils.data.TensorDataset(torch.arange(4.0))

    batches = [batch for (batch,) in torch.utils.data.DataLoader(data, batch_size=2, num_workers=n_workers)]

    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert {type(batch) for batch in batches} == {torch.Tensor}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_augmented_result_may_be_a_nested_tensor():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = real.nested.as_nested_tensor([x * 1, x[:1] * 3])
    y *= y
    y.to_padded_tensor(0.0).sum().backward()
    assert x.grad.tolist() == [20.0, 4.0]
