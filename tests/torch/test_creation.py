"""Creation functions give Dragon tensors, with PyTorch's values and arguments."""

import numpy as np
import pytest
import torch as real
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm import torch
from dragon.vm.torch.creation import FUNCTIONS

CALLS = {
    "ones": ((2, 3),), "zeros": ((2, 3),), "full": ((2, 3), 1.5), "empty": ((0, 3),), "tensor": ([1.0, 2.0],),
    "as_tensor": ([1.0, 2.0],), "asarray": ([1.0, 2.0],), "arange": (5.0,), "linspace": (0, 1, 5),
    "logspace": (0, 1, 5), "eye": (3,), "rand": (2, 3), "randn": (2, 3), "normal": (0.0, 1.0, (2, 3)),
    "scalar_tensor": (2.0,), "hann_window": (5,), "hamming_window": (5,), "kaiser_window": (5,),
    "bartlett_window": (5,), "blackman_window": (5,), "empty_strided": ((0, 3), (3, 1)),
    "empty_permuted": ((0, 3), (1, 0)),
}  # fmt: skip  # a line a call
INTEGER_CALLS = {
    "randint": (10, (3,)), "randperm": (5,), "tril_indices": (3, 3), "triu_indices": (3, 3),
}  # fmt: skip  # a line a call
LIKE_CALLS = {
    "ones_like": (), "zeros_like": (), "full_like": (2.0,), "empty_like": (), "rand_like": (), "randn_like": (),
    "randint_like": (10,),
}  # fmt: skip  # a line a call
MEMORY_CALLS = {
    "from_numpy": np.ones(3), "frombuffer": bytearray(b"abcd"), "from_dlpack": real.ones(3),
}  # fmt: skip  # a line a call


def same(left, right):
    return real.equal(left.detach().as_subclass(real.Tensor), right.detach())


def test_every_creation_function_is_called_here():
    assert {*CALLS, *INTEGER_CALLS, *LIKE_CALLS, *MEMORY_CALLS} == set(FUNCTIONS)


@pytest.mark.parametrize("name", [*CALLS, *INTEGER_CALLS])
@given(seed=st.integers(0, 2**31))
def test_values_are_pytorchs_and_the_type_is_dragons(name, seed):
    args = {**CALLS, **INTEGER_CALLS}[name]
    real.manual_seed(seed)
    expected = getattr(real, name)(*args)
    real.manual_seed(seed)
    created = getattr(torch, name)(*args)

    assert type(created) is torch.Tensor
    assert created.dtype == expected.dtype
    assert created.is_leaf
    assert same(created, expected)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"empty", "normal"}))
def test_dtype_device_and_requires_grad_are_kept(name):
    created = getattr(torch, name)(
        *CALLS[name],
        dtype=torch.float64,
        device="meta" if name not in ("as_tensor", "asarray") else "cpu",
        **({} if name == "as_tensor" else {"requires_grad": True}),
    )

    assert type(created) is torch.Tensor
    assert created.dtype is real.float64
    assert created.requires_grad == (name != "as_tensor")
    assert created.is_leaf or not created.requires_grad


@pytest.mark.parametrize("name", LIKE_CALLS)
@pytest.mark.parametrize("plain", [True, False])
def test_like_functions_take_plain_and_dragon_tensors(name, plain):
    model = (real if plain else torch).ones(2, 3)

    created = getattr(torch, name)(model, *LIKE_CALLS[name], dtype=torch.float64)

    assert type(created) is torch.Tensor
    assert created.shape == (2, 3)
    assert created.dtype is real.float64


@pytest.mark.parametrize("name", MEMORY_CALLS)
def test_foreign_memory_is_shared(name):
    source = MEMORY_CALLS[name]

    created = getattr(torch, name)(source, **({"dtype": torch.uint8} if name == "frombuffer" else {}))

    assert type(created) is torch.Tensor
    before = created[0].item()
    created[0] += 1
    assert source[0] == before + 1


def test_a_generator_is_used():
    first = torch.rand(5, generator=real.Generator().manual_seed(3))
    second = torch.rand(5, generator=real.Generator().manual_seed(3))

    assert same(first, second)


def test_out_is_filled_and_keeps_its_type():
    plain, dragon = real.zeros(3), torch.zeros(3)

    assert torch.ones(3, out=plain) is plain
    assert torch.ones(3, out=dragon) is dragon
    assert type(plain) is real.Tensor
    assert type(dragon) is torch.Tensor
    assert plain.tolist() == dragon.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["as_tensor", "asarray"])
def test_a_plain_tensor_becomes_a_dragon_tensor_over_the_same_memory(name):
    plain = real.ones(3)

    dragon = getattr(torch, name)(plain)

    assert type(plain) is real.Tensor
    assert type(dragon) is torch.Tensor
    assert dragon.data_ptr() == plain.data_ptr()
    assert getattr(torch, name)(dragon) is dragon


def test_a_new_leaf_overwrites_its_gradient():
    leaf = torch.full((2,), 3.0, requires_grad=True)
    for factor in (2, 5):
        (leaf * factor).backward()

    assert leaf.grad.tolist() == [5, 5]


def test_the_tensor_class_itself_creates_dragon_tensors():
    assert type(torch.Tensor(2, 3)) is torch.Tensor
    assert torch.Tensor([1, 2]).tolist() == [1, 2]
