"""Tensors are watched for whatever may change in them, by their headers and by public calls alike."""

import gc
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dragon.vm.torch.optim import Adam, _watch
from dragon.vm.torch.optim._gradients import Gradients
from dragon.vm.torch.optim._plain import PlainGradWatch, PlainWatch
from dragon.vm.torch.optim._step import PreparedStep
from dragon.vm.torch.optim._watch import HELD_NBYTES, HeaderGradWatch, HeaderWatch, watch, watch_grads

KINDS = [(HeaderWatch, HeaderGradWatch), (PlainWatch, PlainGradWatch)]


@pytest.fixture(params=KINDS, ids=["headers", "plain"])
def kind(request, monkeypatch):
    if request.param[0] is PlainWatch:
        monkeypatch.setattr(_watch, "header_map", lambda: None)
    return request.param


@st.composite
def views(draw):
    """A view of up to 5 dimensions of a buffer."""
    shape = draw(st.lists(st.integers(0, 3), max_size=5))
    strides = draw(st.lists(st.integers(0, 20), min_size=len(shape), max_size=len(shape)))
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
    buffer = torch.zeros(300, dtype=draw(st.sampled_from(dtypes)))
    return buffer.as_strided(shape, strides, draw(st.integers(0, 20)))


def gradient_watch(params):
    """Watches of parameters and their gradients, and what reads the gradients."""

    def gradients():
        return Gradients(lambda: [param.grad for param in params], are_own=True)

    return watch(params, []), watch_grads(watch(params, []), gradients()), gradients


def parameters(n=3, shape=(2, 3)):
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(n)]
    for param in params:
        param.grad = torch.ones(shape)
    return params


def test_headers_are_found_in_this_pytorch():
    assert type(watch([torch.zeros(3)], [])) is HeaderWatch


@given(st.lists(views(), min_size=1, max_size=4))
def test_views_that_stay_are_unchanged_and_have_their_addresses(tensors):
    found = watch(tensors, [])
    assert type(found) is HeaderWatch
    assert found.is_unchanged()
    gradients = Gradients.of(tensors)
    grad_watch = watch_grads(found, gradients)
    assert type(grad_watch) is HeaderGradWatch
    others = [torch.zeros(300, dtype=t.dtype).as_strided(t.shape, t.stride(), 7) for t in tensors]
    gradients = Gradients.of(others)
    assert grad_watch.find(gradients)
    assert gradients.addresses.tolist() == [other.data_ptr() for other in others]


OTHER = torch.zeros(2, 3)
CHANGES = {
    "other memory": lambda t: setattr(t, "data", torch.zeros(2, 3)),
    "other offset": lambda t: setattr(t, "data", t.data.new_zeros(12)[3:9].view(2, 3)),
    "offset in its own memory": lambda t: t.set_(t.untyped_storage(), 1, (1, 3), (3, 1)),
    "set": lambda t: t.set_(torch.zeros(6).untyped_storage(), 0, (2, 3), (3, 1)),
    "dtype": lambda t: setattr(t, "data", t.data.double()),
    "dtype at its address": lambda t: setattr(t, "data", t.data.view(torch.int32)),
    "transposed": lambda t: t.transpose_(0, 1),
    "reshaped": lambda t: t.as_strided_((3, 2), (2, 1)),
    "shrunk": lambda t: t.resize_(1, 3),
    "one more dimension": lambda t: t.unsqueeze_(0),
    "storage resized": lambda t: t.untyped_storage().resize_(4096),
    "storage freed": lambda t: t.untyped_storage().resize_(0),
    "swapped": lambda t: torch.utils.swap_tensors(t, torch.zeros(2, 3)),
    "swapped with one that stays": lambda t: torch.utils.swap_tensors(t, OTHER),
    "to be copied when it is written to": lambda t: setattr(t, "copy", torch._lazy_clone(t)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 1])
def test_a_changed_tensor_is_noticed_again_and_again(change, place, kind):
    tensors = [torch.zeros(2, 3), torch.zeros(2, 3)]
    found = watch(tensors[:1], tensors[1:])
    assert type(found) is kind[0]
    assert found.is_unchanged()
    with torch.no_grad():
        CHANGES[change](tensors[place])
    assert not found.is_unchanged()
    assert not found.is_unchanged()


def test_written_values_are_no_change(kind):
    tensor = torch.zeros(2, 3)
    found = watch([tensor], [])
    tensor.add_(1)
    kept = tensor.view(-1)
    assert kept is not None
    assert found.is_unchanged()


LAYOUTS = {
    "None": None,
    "dtype": torch.ones(2, 3, dtype=torch.float64),
    "transposed": torch.ones(3, 2).t(),
    "expanded": torch.ones(1, 3).expand(2, 3),
    "shape": torch.ones(6),
    "sparse": torch.ones(2, 3).to_sparse(),
    "conjugated": torch.ones(2, 3, dtype=torch.complex64).conj(),
    "negative": torch._neg_view(torch.ones(2, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_another_layout_are_noticed(layout, kind):
    params = parameters()
    found = watch(params, [])
    grad_watch = watch_grads(found, Gradients.of([param.grad for param in params]))
    assert (type(found), type(grad_watch)) == kind
    assert grad_watch.find(Gradients.of([torch.ones(2, 3) for _ in params]))
    assert not grad_watch.find(Gradients.of([params[0].grad, LAYOUTS[layout], params[2].grad]))


def test_a_missing_or_sparse_gradient_of_its_parameter_is_noticed(kind):
    params = parameters()
    _, grad_watch, gradients = gradient_watch(params)
    for missing in (None, torch.ones(2, 3).to_sparse()):
        params[1].grad = missing
        for _ in range(3):
            assert not grad_watch.find(gradients())
    params[1].grad = torch.ones(2, 3)
    assert grad_watch.find(gradients())


def test_new_gradients_are_found_where_they_are(kind):
    params = parameters()
    _, grad_watch, gradients = gradient_watch(params)
    for n_new in (3, 1, 0, 2, 3, 0, 0):
        for param in params[:n_new]:
            param.grad = torch.ones(60)[n_new : n_new + 6].view(2, 3)
        found = gradients()
        assert grad_watch.find(found)
        assert found.addresses.tolist() == [param.grad.data_ptr() for param in params]
        assert all(ours is param.grad for ours, param in zip(found.tensors, params, strict=True))


def test_a_gradient_that_waits_to_be_copied_is_copied_before_its_address_is_used(kind):
    params = parameters()
    _, grad_watch, gradients = gradient_watch(params)
    copy = torch._lazy_clone(params[1].grad)
    found = gradients()
    if grad_watch.find(found):
        assert found.addresses.tolist()[1] == params[1].grad.data_ptr()
    assert copy.data_ptr() != params[1].grad.data_ptr()


def replace_memory(grad, other):
    grad.data = other


@pytest.mark.parametrize("change", [replace_memory, torch._C._swap_tensor_impl])
def test_a_changed_gradient_is_not_taken_for_the_one_that_was_held(change, kind):
    params = parameters(1)
    _, grad_watch, gradients = gradient_watch(params)
    assert grad_watch.find(gradients())
    other = torch.full((2, 3), 5.0)
    change(params[0].grad, other)
    found = gradients()
    assert grad_watch.find(found)
    assert found.addresses.tolist() == [params[0].grad.data_ptr()]
    assert found.tensors[0].data_ptr() == params[0].grad.data_ptr()


@pytest.mark.parametrize(("numel", "is_held"), [(HELD_NBYTES // 4, True), (HELD_NBYTES // 4 + 1, False)])
def test_only_small_gradients_are_held_and_only_until_the_next_step(numel, is_held):
    params = parameters(1, (numel,))
    optimizer = Adam(params)
    for _ in range(3):
        optimizer.step()
    gradient = weakref.ref(params[0].grad)
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert (gradient() is not None) is is_held
    params[0].grad = torch.ones(numel)
    optimizer.step()
    gc.collect()
    assert gradient() is None


@pytest.mark.parametrize("place", [0, 1])
def test_tensors_of_many_dimensions_are_watched_among_others(place):
    # Not contiguous before and after: no flag tells.
    deep = [torch.zeros(2, 2, 1, 1, 1, 2).transpose(0, 5) for _ in range(2)]
    tensors = [*deep, torch.zeros(3)]
    found = watch(tensors[:1], tensors[1:])
    assert type(found) is HeaderWatch
    assert found.is_unchanged()
    tensors[place].transpose_(0, 1)
    assert not found.is_unchanged()


def test_gradients_of_many_dimensions_are_watched_among_others():
    params = [*parameters(2), *parameters(1, (1, 1, 1, 2, 1, 2))]
    _, grad_watch, gradients = gradient_watch(params)
    assert type(grad_watch) is HeaderGradWatch
    params[2].grad = torch.zeros(4).view(1, 1, 1, 2, 1, 2)
    assert grad_watch.find(gradients())
    params[2].grad = params[2].grad.transpose(3, 5)
    assert not grad_watch.find(gradients())


def test_wrong_headers_are_not_used(monkeypatch):
    headers = _watch.header_map()
    # Words that say something else: the number of dimensions, and nothing.
    for wrong in (headers._replace(offset=headers.dim), headers._replace(storage=headers.autograd)):
        monkeypatch.setattr(_watch, "header_map", lambda wrong=wrong: wrong)
        assert type(watch([torch.zeros(2, 3)], [])) is PlainWatch


def test_fresh_gradients_in_used_memory_need_no_new_plan(monkeypatch):
    prepared = []
    prepare = PreparedStep.__init__
    monkeypatch.setattr(PreparedStep, "__init__", lambda self, *args: prepared.append(1) or prepare(self, *args))
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 1))
    optimizer = Adam(model.parameters())
    for n in range(40):
        # Blocks of the size of a tensor's header, with every bit set, which the next gradients take.
        blocks = [torch.full((size // 8,), -1, dtype=torch.int64) for size in range(64, 512, 8) for _ in range(4)]
        del blocks
        optimizer.zero_grad(set_to_none=True)
        model(torch.full((2, 9), 0.1 * n)).sum().backward()
        optimizer.step()
    assert len(prepared) == 1


class OwnGrad(torch.nn.Parameter):
    """A parameter whose gradient is not where others are."""

    main_grad: torch.Tensor | None = None

    @property
    def grad(self):
        return self.main_grad if self.main_grad is not None else torch.Tensor.grad.__get__(self)


def test_gradients_of_a_class_of_its_own_are_asked_for():
    param = OwnGrad(torch.zeros(2, 3))
    torch.Tensor.grad.__set__(param, torch.ones(2, 3))
    _, grad_watch, gradients = gradient_watch([param])
    assert type(grad_watch) is PlainGradWatch
    param.main_grad = torch.full((2, 3), 7.0)
    found = gradients()
    assert grad_watch.find(found)
    assert found.addresses.tolist() == [param.main_grad.data_ptr()]


def test_no_graph_is_held():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([weight], lr=0.1)
    for _ in range(3):
        (gradient,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
        weight.grad = gradient
        optimizer.step()
        optimizer.step()
        dead = weakref.ref(gradient)
        weight.grad = None
        del gradient
        gc.collect()
        assert dead() is None


class Interrupted(BaseException):
    """Ctrl+C."""


def replace_gradients(params):
    for param in params:
        param.grad = torch.zeros(60)[7:13].view(2, 3)


def move_gradients(params):
    """To other memory, in headers that stay."""
    for param in params:
        param.grad.untyped_storage().resize_(1 << 16)


@pytest.mark.parametrize("change", [replace_gradients, move_gradients])
@pytest.mark.parametrize("nth", range(1, 30))
def test_a_search_that_was_interrupted_is_done_again(nth, change, monkeypatch):
    params = parameters()
    _, grad_watch, gradients = gradient_watch(params)
    assert grad_watch.find(gradients())
    # Alive, so that only what is remembered could be wrong.
    old = [param.grad for param in params]
    change(params)
    calls = []

    def interrupt(frame, event, arg):
        if frame.f_code.co_filename == _watch.__file__ and event == "line":
            calls.append(frame.f_lineno)
            if len(calls) == nth:
                raise Interrupted
        return interrupt

    sys.settrace(interrupt)
    try:
        grad_watch.find(gradients())
    except Interrupted:
        pass
    finally:
        sys.settrace(None)
    assert calls
    found = gradients()
    assert grad_watch.find(found)
    assert found.addresses.tolist() == [param.grad.data_ptr() for param in params]
    assert all(tensor is param.grad for tensor, param in zip(found.tensors, params, strict=True))
    assert len(old) == 3
