"""Parameters that get gradients only sometimes: each counts its own steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._backends import native
from dragon.vm.torch.optim._plan import cache, host_step, widening

from .recorded import RecordedGraph
from .support import BACKENDS, bits, everything, give, give_some, home, numbers, parameters, patient, take_steps

presences = st.lists(st.booleans(), min_size=3, max_size=3)
histories = st.lists(presences, min_size=1, max_size=6)

pytestmark = pytest.mark.usefixtures("at_once")


@patient
@given(st.sampled_from(BACKENDS), st.sampled_from([Adam, SGD]), histories)
def test_a_parameter_is_updated_as_if_its_missing_steps_had_not_been(backend, algorithm, history):
    options = {"lr": 0.1} if algorithm is Adam else {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    shapes = [(5,), (17,), (2, 3)]
    together, alone = (parameters(shapes, device=home(backend)) for _ in range(2))
    optimizer = algorithm([{"params": together[:2]}, {"params": together[2:]}], backend=backend, **options)
    singles = [algorithm([param], backend=backend, **options) for param in alone]
    for number, present in enumerate(history):
        for i, has_grad in enumerate(present):
            together[i].grad = alone[i].grad = None
            if has_grad:
                give(together[i], i, number)
                give(alone[i], i, number)
                singles[i].step()
        optimizer.step()
    for i, (param, single) in enumerate(zip(together, alone, strict=True)):
        assert bits(param) == bits(single)
        n_steps = sum(present[i] for present in history)
        assert float(optimizer.state[param].get("step", 0) if param in optimizer.state else 0) == n_steps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", [Adam, SGD])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_without_any_gradient_does_nothing(backend, algorithm, max_grad_norm):
    params = parameters([(5,)], device=home(backend))
    optimizer = algorithm(params, backend=backend, lr=0.1, max_grad_norm=max_grad_norm)
    before = bits(params[0])
    optimizer.step()
    assert bits(params[0]) == before
    assert not optimizer.state


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_parameters_of_flat_buffers_take_turns(backend):
    flat, alone = (parameters([(5,), (2, 3), (7,), (4,)], device=home(backend)) for _ in range(2))
    optimizer = Adam([{"params": flat[:2]}, {"params": flat[2:]}], backend=backend, flatten=True)
    others = [Adam(alone[:2], backend=backend), Adam(alone[2:], backend=backend)]
    for number, present in enumerate([(1, 1, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1), (1, 1, 0, 0), (0, 0, 1, 1)]):
        for params in (flat, alone):
            give_some(params, present, number)
        for each in (optimizer, *others):
            each.step()
    assert [bits(param) for param in flat] == [bits(param) for param in alone]


def test_a_replay_tells_its_norm_after_a_step_without_any_gradient(graphed):
    where, capture = graphed
    (param,) = parameters([(5,)], device=where)
    optimizer = Adam([param], backend="triton", capturable=True, max_grad_norm=1.0)
    give(param, 0, 0)
    optimizer.step()
    expected, replay = optimizer.grad_norm, capture(optimizer.step)
    grad, param.grad = param.grad, None
    optimizer.step()
    assert optimizer.grad_norm == 0
    param.grad = grad
    replay()
    assert torch.equal(optimizer.grad_norm, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_patterns_of_missing_gradients_keep_few_plans(backend):
    params = parameters([(3,)] * 6, device=home(backend))
    optimizer = Adam(params, backend=backend)
    for pattern in range(1, 33):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if pattern >> i & 1 else None
        optimizer.step()
    assert len(optimizer._updater.plans.latest()) == 8
    assert [float(optimizer.state[param]["step"]) for param in params] == [16, 16, 16, 16, 16, 1]


def prepared_sets(monkeypatch):
    """How many parameters each plan that is prepared from here on is for."""
    sizes = []
    prepare = cache.prepare

    def counted(recipe, chosen, **options):
        sizes.append(len(chosen.params))
        return prepare(recipe, chosen, **options)

    monkeypatch.setattr(cache, "prepare", counted)
    return sizes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"clip_norm": 1.0}, {"skip_nonfinite": True}])
def test_sets_of_gradients_share_a_plan_once_more_of_them_came_than_are_kept(backend, options, monkeypatch):
    monkeypatch.setattr(widening, "N_MISSED", 8)
    sizes = prepared_sets(monkeypatch)
    params = parameters([(3,)] * 6, device=home(backend))
    take_steps(Adam(params, backend=backend, **options), params, (0b111111, *range(1, 17)))
    assert sizes == [6, 1, 1, 2, 1, 2, 2, 3, 6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_come_later_join_the_plan(backend, monkeypatch):
    monkeypatch.setattr(widening, "N_MISSED", 8)
    sizes = prepared_sets(monkeypatch)
    params = parameters([(3,)] * 6, device=home(backend))
    optimizer = Adam(params, backend=backend)
    take_steps(optimizer, params, range(1, 32))
    n_prepared = len(sizes)
    take_steps(optimizer, params, range(1, 32))
    assert len(sizes) == n_prepared <= 20
    assert max(sizes) == 5
    assert [param in optimizer.state for param in params] == [True] * 5 + [False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_gradients_one_after_another_cost_at_most_three_times_their_number(backend, monkeypatch):
    sizes = prepared_sets(monkeypatch)
    params = parameters([(3,)] * 60, device=home(backend))
    optimizer = Adam(params, backend=backend)
    for i in range(60):
        give_some(params, [i == j for j in range(60)], i)
        optimizer.step()
    assert 60 <= sum(sizes) <= 3 * 60


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_missed", [1, 8])
def test_sets_in_turn_are_prepared_once_whatever_the_others_become(backend, n_missed, monkeypatch):
    monkeypatch.setattr(widening, "N_MISSED", n_missed)
    sizes = prepared_sets(monkeypatch)
    params = parameters([(3, 4)] * 4, device=home(backend))
    optimizer = Adam(params, backend=backend)
    for number in range(10):
        present = [number % 2 == i % 2 for i in range(4)]
        for param, is_present in zip(params, present, strict=True):
            param.grad = numbers(number, 4, 3, device=home(backend)).t() if is_present else None
            param.requires_grad_(is_present)
        optimizer.step()
    assert sizes == [2, 2 if n_missed == 8 else 4]


VARIED = [
    {"amsgrad": True, "weight_decay": 0.1},
    {"clip_norm": 0.5},
    {"clip_value": 0.5, "ema_decay": 0.9},
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True},
    {"epsilon_hat": True},
    {"flatten": True},
]
NARROW = [
    {"stochastic_rounding": True, "state_dtype": torch.bfloat16},
    {"master_weights": "split16", "state_dtype": "8bit"},
    {"master_weights": torch.float32},
]


@patient
@given(
    st.sampled_from(BACKENDS),
    st.sampled_from([*VARIED, *NARROW]),
    st.booleans(),
    st.booleans(),
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3),
    st.data(),
)
def test_a_plan_for_more_parameters_changes_no_bit(backend, options, scales, zero_grad, history, data):
    """Beside an optimizer that forgets its plans after each step."""
    dtype = torch.bfloat16 if options in NARROW else torch.float32
    shapes = [(5,), (70,), (3, 4), (9,), (33,)]
    runs = [parameters(shapes, dtype, home(backend)) for _ in range(2)]
    optimizers = [Adam(params, backend=backend, lr=0.1, **options) for params in runs]
    for number, present in enumerate([[True] * 5, *history]):
        # What is laid out otherwise than before, of another dtype, or shared.
        kind = data.draw(st.sampled_from(["plain", "strided", "shared"]))
        for params, optimizer in zip(runs, optimizers, strict=True):
            for i, param in enumerate(params):
                param.grad = None
                if present[i]:
                    grad = numbers(10 * number + i, *param.shape, dtype=dtype, device=str(param.device))
                    if kind == "strided":
                        grad = grad.t().contiguous().t()
                    elif kind == "shared":
                        grad = numbers(number, device=str(param.device), dtype=dtype).expand(param.shape)
                    param.grad = grad
            if scales:
                optimizer.grad_scale = torch.full((1,), 2.0, device=params[0].device)
                optimizer.found_inf = torch.full((1,), float(number == 2), device=params[0].device)
            versions = [param._version for param in params]
            optimizer.step(zero_grad=zero_grad and kind != "shared")
            for i, param in enumerate(params):
                assert present[i] or param._version == versions[i]
        optimizers[1]._updater.plans.forget()
        assert everything(optimizers[0]) == everything(optimizers[1])
        for left, right in zip(*runs, strict=True):
            assert (left.grad is None) == (right.grad is None)
            assert left.grad is None or bits(left.grad) == bits(right.grad)


ALL_FIRST = (0b1111111, 0b1010101, 0b0110111, 0b1101011, 0b0011110, 0b1110001)
# The plan of the second set is for all, and serves all.
ALL_LATER = (0b1010101, 0b0111110, 0b1101011, 0b1111111, 0b0011110, 0b1111111)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("patterns", [ALL_FIRST, ALL_LATER], ids=["all first", "all later"])
def test_a_norm_has_the_bits_of_its_set_whatever_other_sets_came_before(backend, norm_type, patterns):
    runs = [parameters([(40,)] * 7, device=home(backend)) for _ in range(2)]
    optimizers = [Adam(params, backend=backend, max_grad_norm=0.5, norm_type=norm_type) for params in runs]
    for number, pattern in enumerate(patterns):
        for params, optimizer in zip(runs, optimizers, strict=True):
            give_some(params, [pattern >> i & 1 for i in range(7)], number)
            optimizer.step()
        optimizers[1]._updater.plans.forget()
        assert bits(optimizers[0].grad_norm) == bits(optimizers[1].grad_norm)
    assert everything(optimizers[0]) == everything(optimizers[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_has_the_bits_of_its_set_beside_flat_buffers(backend):
    runs = [parameters([(700,), (4000,), (333,)], device=home(backend)) for _ in range(2)]
    optimizers = [SGD(params, lr=0.1, backend=backend, flatten=True, max_grad_norm=0.5) for params in runs]
    for number, pattern in enumerate((0b111, 0b101, 0b111)):
        for params, optimizer in zip(runs, optimizers, strict=True):
            give_some(params, [pattern >> i & 1 for i in range(3)], number)
            optimizer.step()
        optimizers[1]._updater.plans.forget()
        assert bits(optimizers[0].grad_norm) == bits(optimizers[1].grad_norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_several_dtypes_has_the_bits_of_its_set(backend):
    """Tensors of another dtype are updated by other launches, of which a set of gradients may leave some out."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64] * 3
    runs = [[parameters([(40,)], dtype, home(backend))[0] for dtype in dtypes] for _ in range(2)]
    optimizers = [Adam(params, backend=backend, max_grad_norm=0.5) for params in runs]
    for number, pattern in enumerate((511, *range(30, 511, 32))):
        for params, optimizer in zip(runs, optimizers, strict=True):
            for i, param in enumerate(params):
                grad = numbers(10 * number + i, 40, dtype=dtypes[i], device=home(backend))
                # Of magnitudes that are rounded otherwise in another order.
                param.grad = grad * 4.0 ** (5 * i % 7) if pattern >> i & 1 else None
            optimizer.step()
        optimizers[1]._updater.plans.forget()
        assert bits(optimizers[0].grad_norm) == bits(optimizers[1].grad_norm)
    assert everything(optimizers[0]) == everything(optimizers[1])


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"clip_norm": 0.5}])
def test_a_graph_of_some_gradients_keeps_its_norm_after_steps_with_others(options):
    shapes = [(40,), (32768 + 5,), (7,)]
    runs = [parameters(shapes) for _ in range(2)]
    optimizers = [Adam(params, backend="triton", capturable=True, **options) for params in runs]
    patterns = [(1, 1, 1), (0, 1, 1), (1, 0, 1)]
    for params, optimizer in zip(runs, optimizers, strict=True):
        for number, present in enumerate([*patterns, patterns[1]]):
            give_some(params, present, number)
            optimizer.step()
    give_some(runs[0], patterns[1], 3)
    kept = [param.grad for param in runs[0]]
    replay = RecordedGraph().capture(optimizers[0].step)
    # Another one of the same gradients needs no step in between.
    RecordedGraph().capture(optimizers[0].step)
    for number in range(4, 8):
        for params, optimizer in zip(runs, optimizers, strict=True):
            give_some(params, patterns[number % 3], number)
            optimizer.step()
        give_some(runs[1], patterns[1], number)
        for grad, param in zip(kept, runs[1], strict=True):
            if grad is not None:
                grad.copy_(param.grad)
        replay()
        optimizers[1].step()
        assert everything(optimizers[0]) == everything(optimizers[1])


def moved(param, state):
    param.data = param.data.clone()


def strided(param, state):
    param.grad = param.grad.t().contiguous().t()


def turned(param, state):
    """A first moment at the same address, of the same shape, in another layout."""
    state["exp_avg"] = state["exp_avg"].t()


def recounted(param, state):
    state["step"] = state["step"].clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("amsgrad", [(False,) * 3, (True, False, False)], ids=["alike", "one with AMSGrad"])
@pytest.mark.parametrize("change", [moved, strided, turned, recounted])
@pytest.mark.parametrize("changed", [(0, 1, 2), (1,)])
def test_what_changed_is_noticed_in_a_part_of_a_plan(backend, amsgrad, change, changed):
    params = [torch.nn.Parameter(numbers(i, 6, 6, device=home(backend))) for i in range(3)]
    alone = [torch.nn.Parameter(param.detach().clone()) for param in params]
    groups = [{"params": [param], "amsgrad": own} for param, own in zip(params, amsgrad, strict=True)]
    optimizer = Adam(groups, backend=backend)
    others = [Adam([param], amsgrad=own, backend=backend) for param, own in zip(alone, amsgrad, strict=True)]
    for number, present in enumerate([(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 1), (0, 1, 0), (1, 1, 0)]):
        for i in range(3):
            params[i].grad = alone[i].grad = None
            if present[i]:
                for param, owner in ((params[i], optimizer), (alone[i], others[i])):
                    param.grad = numbers(10 * number + i, 6, 6, device=home(backend))
                    if number in (2, 5) and i in changed:
                        change(param, owner.state[param])
                others[i].step()
        optimizer.step()
    assert [bits(param) for param in params] == [bits(param) for param in alone]


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_a_parameter_without_a_gradient_may_have_no_memory(backend):
    params, alone = (parameters([(5,)] * 3, device=home(backend)) for _ in range(2))
    options = {"backend": backend, "epsilon_hat": True, "eps": 0.1}
    optimizer, others = Adam(params, **options), [Adam([param], **options) for param in alone]
    for number, present in enumerate([(1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 1, 0), (0, 1, 0)]):
        for each in (params, alone):
            give_some(each, present, number)
        for each in (optimizer, *others):
            each.step()
        if number == 0:
            # Counters that a user sets lie apart from each other.
            for state in optimizer.state.values():
                state["step"] = state["step"].clone()
        elif number == 2:
            # As those do who move states elsewhere that are not needed for a while.
            for tensor in optimizer.state[params[2]].values():
                tensor.untyped_storage().resize_(0)
    assert [bits(param) for param in params] == [bits(param) for param in alone]


def test_an_interrupt_between_two_sets_leaves_no_calls_of_the_other(monkeypatch):
    """Calls that were planned for one set of gradients, remembered as those of another."""

    class Interrupted(native.NativeGroup):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_planned" and any(value[1:]) and is_armed:
                raise KeyboardInterrupt

    monkeypatch.setattr(host_step, "NativeGroup", Interrupted)
    is_armed = False
    params = parameters([(3,)] * 3)
    optimizer = Adam(params, backend="native")
    # The plan of the second set serves the third one too.
    for step, present in enumerate([(1, 1, 1), (1, 1, 0)]):
        give_some(params, present, step)
        optimizer.step()
    is_armed = True
    give_some(params, (1, 0, 1), 2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    is_armed = False
    give_some(params, (1, 1, 0), 3)
    before = bits(params[1])
    optimizer.step()
    assert bits(params[1]) != before
