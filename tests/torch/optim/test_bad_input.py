"""Errors say what is wrong, as PyTorch does where it objects too."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

from dragon.vm.torch.optim import SGD, Adam, AdamW
from dragon.vm.torch.optim._groups.checks import check_grads

from .support import BACKENDS, everything

NAN = math.nan
OURS = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW, torch.optim.SGD: SGD}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def param(*shape):
    return torch.nn.Parameter(torch.ones(shape or (2,)))


def error_of(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            build()
        except Exception as error:
            return type(error), str(error)
    return None


@pytest.mark.parametrize("theirs", OURS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "arguments",
    [{"lr": -1.0}, {"lr": NAN}, {"lr": torch.ones(2)}, {"weight_decay": -0.1}, {"weight_decay": NAN}],
    ids=str,
)
def test_hyperparameters_out_of_range_have_pytorchs_error(theirs, arguments):
    expected = error_of(lambda: theirs([param()], **arguments))
    found = error_of(lambda: OURS[theirs]([param()], **arguments))
    if expected is None:
        # PyTorch's SGD lets NaN pass; its Adam does not, nor does ours.
        assert found in (
            (ValueError, "Invalid learning rate: nan"),
            (ValueError, "Invalid weight_decay value: nan"),
        )
    else:
        assert found == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"betas": (-0.1, 0.9)}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"betas": (NAN, 0.9)},
        {"betas": (0.9, NAN)}, {"betas": (0.9, torch.tensor(0.9))}, {"eps": -1e-8}, {"eps": NAN},
        {"lr": torch.tensor(0.1), "foreach": True},
    ],
    ids=str,
)  # fmt: skip
def test_adams_hyperparameters_out_of_range_have_pytorchs_error(arguments):
    expected = error_of(lambda: torch.optim.Adam([param()], **arguments))
    assert expected is not None
    assert error_of(lambda: Adam([param()], **arguments)) == expected


@pytest.mark.parametrize(
    "arguments",
    [{"momentum": -0.1}, {"nesterov": True}, {"nesterov": True, "dampening": 0.5}],
    ids=str,
)
def test_sgds_hyperparameters_out_of_range_have_pytorchs_error(arguments):
    expected = error_of(lambda: torch.optim.SGD([param()], **arguments))
    assert expected is not None
    assert error_of(lambda: SGD([param()], **arguments)) == expected


def shared():
    one = param()
    return [{"params": [one]}, {"params": [one]}]


BAD_PARAMS = {
    "a tensor": param,
    "nothing": list,
    "a set": lambda: [{"params": {param()}}],
    "a set of parameters": lambda: {param()},
    "a non-leaf": lambda: [param() * 2],
    "a parameter in two groups": shared,
    "a number": lambda: [1.0],
    "a group without params": lambda: [{"lr": 0.1}],
    "some names": lambda: [("name", param()), param()],
    "names in one group": lambda: [{"params": [("name", param())]}, {"params": [param()]}],
    "a group and a parameter": lambda: [{"params": [param()]}, param()],
}


@pytest.mark.parametrize("theirs", OURS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("make", BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_what_is_no_list_of_parameters_has_pytorchs_error(theirs, make):
    expected = error_of(lambda: theirs(make()))
    found = error_of(lambda: OURS[theirs](make()))
    if make is BAD_PARAMS["a set of parameters"]:
        # PyTorch takes it and leaves the order to chance, or objects, by version.
        assert expected is None or found == expected
        return
    assert expected is not None
    assert found == expected


@pytest.mark.parametrize("group", [[param()], param(), None], ids=["list", "parameter", "None"])
def test_a_group_that_is_no_dict_has_pytorchs_error(group):
    ours, theirs = Adam([param()]), torch.optim.Adam([param()])
    expected = error_of(lambda: theirs.add_param_group(group))
    assert expected is not None
    assert error_of(lambda: ours.add_param_group(group)) == expected
    assert len(ours.param_groups) == 1


def overlapping():
    whole = torch.zeros(10)
    return [torch.nn.Parameter(whole[:6]), torch.nn.Parameter(whole[5:])]


def in_two_dtypes():
    whole = torch.zeros(4)
    return [torch.nn.Parameter(whole), torch.nn.Parameter(whole.view(torch.bfloat16)[1:3])]


def twice():
    one = param()
    return [one, one]


MEMORY = {
    "overlapping views": overlapping,
    "views in two dtypes": in_two_dtypes,
    "expanded": lambda: [torch.nn.Parameter(torch.zeros(1).expand(5))],
    "a parameter twice": twice,
}


@pytest.mark.parametrize("make", MEMORY.values(), ids=MEMORY)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameters_may_not_share_memory(make):
    with pytest.raises(ValueError, match="params must not share memory"):
        Adam(make())
    optimizer = Adam([param()])
    with pytest.raises(ValueError, match="params must not share memory"):
        optimizer.add_param_group({"params": make()})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_that_was_added_again_is_named_at_both_its_places():
    first, again = param(), param()
    optimizer = Adam([first, again])
    optimizer.param_groups[0]["params"].append(again)
    again.grad = torch.ones(2)
    with pytest.raises(ValueError, match="parameter 1 and parameter 2 do"):
        optimizer.step()


def test_interlaced_parameters_share_no_memory():
    whole = torch.zeros(10)
    Adam([torch.nn.Parameter(whole[0::2]), torch.nn.Parameter(whole[1::2]), torch.nn.Parameter(torch.zeros(0))])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_integer_parameters_that_do_not_train_are_left_alone(dtype):
    frozen = torch.nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    trained = param()
    optimizer = Adam([frozen, trained])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert (frozen == 1).all()
    assert frozen not in optimizer.state
    assert trained in optimizer.state


def test_an_integer_parameter_that_gets_a_gradient_later_is_refused_then():
    frozen, trained = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False), param()
    optimizer = Adam([frozen, trained])
    trained.grad, before = torch.ones_like(trained), trained.detach().clone()
    frozen.grad = torch.ones(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"params must be floating point or complex, but got one of torch\.uint8"):
        optimizer.step()
    assert torch.equal(trained, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clip_norm": 1.0, "max_grad_norm": 2.0}, ("clip_norm=1.0", "max_grad_norm=2.0")),
        ({"clip_norm": -1.0}, ("clip_norm", "-1.0")), ({"clip_norm": NAN}, ("clip_norm", "nan")),
        ({"clip_value": -1.0}, ("clip_value", "-1.0")), ({"clip_value": NAN}, ("clip_value", "nan")),
        ({"max_grad_norm": -1.0}, ("max_grad_norm", "-1.0")), ({"max_grad_norm": NAN}, ("max_grad_norm", "nan")),
        ({"norm_type": 1}, ("norm_type", "1")), ({"norm_type": NAN}, ("norm_type", "nan")),
        ({"norm_type": "inf"}, ("norm_type", "'inf'")),
        ({"grad_scale": 0.0}, ("grad_scale", "0.0")), ({"grad_scale": -2.0}, ("grad_scale", "-2.0")),
        ({"grad_scale": NAN}, ("grad_scale", "nan")), ({"grad_scale": math.inf}, ("grad_scale", "inf")),
        ({"ema_decay": 1.0}, ("ema_decay", "1.0")), ({"ema_decay": -0.1}, ("ema_decay", "-0.1")),
        ({"ema_decay": NAN}, ("ema_decay", "nan")), ({"state_dtype": torch.int8}, ("state_dtype", "int8")),
        ({"backend": "cuda"}, ("backend", "cuda")),
        ({"backend": "native", "differentiable": True}, ("backend", "native")),
        ({"backend": "triton", "differentiable": True}, ("backend", "triton")),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("algorithm", [Adam, AdamW, SGD])
def test_an_option_out_of_range_is_named_and_shown(algorithm, arguments, words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        algorithm([param()], **arguments)


NUMBERS = ("max_grad_norm", "grad_scale", "clip_norm", "clip_value", "ema_decay", "lr", "weight_decay")
BAD_NUMBERS = {
    **{bad: (TypeError, f"must be a number, but got {bad!r}") for bad in (None, "1", 1j)},
    **{
        bad: (ValueError, f"must fit a float, but got an integer of {bad.bit_length()} bits")
        for bad in (10**5000, -(10**5000))
    },
}


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=["None", "str", "complex", "too large", "too low"])
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("algorithm", [Adam, AdamW, SGD])
def test_an_option_that_is_no_number_is_named_and_shown(algorithm, name, bad):
    kind, said = BAD_NUMBERS[bad][0], re.escape(f"{name} {BAD_NUMBERS[bad][1]}")
    with pytest.raises(kind, match=said):
        algorithm([param()], **{name: bad})
    if name == "max_grad_norm":
        return
    trained = param()
    trained.grad = torch.ones(2)
    optimizer = algorithm([trained])
    with pytest.raises(kind, match=said):
        optimizer.add_param_group({"params": [param()], name: bad})
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    before = everything(optimizer)
    optimizer.param_groups[0][name] = bad
    with pytest.raises(kind, match=said):
        optimizer.step()
    assert everything(optimizer) == before


@pytest.mark.parametrize(
    "bad",
    [(0.9, 0.9, 0.9), (0.9, None), (None, 0.9), (0.9, 10**400), "ab", 0.9, None],
    ids=lambda bad: f"{bad!s:.20}",
)
def test_betas_that_are_no_two_numbers_are_named_at_construction(bad):
    said = r"^betas(\[[01]\])? must (be two numbers|be a number|fit a float)"
    with pytest.raises((TypeError, ValueError), match=said):
        Adam([param()], betas=bad)


@pytest.mark.parametrize("name", ["flatten", "skip_nonfinite", "native_state_dict"])
def test_an_option_that_is_no_bool_is_named_and_shown(name):
    for bad in ("no", None, 2):
        with pytest.raises(TypeError, match=f"{name} must be a bool, but got {bad!r}"):
            Adam([param()], **{name: bad})
    for good in (0, 1, np.bool_(False), np.bool_(True)):
        Adam([param()], **{name: good})


def test_what_is_no_process_group_is_refused_at_once():
    with pytest.raises(TypeError, match=r"^process_group must be a torch\.\S+ProcessGroup or None, but got 3"):
        Adam([param()], process_group=3)


def test_a_process_group_is_refused_where_pytorch_was_built_without_any(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^process_group must be None for a PyTorch without torch\.distributed"):
        Adam([param()], process_group=3)
    Adam([param()])


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("bad", [0.9, None], ids=repr)
def test_betas_that_are_one_number_are_named(options, bad):
    optimizer = Adam([param()], **options)
    before = everything(optimizer)
    with pytest.raises(TypeError, match=f"betas must be two numbers, but got {bad!r}"):  # noqa: PT012  # by either
        optimizer.param_groups[0]["betas"] = bad
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    assert everything(optimizer) == before


def test_a_groups_own_options_are_checked_and_the_group_is_not_added():
    optimizer = Adam([param()], max_grad_norm=1.0)
    for options in ({"lr": -1.0}, {"betas": (2.0, 0.9)}, {"clip_norm": 1.0}, {"grad_scale": 0.0}, {"eps": NAN}):
        with pytest.raises(ValueError, match=r"learning rate|beta|clip_norm and max_grad_norm|grad_scale|epsilon"):
            optimizer.add_param_group({"params": [param()], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("backend", "device"), [("native", "meta"), ("triton", "meta")])
def test_a_backend_that_cannot_update_a_parameter_says_why(backend, device):
    with pytest.raises(ValueError, match=rf"backend='{backend}' is impossible here: .*parameter is on {device}"):
        Adam([torch.nn.Parameter(torch.empty(2, device=device))], backend=backend)


def test_a_gradient_elsewhere_or_of_another_kind_is_refused():
    for grad, words in (
        (torch.empty(2, device="meta"), "is on cpu, but its gradient is on meta"),
        (torch.ones(3), r"has shape \(2,\), but its gradient \(3,\)"),
        (torch.ones(2, dtype=torch.complex64), "is of torch.float32, but its gradient is of torch.complex64"),
        (torch.ones(2, dtype=torch.int32), "is of torch.float32, but its gradient is of torch.int32"),
    ):
        with pytest.raises(ValueError, match=words):
            check_grads([param()], [grad], "Adam")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.functionalize], ids=lambda each: each.__name__)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_transform_that_would_wrap_states_is_refused(backend, is_first, transform):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([weight], lr=0.5, backend=backend)
    if not is_first:
        weight.grad = torch.ones(3)
        optimizer.step()
    before, states = weight.tolist(), dict(optimizer.state.get(weight, {}))

    def stepped(x):
        weight.grad = torch.ones(3)
        optimizer.step()
        return x.sum()

    with pytest.raises(RuntimeError, match=r"step\(\) cannot be prepared within torch\.func\.grad"):
        transform(stepped)(torch.ones(3))
    assert weight.tolist() == before
    assert all(optimizer.state[weight][name] is value for name, value in states.items())
    weight.grad = torch.ones(3)
    optimizer.step()
    assert weight.tolist() == pytest.approx([-0.5 if is_first else -1.0] * 3)


@pytest.mark.parametrize(
    "bad", ["x", [1.0], torch.ones(2), torch.ones(0), torch.ones((), dtype=torch.complex64), 1j]
)
def test_a_step_count_that_is_no_number_is_refused_by_loading_and_by_a_step(bad):
    optimizer = Adam([param()])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    before, saved = everything(optimizer), optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": bad}
    with pytest.raises(ValueError, match=re.escape(f"has the step {bad!r} for parameter 0, not one number")):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] = bad
    with pytest.raises(ValueError, match=re.escape(f"must be one number, but got {bad!r}")):
        optimizer.step()


@each_backend
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_parameter_whose_memory_was_freed_is_refused_before_anything_changes(backend, is_first, options):
    """PyTorch's default ends the process with a fault of memory, its fused operation raises."""
    first, second = param(3), param(3)
    optimizer = Adam([first, second], backend=backend, **options)
    for each in (first, second):
        each.grad = torch.ones(3)
    if not is_first:
        optimizer.step()
    before = first.tolist(), [float(state["step"]) for state in optimizer.state.values()]
    second.untyped_storage().resize_(0)
    try:
        text = error_of(optimizer.step)
    finally:
        # Whoever shows it in a report reads memory again.
        second.untyped_storage().resize_(64)
    assert text == (ValueError, "a parameter of shape (3,) has no memory: its storage was freed")
    assert before == (first.tolist(), [float(state["step"]) for state in optimizer.state.values()])
