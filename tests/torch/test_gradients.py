"""Dragon's rules for gradients: the next backward overwrites, non-scalars start from ones, `+=` rebinds."""

import operator

import pytest
import torch as real
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dragon.vm import torch
from dragon.vm.torch import _overwrite

CHECKPOINT_WARNINGS = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
GRAPH_WARNING = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


@given(st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_gradient_is_the_sum_of_all_uses_in_the_last_backward(backwards):
    dragon, plain = leaf(1.0, 2.0), real.ones(2, requires_grad=True)

    for factors in backwards:
        sum((dragon * plain * factor for factor in factors), torch.zeros(2)).backward()

    assert dragon.grad.tolist() == [sum(backwards[-1])] * 2
    assert plain.grad.tolist() == [sum(map(sum, backwards)) * x for x in (1, 2)]


def test_a_backward_that_does_not_reach_a_leaf_leaves_its_gradient():
    x, y = leaf(1.0), leaf(1.0)
    (x * 2 + y).backward()
    kept = x.grad

    (y * 5).backward()

    assert x.grad is kept
    assert y.grad.item() == 5


def test_a_retained_graph_overwrites_too():
    x = leaf(3.0)
    y = x * x
    y.backward(retain_graph=True)
    y.backward()

    assert x.grad.item() == 6


def test_the_gradient_is_taken_over_without_a_copy():
    x = leaf(1.0, 2.0)
    addresses = []
    x.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))

    for _ in range(2):
        (x * 2).backward()

    assert x.grad.data_ptr() == addresses[-1]


def test_autograd_grad_leaves_the_gradient_alone():
    x = leaf(2.0)
    (x * 3).backward()
    kept = x.grad

    (gradient,) = torch.autograd.grad(x * 5, x)

    assert x.grad is kept
    assert kept.item() == 3
    assert gradient.item() == 5
    assert type(gradient) is torch.Tensor


def test_a_plain_gradient_that_autograd_grad_hands_on_stays_plain():
    x, plain = leaf(2.0, 3.0), real.ones(2)

    (gradient,) = torch.autograd.grad(x + 1, x, plain)

    assert gradient is plain
    assert type(plain) is real.Tensor


def test_a_hook_within_autograd_grad_works_on_dragon_tensors():
    x, seen = leaf(2.0, 3.0), []
    y = x * 2
    y.register_hook(lambda gradient: seen.append(type(x * gradient)))

    torch.autograd.grad(y.sum(), x)

    assert seen == [torch.Tensor]


def test_a_complex_number_has_no_backward_as_in_pytorch():
    with pytest.raises(RuntimeError, match="only for real scalar outputs"):
        (leaf(2.0) * 1j).sum().backward()


def test_autograd_grad_takes_what_pytorchs_takes():
    x, unused = leaf(2.0), leaf(1.0, 1.0)
    y = x * x

    assert torch.autograd.grad(y, [x, unused], retain_graph=True, allow_unused=True)[1] is None
    assert torch.autograd.grad(y, [x, unused], retain_graph=True, materialize_grads=True)[1].tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(y, [unused], retain_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(y, [torch.ones(1)])


def test_a_second_derivative_is_right():
    x = leaf(2.0)
    (slope,) = torch.autograd.grad(x**3, x, create_graph=True)
    slope.backward()

    assert x.grad.item() == 12


@GRAPH_WARNING
def test_the_gradient_of_a_gradient_overwrites_it():
    x = leaf(2.0)
    (x**3).backward(create_graph=True)
    (x.grad**2).sum().backward()

    assert x.grad.item() == 2 * 12 * 12


@pytest.mark.parametrize("of_leaf", [True, False])
def test_backward_into_chosen_inputs_overwrites_a_leaf(of_leaf):
    x, other = leaf(2.0), leaf(1.0)
    for factor in (3, 4):
        y = x * factor
        (y * 2 * other).backward(inputs=[x if of_leaf else y])

    assert other.grad is None
    assert (x.grad.item() == 8) if of_leaf else (y.grad.item() == 2 and x.grad is None)


def test_a_non_scalar_goes_back_from_ones():
    x = leaf(1.0, 2.0)
    (x * x).backward()
    assert x.grad.tolist() == [2, 4]

    (x * x).backward(torch.tensor([10.0, 0.0]))
    assert x.grad.tolist() == [20, 0]

    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        (x * x).backward(torch.ones(3))
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.ones(2).backward()


def test_a_plain_tensor_of_several_elements_still_needs_a_gradient():
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        (real.ones(2, requires_grad=True) * 2).backward()


RULE_KEEPING = {
    "flag off and on": lambda p: p.requires_grad_(False).requires_grad_(True),
    "attribute off and on": lambda p: (setattr(p, "requires_grad", False), setattr(p, "requires_grad", True)),
    "data": lambda p: setattr(p, "data", torch.zeros(2)),
    "grad": lambda p: setattr(p, "grad", real.ones(2)),
    "in place": lambda p: p.detach().add_(1),
}


@pytest.mark.parametrize("change", RULE_KEEPING.values(), ids=RULE_KEEPING)
def test_the_rule_survives(change):
    p = torch.nn.Parameter(torch.ones(2))
    change(p)
    for factor in (2, 3):
        (p * factor).backward()

    assert p.grad.tolist() == [3, 3]
    assert list(p._backward_hooks.values()).count(_overwrite.drop_old_gradient) == 1


def test_a_leaf_made_late_follows_the_rule():
    late, detached = torch.ones(1), leaf(1.0).detach().requires_grad_()
    late.requires_grad = True
    for factor in (2, 3):
        (late * detached * factor).backward()

    assert late.grad.item() == detached.grad.item() == 3


def test_users_hooks_run_as_in_pytorch():
    p, seen = torch.nn.Parameter(torch.ones(1)), []
    p.register_hook(lambda gradient: gradient * 10)
    p.register_post_accumulate_grad_hook(lambda q: seen.append((q is p, q.grad.item())))
    for factor in (2, 3):
        (p * factor).backward()

    assert seen == [(True, 20), (True, 30)]


@CHECKPOINT_WARNINGS
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("go_back", [lambda y: y.backward(), real.autograd.backward], ids=["method", "function"])
@pytest.mark.parametrize("plain_loss", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_parameter_shared_by_checkpointed_segments_gets_the_whole_sum(
    use_reentrant, go_back, plain_loss, nested
):
    layer, x = torch.nn.Linear(3, 3), torch.ones(2, 3, requires_grad=True)

    def segment(x):
        y = layer(x).tanh()
        y *= layer(y)
        return y

    def network(x, call):
        inner = (lambda x: call(segment, call(segment, x))) if nested else segment
        y = call(inner, call(segment, x))
        loss = (y + layer(y)).sum()
        return loss.as_subclass(real.Tensor) if plain_loss else loss

    network(x, lambda function, x: function(x)).backward()
    expected = layer.weight.grad.clone()

    for _ in range(3):
        go_back(network(x, lambda function, x: checkpoint(function, x, use_reentrant=use_reentrant)))
        torch.testing.assert_close(layer.weight.grad, expected)


def test_a_failed_backward_leaves_no_trace():
    def fail(gradient):
        raise ValueError

    x, y = leaf(1.0), leaf(1.0)
    handle = y.register_hook(fail)
    with pytest.raises(ValueError):  # noqa: PT011  # the hook's own
        (x * 2 + y).backward()
    handle.remove()
    for factor in (3, 4):
        (x * factor + y).backward()

    assert x.grad.item() == 4
    assert not _overwrite._backwards


IN_PLACE = {"+=": operator.iadd, "-=": operator.isub, "*=": operator.imul, "/=": operator.itruediv}
OUT_OF_PLACE = {"+=": operator.add, "-=": operator.sub, "*=": operator.mul, "/=": operator.truediv}


@pytest.mark.parametrize("sign", IN_PLACE)
def test_an_augmented_result_has_the_gradient_of_the_written_out_sum(sign):
    x, plain = leaf(0.3, 0.7), real.tensor([0.3, 0.7], requires_grad=True)
    y = x.exp()
    y = IN_PLACE[sign](y, y.cos())
    y.backward()
    z = plain.exp()
    OUT_OF_PLACE[sign](z, z.cos()).sum().backward()

    torch.testing.assert_close(x.grad, plain.grad)
    assert type(y) is torch.Tensor


@pytest.mark.parametrize("sign", IN_PLACE)
@pytest.mark.parametrize("dtype", [real.float32, real.bfloat16, real.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_an_augmented_result_keeps_its_shape_and_dtype_or_is_refused_as_in_place(sign, dtype, shape):
    outcomes = []
    for module in (real, torch):
        x = module.tensor([0.3, 0.7, 0.9], requires_grad=True, dtype=real.bfloat16)
        try:
            y = IN_PLACE[sign](x * 1, real.full(shape, 0.1, dtype=dtype))
            outcomes.append((y.dtype, y.tolist()))
        except RuntimeError:
            # Where torch knows no such sum at all, it says so in other words (torch 2.15).
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("sign", IN_PLACE)
def test_elsewhere_an_augmented_assignment_is_in_place(sign):
    with torch.no_grad():
        p = torch.nn.Parameter(torch.ones(2))
        assert IN_PLACE[sign](p, 2) is p
        followed = leaf(1.0)
        assert IN_PLACE[sign](followed, 2) is followed
    x = torch.ones(2)
    assert IN_PLACE[sign](x, 2) is x
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        IN_PLACE[sign](leaf(1.0), 2)


def test_an_augmented_view_reaches_its_base():
    y = leaf(1.0, 2.0) * 2
    y[0] += 1
    row = y[1:]
    row += 1

    assert y.tolist() == [3, 5]
