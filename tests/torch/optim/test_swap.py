import copy
import functools
import inspect
import pickle
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import Adam as AdamImportedEarly

from dragon.kernels import launch
from dragon.vm.torch.optim import SGD, Adam, AdamW, Optimizer, _swap, swap

from .judging import judged_step, make_params, params_of, run, set_grads


def test_whoever_asks_for_pytorchs_adam_gets_ours(theirs: Any) -> None:
    with swap():
        from torch.optim import AdamW as AdamWImportedNow
        from torch.optim.adam import Adam as AdamOfTheModule

        built = [
            make(make_params()) for make in (AdamImportedEarly, AdamOfTheModule, theirs.Adam, AdamWImportedNow)
        ]
        assert type(theirs.SGD(make_params(), 0.1, 0.9)) is SGD
    assert [type(optimizer) for optimizer in built] == [Adam, Adam, Adam, AdamW]
    assert [isinstance(optimizer, theirs.AdamW) for optimizer in built] == [False, False, False, True]
    assert all(isinstance(optimizer, theirs.Adam) for optimizer in built)
    for optimizer in built:
        set_grads(params_of(optimizer), 0)
        judged_step(optimizer)


def test_type_checks_hold_in_both_directions(theirs: Any) -> None:
    before = theirs.AdamW(make_params())
    with swap():
        ours = theirs.AdamW(make_params())
        for optimizer in (before, ours):
            assert isinstance(optimizer, theirs.AdamW)
            assert isinstance(optimizer, theirs.Adam)
    assert isinstance(ours, theirs.AdamW)
    assert not isinstance(before, Optimizer)


def test_a_swap_can_be_plain_nested_and_undone_in_any_order(theirs: Any) -> None:
    init = theirs.Adam.__init__
    first, second = swap(), swap()
    first.undo()
    assert isinstance(theirs.Adam(make_params()), Adam)
    second.undo()
    second.undo()
    assert type(theirs.Adam(make_params())) is theirs.Adam
    assert theirs.Adam.__init__ is init, "nothing of a swap is left"


def test_of_nested_swaps_the_last_gives_the_options_and_all_are_told(theirs: Any) -> None:
    class Derived(theirs.Adam):
        pass

    with swap(max_grad_norm=1.0) as outer, swap(max_grad_norm=2.0) as inner:
        assert theirs.Adam(make_params()).defaults["max_grad_norm"] == 2.0
        Derived(make_params())
        assert [(len(each.replaced), len(each.left_alone)) for each in (outer, inner)] == [(1, 1)] * 2


def test_a_swap_that_another_thread_begins_while_the_last_one_ends_is_in_force(
    theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall, begun = _swap._uninstall, []
    thread = threading.Thread(target=lambda: begun.append(swap()))

    def begin_another() -> None:
        thread.start()
        thread.join(0.2)
        uninstall()

    first = swap()
    with monkeypatch.context() as patched:
        patched.setattr(_swap, "_uninstall", begin_another)
        first.undo()
    thread.join()
    assert type(theirs.Adam(make_params())) is Adam
    begun[0].undo()


def test_an_optimizer_gets_the_options_of_a_swap_that_ends_while_it_is_built(theirs: Any) -> None:
    swapped = swap(max_grad_norm=1.0)

    def params() -> Iterator[torch.Tensor]:
        swapped.undo()
        yield from make_params()

    optimizer = theirs.Adam(params())
    assert type(optimizer) is Adam
    assert optimizer.defaults["max_grad_norm"] == 1.0
    assert len(swapped.replaced) == 1


def test_a_swap_ends_with_an_exception(theirs: Any) -> None:
    with pytest.raises(ZeroDivisionError), swap():
        _ = 1 / 0
    assert type(theirs.Adam(make_params())) is theirs.Adam


def test_who_wraps_the_constructor_during_a_swap_keeps_the_wrapper(
    theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    with swap():
        monkeypatch.setattr(theirs.SGD, "__init__", theirs.SGD.__init__)  # what the test restores
        inner = theirs.SGD.__init__

        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            calls.append(args)
            inner(self, *args, **kwargs)

        theirs.SGD.__init__ = wrapper
        assert type(theirs.SGD(make_params())) is SGD
    plain = theirs.SGD(make_params(), 0.5)
    assert (type(plain), len(params_of(plain)), plain.defaults["lr"]) == (theirs.SGD, 4, 0.5)
    with swap():
        assert type(theirs.SGD(make_params())) is SGD
    assert len(calls) == 3


def test_options_of_ours_are_passed_on(theirs: Any) -> None:
    with swap(state_dtype=torch.float64, epsilon_hat=True):
        adam, sgd = theirs.Adam(make_params()), theirs.SGD(make_params(), momentum=0.9)
    for optimizer, name in ((adam, "exp_avg"), (sgd, "momentum_buffer")):
        run(optimizer, range(1))
        assert {state[name].dtype for state in optimizer.state.values()} == {torch.float64}
    assert adam.param_groups[0].get("epsilon_hat", False) is True


def test_one_dict_of_dtypes_is_for_the_states_of_all_optimizers(theirs: Any) -> None:
    asked = {"exp_avg": torch.float64, "momentum_buffer": torch.bfloat16}
    with swap(state_dtype=asked) as swapped:
        adam, sgd = theirs.Adam(make_params()), theirs.SGD(make_params(), momentum=0.9)
    assert len(swapped.replaced) == 2
    assert swapped.options == {"state_dtype": asked}
    for optimizer, name in ((adam, "exp_avg"), (sgd, "momentum_buffer")):
        run(optimizer, range(1))
        assert {state[name].dtype for state in optimizer.state.values()} == {asked[name]}
        assert optimizer.param_groups[0]["state_dtype"] == {name: asked[name]}


def test_a_wrapped_constructor_takes_what_it_took(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = theirs.SGD.__init__
    monkeypatch.setattr(theirs.SGD, "__init__", lambda *args, **kwargs: plain(*args, **kwargs))
    (param,) = make_params()[:1]
    with swap(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert type(theirs.SGD(make_params(), lr=0.1, momentum=0.9)) is SGD
        group = {"params": iter([param, param]), "lr": -0.5}
        refused = [theirs.SGD(iter([param, param]), 0.5), theirs.SGD([group], 0.5)]
        with pytest.raises(TypeError, match="'params'"):
            theirs.SGD()
    for optimizer in refused:
        assert type(optimizer) is theirs.SGD
        assert (params_of(optimizer), optimizer.defaults["lr"]) == ([param, param], 0.5)
    assert "clip_norm" not in group, "ours left something in the caller's group"


def test_an_option_that_pytorchs_class_lacks_is_pytorchs_error(theirs: Any) -> None:
    with swap() as swapped, pytest.raises(TypeError, match=r"SGD.__init__\(\) got an unexpected .* 'capturable'"):
        theirs.SGD(make_params(), capturable=True)
    assert "no optimizer was replaced" in swapped.report()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"nonsense": 1}, TypeError, r"swap\(\) got unexpected keyword arguments: 'nonsense'"),
        ({"state_dtyp": 1}, TypeError, "unexpected keyword arguments: 'state_dtyp'.*state_dtype"),
        ({"lr": 0.1}, TypeError, r"swap\(\) got unexpected keyword arguments: 'lr'"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm .* -1"),
        ({"backend": "nonsense"}, ValueError, "backend .*'nonsense'"),
        ({"state_dtype": {"exp_avgg": torch.bfloat16}}, ValueError, "expected states among .* 'exp_avgg'"),
        ({"state_dtype": {"momentum_buffer": torch.int8}}, ValueError, "momentum_buffer.* torch.int8"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_swapped(
    theirs: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    init = theirs.Adam.__init__
    with pytest.raises(error, match=text):
        swap(**options)
    assert theirs.Adam.__init__ is init


def test_a_backend_that_only_the_scripts_device_has_is_no_bad_option(
    theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kernels that are compiled take no tensors of the CPU.
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with swap(backend="triton") as swapped:
        theirs.Adam([torch.nn.Parameter(torch.zeros(2, device="meta"))])
    assert len(swapped.replaced) + len(swapped.left_alone) == 1


@pytest.mark.parametrize("options", [{"backend": "native"}, {"master_weights": "split8"}], ids=str)
def test_options_are_checked_on_the_host_whatever_the_default_device(theirs: Any, options: dict[str, Any]) -> None:
    with torch.device("meta"), swap(**options) as swapped:
        pass
    assert swapped.options == options


def test_where_ours_refuses_pytorchs_own_is_built_and_the_report_says_why(theirs: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    # PyTorch's reads the rate of a group at a step alone.
    group = {"params": iter([param, torch.nn.Parameter(torch.ones(3))]), "lr": -0.5}
    with swap() as swapped, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = [theirs.Adam([param, param]), theirs.SGD(params=iter([param, param])), theirs.AdamW([group])]
    expected = theirs.AdamW([{"params": [torch.nn.Parameter(torch.ones(3))], "lr": -0.5}])
    assert [type(optimizer) for optimizer in refused] == [theirs.Adam, theirs.SGD, theirs.AdamW]
    assert [len(params_of(optimizer)) for optimizer in refused] == [2, 2, 2]
    assert group is refused[2].param_groups[0]
    assert set(group) == set(expected.param_groups[0]), "ours left something in the caller's group"
    assert set(vars(refused[2])) == set(vars(expected)), "ours left something in the optimizer"
    assert not swapped.replaced
    names = [name for name, _ in swapped.left_alone]
    assert names == ["torch.optim.Adam", "torch.optim.SGD", "torch.optim.AdamW"]
    for name, reason in swapped.left_alone:
        assert reason.startswith("ours refuses it: ValueError: ")
        assert f"  not replaced: {name}: {reason}" in swapped.report()
    param.grad = torch.ones(3)
    for optimizer in refused:
        optimizer.step()


@pytest.mark.parametrize("name", ["step", "zero_grad"])
def test_pytorchs_own_is_built_where_the_script_has_replaced_a_method_of_it(
    theirs: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original, calls = getattr(theirs.SGD, name), []

    @functools.wraps(original)
    def spy(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(theirs.SGD, name, spy)
    param = torch.nn.Parameter(torch.ones(3))
    with swap() as swapped:
        optimizer = theirs.SGD([param])
        getattr(optimizer, name)()
        assert isinstance(theirs.Adam([param]), Adam)
    assert calls == [optimizer]
    assert swapped.left_alone == [("torch.optim.SGD", f"the script has replaced its {name}()")]


@pytest.mark.parametrize("wrap", [None, torch.no_grad()], ids=["plain", "no_grad"])
def test_it_is_built_each_time_although_pytorch_has_wrapped_the_replacement(
    theirs: Any, monkeypatch: pytest.MonkeyPatch, wrap: Any
) -> None:
    calls = []

    def step(self: torch.optim.Optimizer, closure: Any = None) -> None:
        calls.append(self)

    # PyTorch wraps a step when it builds the first optimizer of a class.
    monkeypatch.setattr(theirs.SGD, "step", wrap(step) if wrap else step)
    with swap():
        built = [theirs.SGD([torch.nn.Parameter(torch.ones(3))]) for _ in range(2)]
        for optimizer in built:
            optimizer.step()
    assert calls == built


def test_pytorchs_own_is_built_whatever_goes_wrong_in_ours(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(Adam.__init__)
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ImportError("no driver")

    with swap() as swapped:
        monkeypatch.setattr(Adam, "__init__", fail)
        assert type(theirs.Adam(make_params())) is theirs.Adam
    assert swapped.left_alone == [("torch.optim.Adam", "ours refuses it: ImportError: no driver")]


def test_an_error_of_pytorchs_own_is_raised_alone(theirs: Any) -> None:
    with swap() as swapped:
        with pytest.raises(ValueError, match="Invalid learning rate: -1") as caught:
            theirs.Adam(make_params(), lr=-1)
        with pytest.raises(TypeError, match="params"):
            theirs.Adam()
        for tensor in (torch.ones(2), torch.ones(())):
            with pytest.raises(TypeError, match=r"iterable of Tensors or dicts"):
                theirs.SGD(tensor)
        with pytest.raises(ValueError, match="Invalid learning rate: -2"):
            theirs.SGD([{"lr": 0.1}], lr=-2)
    assert caught.value.__context__ is None
    assert not swapped.replaced
    assert not swapped.left_alone


def test_copies_and_signatures_stay_pytorchs(theirs: Any) -> None:
    signature, arguments = inspect.signature(theirs.Adam), inspect.getfullargspec(theirs.Adam.__init__)
    original = theirs.Adam(make_params())
    names, defaults = set(signature.parameters), theirs.Adam.__init__.__defaults__
    with swap():
        assert type(copy.deepcopy(original)) is theirs.Adam
        assert type(pickle.loads(pickle.dumps(original))) is theirs.Adam
        assert inspect.signature(theirs.Adam) == signature
        assert inspect.getfullargspec(theirs.Adam.__init__) == arguments
        # Programs that pass on only known options look here too.
        assert names < set(theirs.Adam.__init__.__code__.co_varnames)
        assert theirs.Adam.__init__.__defaults__ == defaults
        ours = Adam(make_params())
    assert type(theirs.Adam(params=make_params(), lr=0.1)) is theirs.Adam
    assert type(ours) is Adam


def test_who_lists_the_subclasses_finds_pytorchs_once_and_those_of_the_script(theirs: Any) -> None:
    class Mine(Adam):
        pass

    def listed(cls: type) -> list[type]:
        return [cls, *(found for kind in cls.__subclasses__() for found in listed(kind))]

    before = listed(theirs.Optimizer)
    with swap():
        found = listed(theirs.Optimizer)
        # Of PyTorch and of this library: another test may have imported further ones.
        own = [kind for kind in found if kind.__module__.startswith(("torch.", "dragon."))]
        assert [kind for kind in own if kind.__name__ in ("Adam", "AdamW", "SGD")] == [
            *(kind for kind in before if kind in (theirs.Adam, theirs.AdamW, theirs.SGD))
        ]
        assert Mine in found
        assert Mine in Adam.__subclasses__()
    assert listed(theirs.Optimizer) == before
    assert "__subclasses__" not in vars(theirs.Optimizer)


def test_an_optimizer_can_be_built_from_the_defaults_of_another(theirs: Any) -> None:
    with swap(max_grad_norm=1.0, state_dtype=torch.float64):
        first = theirs.Adam(make_params(), lr=0.5)
        changed = {**first.defaults, "max_grad_norm": 2.0}
        second = theirs.Adam(make_params(), **changed)
        assert (type(second), second.defaults) == (Adam, changed)
        theirs.Adam.__init__(second, make_params(), **{**first.defaults, "max_grad_norm": 3.0})
    assert second.defaults == {**first.defaults, "max_grad_norm": 3.0}


@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"release_gradients": True}], ids=str)
def test_what_was_replaced_can_be_initialised_again(theirs: Any, options: dict[str, Any]) -> None:
    original, params = theirs.Adam(make_params()), make_params()
    with swap(**options) as swapped:
        ours = theirs.Adam(make_params()[:1])
        for optimizer in (original, ours):
            run(optimizer, range(1))
        with pytest.raises(ValueError, match="Invalid learning rate: -1"):
            theirs.Adam.__init__(ours, params, lr=-1)
        assert len(ours.state) == 1
        theirs.Adam.__init__(ours, params, lr=0.5)
    assert (type(ours), len(ours.state)) == (Adam, 0)
    assert {"lr": 0.5, **options}.items() <= ours.defaults.items()
    assert [entry.counts() for entry in swapped.replaced] == [(4, 15 + 7 + 1 + 24)] * 2
    theirs.Adam.__init__(original, make_params(), lr=0.5)
    for optimizer in (original, ours):
        for _ in range(2):
            sum((param * param).sum() for param in params_of(optimizer)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for left, right in zip(params_of(original), params_of(ours), strict=True):
        torch.testing.assert_close(left, right)


def test_who_initialises_an_object_of_another_class_is_told(theirs: Any) -> None:
    class Mine(Adam):
        pass

    with swap():
        for wrong in (theirs.AdamW(make_params()), Mine(make_params())):
            name = f"{type(wrong).__module__}.{type(wrong).__qualname__}"
            with pytest.raises(
                TypeError, match=re.escape(f"Adam.__init__ cannot initialise a {name}: call its own")
            ):
                theirs.Adam.__init__(wrong, make_params())


def test_a_compiled_function_builds_ours_too(theirs: Any) -> None:
    params = make_params()

    def build() -> torch.optim.Optimizer:
        return torch.optim.Adam(params)

    with swap():
        assert type(torch.compile(build, backend="eager")()) is Adam
