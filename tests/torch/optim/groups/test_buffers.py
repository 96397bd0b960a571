"""`flatten=True`: the same bits as without it, whatever happens to parameters and gradients around it."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import SGD, Adam
from dragon.vm.torch.optim._groups.buffers import make_buffers

from ..support import home

SHAPES = [(3, 5), (17,), (), (0,), (1100,), (4, 4), (16,)]
BACKENDS = ["native", "triton", "eager"]


def parameters(backend="native"):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(home(backend))) for shape in SHAPES]


def give_grads(params, seed, present, in_place):
    generator = torch.Generator().manual_seed(seed)
    for param, has_grad in zip(params, present, strict=True):
        grad = torch.randn(param.shape, generator=generator).to(param)
        if not has_grad:
            param.grad = None
        elif in_place and param.grad is not None:
            param.grad.copy_(grad)
        else:
            param.grad = grad


def pair(make, backend):
    """Two optimizers of equal parameters in two groups, one of them flat."""
    pairs = []
    for flatten in (False, True):
        params = parameters(backend)
        groups = [{"params": params[:3], "lr": 1e-2}, {"params": params[3:]}]
        pairs.append((params, make(groups, backend=backend, flatten=flatten)))
    return pairs


def same(left, right, backend="triton"):
    """Equal bits; on the native backend a few eps, since torch rounds vectors and their tails differently."""
    if backend != "native":
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(left, right, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """How many tensors each of torch's fused Adam operations gets."""
    found = []
    fused = torch._fused_adam_

    def counted(params, *args, **kwargs):
        found.append(len(params))
        fused(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adam_", counted)
    return found


HISTORIES = st.lists(
    st.tuples(st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)), st.booleans(), st.booleans()),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(history=HISTORIES, amsgrad=st.booleans(), epsilon_hat=st.booleans())
def test_flat_buffers_change_no_result(backend, history, amsgrad, epsilon_hat):
    def make(groups, **options):
        return Adam(groups, amsgrad=amsgrad, epsilon_hat=epsilon_hat, weight_decay=0.1, **options)

    (params, optimizer), (flat_params, flat) = pair(make, backend)
    for seed, (present, in_place, to_none) in enumerate(history):
        give_grads(params, seed, present, in_place)
        give_grads(flat_params, seed, present, in_place)
        optimizer.step()
        flat.step()
        optimizer.zero_grad(set_to_none=to_none)
        flat.zero_grad(set_to_none=to_none)
        assert same(params, flat_params, backend)
        for param, flat_param in zip(params, flat_params, strict=True):
            grads = param.grad, flat_param.grad
            assert (grads[0] is None) == (grads[1] is None)
            assert grads[0] is None or torch.equal(*grads)
            states = optimizer.state.get(param, {}), flat.state.get(flat_param, {})
            assert states[0].keys() == states[1].keys()
            assert same(states[0].values(), states[1].values(), backend)


def test_a_buffer_is_one_tensor_where_all_its_parameters_step_with_one_count(calls):
    params = [torch.nn.Parameter(torch.randn(10)) for _ in range(20)]
    optimizer = Adam(params, backend="native", flatten=True)
    for present in (19, 20, 20):
        give_grads(params, 0, [number < present for number in range(20)], in_place=False)
        optimizer.step()
    # The last one began later.
    optimizer.state[params[19]]["step"].fill_(3)
    for present in (20, 20, 10):
        give_grads(params, 0, [number < present for number in range(20)], in_place=False)
        optimizer.step()
    assert calls == [19, 20, 20, 1, 1, 10]
    assert [float(optimizer.state[param]["step"]) for param in params] == [6.0] * 10 + [5.0] * 10


def test_a_large_parameter_and_one_of_other_options_are_in_no_buffer(calls):
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 8192, 5, 4, 2)]
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    optimizer = Adam(groups, backend="native", flatten=True)
    (buffer,) = optimizer._updater.buffers
    assert buffer.addresses == [params[index].data_ptr() for index in (0, 2, 3)]
    give_grads(params, 0, [True] * 5, in_place=False)
    optimizer.step()
    # The buffer and the only parameter of the other group share a call.
    assert sorted(calls) == [1, 2]


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_other_backends_move_nothing(backend):
    params = parameters(backend)
    before = [param.data_ptr() for param in params]
    optimizer = Adam(params, backend=backend, flatten=True)
    give_grads(params, 0, [True] * len(params), in_place=False)
    optimizer.step()
    assert [param.data_ptr() for param in params] == before
    assert optimizer._updater.buffers == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tensor_has_a_storage_of_its_own_all_the_same(backend):
    params = parameters(backend)
    optimizer = Adam(params, backend=backend, flatten=True)
    give_grads(params, 0, [True] * len(params), in_place=False)
    optimizer.step()
    for param in params:
        for tensor in (param, *optimizer.state[param].values()):
            assert tensor.storage_offset() == 0
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("sizes", [[4], [2, 2]], ids=str)
def test_shared_memory_is_refused_with_the_reason(sizes):
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(4)]
    params[3].share_memory_()
    before = [param.data_ptr() for param in params]
    rest = iter(params)
    with pytest.raises(ValueError, match=r"flatten=True .* one of shape \(4,\) is in shared memory"):
        Adam([{"params": [next(rest) for _ in range(size)]} for size in sizes], flatten=True)
    assert [param.data_ptr() for param in params] == before
    assert params[3].is_shared()


def test_copies_leave_shared_memory_where_it_is():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(4)]
    optimizer = Adam(params, lr=0.25, flatten=True)
    for param in params[:2]:
        param.share_memory_()
    twin = copy.copy(optimizer)
    give_grads(params, 0, [True] * 4, in_place=False)
    before = [param.data_ptr() for param in params]
    twin.step()
    assert [param.data_ptr() for param in params] == before
    assert [param.is_shared() for param in params] == [True, True, False, False]
    assert not any(bool((param == 1).any()) for param in params)
    # What a process that is spawned with it does.
    sent = pickle.loads(ForkingPickler.dumps(optimizer)).param_groups[0]["params"]
    sent[0].data.fill_(7)
    sent[3].data.fill_(8)
    assert [param[0].item() for param in (params[0], params[3])] == [7, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_swapped_parameter_is_the_one_that_is_updated(backend):
    (params, optimizer), (flat_params, flat) = pair(Adam, backend)
    for seed in range(4):
        for each in (params, flat_params):
            give_grads(each, seed, [True] * len(each), in_place=True)
            if seed == 2:
                each[4].data = each[4].data.clone() * 2
        optimizer.step()
        flat.step()
        assert same(params, flat_params, backend)


def test_saving_one_parameter_does_not_drag_the_buffer_along():
    params = [torch.nn.Parameter(torch.randn(1000)) for _ in range(50)]
    Adam(params, flatten=True)
    file = io.BytesIO()
    torch.save(params[3], file)
    assert len(file.getvalue()) < 2 * 4000
    assert copy.deepcopy(params[3]).untyped_storage().nbytes() == 4000


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_flat_on_its_own(copied):
    params = parameters()
    optimizer = Adam(params, flatten=True)
    give_grads(params, 0, [True] * len(params), in_place=False)
    optimizer.step()
    twin_params, twin = copied((params, optimizer))
    assert same(params, twin_params)
    for each, its in ((params, optimizer), (twin_params, twin)):
        give_grads(each, 1, [True] * len(each), in_place=True)
        its.step()
    assert same(params, twin_params)
    with torch.no_grad():
        twin_params[0].add_(1)
    assert not torch.equal(params[0], twin_params[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_added_later_and_loaded_states_stay_right(backend):
    (params, optimizer), (flat_params, flat) = pair(Adam, backend)
    for seed in range(4):
        for each, its in ((params, optimizer), (flat_params, flat)):
            if seed == 1:
                each.append(torch.nn.Parameter(torch.ones(33, device=home(backend))))
                its.add_param_group({"params": each[-1], "lr": 0.5})
            if seed == 3:
                its.load_state_dict(copy.deepcopy(its.state_dict()))
            give_grads(each, seed, [True] * len(each), in_place=True)
            its.step()
        assert same(params, flat_params, backend)


def transpose(params, optimizer):
    params[0].data = params[0].data.t()


def shorten(params, optimizer):
    params[0].data = params[0].data[:2]
    optimizer.state.clear()


def widen_states(params, optimizer):
    optimizer.param_groups[0]["state_dtype"] = torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [transpose, shorten, widen_states])
def test_what_changes_in_the_memory_of_a_buffer_is_seen(backend, change):
    found = []
    for flatten in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(4, 4, device=home(backend))) for _ in range(2)]
        optimizer = Adam(params, lr=0.1, backend=backend, flatten=flatten)
        for step in range(4):
            if step == 2:
                change(params, optimizer)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param)
            optimizer.step()
        found.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    assert [tensor.dtype for tensor in found[0]] == [tensor.dtype for tensor in found[1]]
    assert same(*found, backend)


def test_tied_weights_stay_tied():
    embedding = torch.nn.Embedding(7, 5)
    head = torch.nn.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    optimizer = SGD(model.parameters(), lr=0.1, flatten=True)
    model(torch.arange(7)).sum().backward()
    optimizer.step()
    assert head.weight is embedding.weight
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


def test_parameters_that_are_not_dense_stay_where_they_are():
    base = torch.randn(6, 2)
    param = torch.nn.Parameter(base[:, 0])
    optimizer = Adam([param, torch.nn.Parameter(torch.ones(3))], flatten=True)
    assert param.data_ptr() == base.data_ptr()
    neighbours = base[:, 1].clone()
    param.grad = torch.ones(6)
    optimizer.step()
    assert torch.equal(base[:, 1], neighbours)
    assert torch.equal(base[:, 0], param)


def test_a_buffer_has_trained_parameters_of_one_group_and_dtype():
    sizes = {torch.float32: [3, 0, 3, 0, 3], torch.float64: [2, 2], torch.float16: [5]}
    first = [torch.nn.Parameter(torch.full((n,), 1.5, dtype=dtype)) for dtype, ns in sizes.items() for n in ns]
    second, clipped = ([torch.nn.Parameter(torch.ones(2)) for _ in range(2)] for _ in range(2))
    first[0].requires_grad_(False)
    buffers = make_buffers([{"params": first}, {"params": second}, {"params": clipped, "clip_norm": 1.0}])
    members = [first[2], first[4]], first[5:7], second
    assert [each.addresses for each in buffers] == [[param.data_ptr() for param in own] for own in members]
    assert [param.dtype for param in first] == [dtype for dtype, ns in sizes.items() for _ in ns]
    assert all(bool((param == 1.5).all()) for param in first)
    assert first[1].untyped_storage().nbytes() == 0


def test_memory_that_is_read_as_another_dtype_is_no_place_of_a_buffer():
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = Adam(params, lr=0.25, flatten=True)
    for dtype in (torch.bfloat16, torch.float16):
        for param in params:
            param.grad = None
            param.data.copy_(torch.ones(4, dtype=dtype).view(torch.bfloat16))
            param.data = param.data.view(dtype)
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.state.clear()
        assert all(bool((param == 0.75).all()) for param in params)


def test_a_copy_counts_each_parameter_for_itself():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = Adam(params, flatten=True)
    for copied in (False, True):
        for param in params:
            param.grad = torch.ones(4) if param.requires_grad else None
        optimizer.step()
        optimizer.step()
        params[1].requires_grad_(False)
        if not copied:
            params, optimizer = copy.deepcopy((params, optimizer))
    assert [float(optimizer.state[param]["step"]) for param in params] == [4, 2, 4]


def test_each_saved_parameter_has_a_count_of_its_own():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(4)]
    optimizer = Adam(params, lr=0.01, flatten=True)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    theirs = torch.optim.Adam(params, lr=0.01)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    theirs.step()
    assert [float(theirs.state[param]["step"]) for param in params] == [2, 2, 2, 2]


def test_a_buffer_parts_no_later_parameters_from_the_memory_of_earlier_ones():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = Adam(params, flatten=True)
    others = [torch.nn.Parameter(param.detach().view(2, 2)) for param in params]
    with pytest.raises(ValueError, match="parameter 0 and parameter 2 do"):
        optimizer.add_param_group({"params": others})
    assert [other.data_ptr() for other in others] == [param.data_ptr() for param in params]
    assert len(optimizer.param_groups) == 1
