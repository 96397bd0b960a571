import inspect
import math
import re

import pytest
import torch

from dragon.vm.torch import nn as dragon_nn
from dragon.vm.torch.optim import SGD, Adam, AdamW, swap
from dragon.vm.torch.optim._hints import ELSEWHERE, option_of
from dragon.vm.torch.optim._options import OWN_GROUP_DEFAULTS, Settings

from .support import BACKENDS, everything, home, numbers, parameters

ALGORITHMS = (Adam, AdamW, SGD)
# PyTorch's options of groups that all have.
TORCH_GROUP_OPTIONS = {"maximize", "foreach", "capturable", "differentiable", "fused"}
# What the formula of each takes, beside the options that all have.
FORMULA = {
    Adam: {"lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay", "epsilon_hat"},
    SGD: {"lr", "momentum", "dampening", "weight_decay", "nesterov"},
}
FORMULA[AdamW] = FORMULA[Adam]


def options_of(algorithm):
    """The keywords of a constructor with their defaults."""
    parameters = inspect.signature(algorithm).parameters.values()
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "params"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_signature_shows_every_option(algorithm):
    common = {*TORCH_GROUP_OPTIONS, *OWN_GROUP_DEFAULTS, *Settings._fields} - {"epsilon_hat", "bound_betas"}
    # SGD draws no random words.
    absent = {"stochastic_rounding", "rounding_seed"} if algorithm is SGD else set()
    assert set(options_of(algorithm)) == (FORMULA[algorithm] | common) - absent


@pytest.mark.parametrize("algorithm", [Adam, SGD])
def test_the_docstring_has_a_line_for_every_option(algorithm):
    arguments = inspect.getdoc(algorithm).partition("Args:")[2].partition("Raises:")[0]
    named = {name for line in re.findall(r"^ {4}(\w[\w, ]*):", arguments, re.M) for name in line.split(", ")}
    assert named == {"params", *options_of(algorithm)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (Adam, {"eps": 2**-10, "weight_decay": 0.5, "ema_decay": 0.5, "clip_value": 0.5, "grad_scale": 2.0}),
        (Adam, {"max_grad_norm": 0.5}),
        (SGD, {"momentum": 0.5, "dampening": 0.5, "clip_norm": 0.5}),
    ],
)
def test_a_number_may_be_a_tensor_of_one_element(algorithm, options, dtype, shape, backend):
    runs = []
    for wrap in (lambda value: value, lambda value: torch.full(shape, value)):
        params = parameters([(2,), ()], dtype, home(backend))
        optimizer = algorithm(params, lr=0.1, backend=backend, **{name: wrap(options[name]) for name in options})
        for number in range(2):
            for param in params:
                param.grad = numbers(number, *param.shape, dtype=dtype, device=home(backend))
            optimizer.step()
        runs.append(everything(optimizer))
    assert runs[0] == runs[1]


def test_a_bound_of_the_whole_optimizer_stays_whatever_becomes_of_its_tensor():
    bound = torch.tensor(0.5)
    optimizer = SGD(parameters([(2,)]), lr=1.0, max_grad_norm=bound)
    bound.fill_(0.1)
    param = optimizer.param_groups[0]["params"][0]
    before, param.grad = param.detach().clone(), torch.ones(2)
    optimizer.step()
    assert float((param.detach() - before).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_options_have_the_defaults_that_pytorch_has(algorithm):
    ours, theirs = options_of(algorithm), options_of(getattr(torch.optim, algorithm.__name__))
    assert {name: ours[name] for name in set(ours) & set(theirs)} == {
        name: theirs[name] for name in set(ours) & set(theirs)
    }
    assert set(theirs) <= set(ours)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_unknown_option_is_pythons_own_type_error(algorithm):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'learning_rate'"):
        algorithm([torch.nn.Parameter(torch.ones(1))], learning_rate=0.1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_options_are_defaults_and_settings_stand_in_no_group(algorithm):
    optimizer = algorithm([torch.nn.Parameter(torch.ones(1))], grad_scale=0.5, max_grad_norm=2.0)
    assert optimizer.param_groups[0]["grad_scale"] == optimizer.defaults["grad_scale"] == 0.5
    assert optimizer.defaults["max_grad_norm"] == 2.0
    assert set(options_of(algorithm)) == set(optimizer.defaults)
    assert not set(Settings._fields) & set(optimizer.param_groups[0])


WHOLE = {
    **{"max_grad_norm": 1e-3, "norm_type": math.inf, "skip_nonfinite": True, "backend": "eager", "flatten": True},
    **{"process_group": "all", "release_gradients": True, "rounding_seed": 3, "native_state_dict": True},
}


@pytest.mark.parametrize("name", Settings._fields)
def test_an_option_of_the_optimizer_as_a_whole_is_refused_in_a_group(name):
    value = WHOLE[name]
    first, second = ({"params": [torch.nn.Parameter(torch.ones(1))], name: value} for _ in range(2))
    said = re.escape(
        f"{name} is an option of the optimizer as a whole, not of a parameter group: got {name}={value!r}"
    )
    for make in ALGORITHMS:
        with pytest.raises(ValueError, match=said):
            make([first])
        optimizer = make([torch.nn.Parameter(torch.ones(1))])
        with pytest.raises(ValueError, match=said):
            optimizer.add_param_group(second)
        assert len(optimizer.param_groups) == 1
        assert set(first) == set(second) == {"params", name}


def test_a_group_may_say_what_the_optimizer_as_a_whole_does():
    group = {"params": [torch.nn.Parameter(torch.ones(1))], "max_grad_norm": 2, "process_group": None}
    optimizer = Adam([group], max_grad_norm=2.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "flatten": False})
    assert not any(set(Settings._fields) & set(group) for group in optimizer.param_groups)
    saved = optimizer.state_dict()
    saved["param_groups"][1]["max_grad_norm"] = 7.0
    optimizer.load_state_dict(saved)
    assert (optimizer._settings.max_grad_norm, "max_grad_norm" in optimizer.param_groups[1]) == (2.0, False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_and_defaults_build_the_same_optimizer(algorithm):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    first = algorithm(
        [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], max_grad_norm=2.0, backend="eager"
    )
    second = type(first)(first.param_groups, **first.defaults)
    assert second.defaults == first.defaults
    assert second.param_groups == first.param_groups
    assert second._settings == first._settings


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0}, {"clip_norm": math.inf}, {"clip_value": 0, "max_grad_norm": 1},
        {"max_grad_norm": math.inf},
        {"norm_type": 2}, {"norm_type": math.inf}, {"ema_decay": 0}, {"grad_scale": 0.1}, {"state_dtype": None},
        {"foreach": False, "fused": False, "capturable": True}, {"clip_norm": 1.0, "clip_value": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_values_at_the_border_are_taken(options):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([param], **options)
    param.grad = torch.full((2,), 0.5)
    optimizer.step()
    assert param.isfinite().all()
    assert (param < 1).all()


ELSEWHERES = {
    "optim_bits": r': here state_dtype="8bit"$',
    "use_8bit": r': here state_dtype="8bit"$',
    "state_bits": r': here state_dtype="8bit"$',
    "quantize": r': here state_dtype="8bit"$',
    "exp_avg_sq_dtype": r': here state_dtype=\{"exp_avg_sq": dtype\}$',
    "moment_dtype": r": here state_dtype=dtype$",
    "bf16_stochastic_round": r": here stochastic_rounding=True$",
    "master_weight_bits": r': here master_weights="split8", or "split16", which is exact$',
    "store_param_remainders": r': here master_weights="split16", which is exact$',
    "kahan": r': here master_weights="split16", which is exact$',
    "kahan_sum": r': here master_weights="split16", which is exact$',
    "state_dtyp": r"\. Did you mean 'state_dtype'\?$",
    "nonsense": "'nonsense'$",
}


@pytest.mark.parametrize("name", ELSEWHERES)
def test_an_option_of_another_library_is_refused_with_the_name_of_ours(name):
    said = rf"unexpected keyword arguments?:? {name!r}{ELSEWHERES[name].removeprefix(repr(name))}"
    for make in (Adam, AdamW, SGD):
        with pytest.raises(TypeError, match=rf"^{make.__name__}\.__init__\(\) got an {said}"):
            make([torch.nn.Parameter(torch.ones(2))], **{name: 8})
    with pytest.raises(TypeError, match=rf"^swap\(\) got {said}"):
        swap(**{name: 8})


def test_every_hint_names_an_option_that_is_there():
    for ours in ELSEWHERE.values():
        name = ours.argument.partition("=")[0]
        assert name in inspect.signature(Adam).parameters
        assert ours.word.startswith(option_of(name))
    assert not ELSEWHERE.keys() & inspect.signature(Adam).parameters.keys()


def test_true_for_masters_is_refused_with_what_there_is():
    there = re.escape('master_weights: expected torch.float32, "split16", "split8" or None, got True')
    with pytest.raises(ValueError, match=there):
        Adam([torch.nn.Parameter(torch.ones(2).bfloat16())], master_weights=True)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        *(("ema_decay", 1.5, 0.5), ("ema_decay", math.nan, 0.5), ("grad_scale", 0, 0.5), ("grad_scale", -1, 0.5)),
        *(("clip_norm", -1, 1), ("clip_value", -1, 1), ("clip_value", "1", 1)),
        *(("state_dtype", "4bit", torch.bfloat16), ("master_weights", True, None)),
    ],
)
def test_what_the_constructor_refuses_is_refused_in_mid_run(algorithm, name, bad, good, capturable):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = algorithm([param], capturable=capturable)
    with pytest.raises((TypeError, ValueError), match=name) as at_first:
        algorithm([param], **{name: bad})
    param.grad = torch.full((2,), 0.5)
    optimizer.step()
    before, group, state = param.clone(), dict(optimizer.param_groups[0]), optimizer.state_dict()["state"]
    for _ in range(2):
        with pytest.raises(at_first.type, match=re.escape(str(at_first.value))):  # noqa: PT012  # a live group's
            optimizer.param_groups[0][name] = bad
            optimizer.step()
        optimizer.param_groups[0].pop(name, None)
        assert torch.equal(param, before)
        assert optimizer.param_groups[0] == group
        assert str(optimizer.state_dict()["state"]) == str(state)
    optimizer.param_groups[0][name] = good
    optimizer.step()
    assert (param < before).all()


@pytest.mark.parametrize("bad", ["no", "False", 2])
def test_a_form_of_epsilon_that_is_no_bool_is_refused(bad):
    param = torch.nn.Parameter(torch.ones(2))
    refused = pytest.raises(TypeError, match=f"epsilon_hat must be a bool or None, but got {bad!r}")
    with refused:
        Adam([param], epsilon_hat=bad)
    with refused:
        Adam([{"params": [param], "epsilon_hat": bad}])
    optimizer = Adam([param])
    optimizer.param_groups[0]["epsilon_hat"] = bad
    param.grad = torch.ones(2)
    with refused:
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [dragon_nn.Parameter, torch.nn.Parameter])
def test_no_form_of_epsilon_means_that_of_the_parameters_in_mid_run_too(make, backend):
    found = []
    for change in ({}, {"epsilon_hat": None}):
        param = make(torch.ones(2, device=home(backend)))
        optimizer = Adam([param], eps=0.1, backend=backend)
        optimizer.param_groups[0].update(change)
        param.grad = torch.full_like(param, 0.1)
        optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_value_is_a_flag_as_with_pytorch(backend):
    for make, name in ((Adam, "decoupled_weight_decay"), (SGD, "nesterov")):
        momentum = {"momentum": 0.9} if make is SGD else {}
        found = []
        for value in ("x", True, None, False):
            param = torch.nn.Parameter(torch.ones(2, device=home(backend)))
            optimizer = make([param], lr=0.1, weight_decay=0.5, backend=backend, **momentum)
            optimizer.param_groups[0][name] = value
            for _ in range(2):
                param.grad = torch.ones_like(param)
                optimizer.step()
            found.append(param.detach())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[3])
        assert not torch.equal(found[0], found[2])


def test_two_limits_contradict_each_other_in_mid_run_too():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([param], max_grad_norm=1.0)
    optimizer.param_groups[0]["clip_norm"] = 1.0
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="clip_norm and max_grad_norm contradict each other"):
        optimizer.step()
    assert not optimizer.state


def test_rates_and_decays_are_as_free_in_mid_run_as_with_pytorch():
    found = []
    for make in (Adam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.ones(2))
        optimizer = make([param], lr=0.1)
        optimizer.param_groups[0].update(lr=-0.1, weight_decay=-0.5)
        param.grad = torch.ones(2)
        optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [tuple, list])
def test_groups_share_no_betas_that_are_tensors(kind: type) -> None:
    betas = kind([torch.tensor(0.9), torch.tensor(0.99)])
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Adam([{"params": [param], "betas": betas} for param in params])
    first, second = (group["betas"] for group in optimizer.param_groups)
    assert type(first) is type(second) is kind
    first[0].fill_(0.5)
    assert float(second[0]) == pytest.approx(0.9)


def test_what_autograd_sees_and_a_list_without_tensors_stay_the_users() -> None:
    lr, betas = torch.tensor(0.1, requires_grad=True), [0.9, 0.99]
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = Adam([{"params": [param], "betas": betas} for param in params], lr=lr, differentiable=True)
    assert all(group["lr"] is lr and group["betas"] is betas for group in optimizer.param_groups)


def test_a_loaded_dict_changes_no_option_that_it_lacks_and_none_of_the_optimizer():
    loaded = torch.optim.Adam(parameters([(3,)])).state_dict()
    loaded["param_groups"][0]["max_grad_norm"] = 0.5
    optimizer = Adam([{"params": parameters([(3,)]), "clip_norm": 0.25}])
    optimizer.load_state_dict(loaded)
    (group,) = optimizer.param_groups
    assert group["clip_norm"] == 0.25
    assert "max_grad_norm" not in group


@pytest.mark.parametrize("betas", [None, (0.9,), "x"])
def test_betas_that_a_step_would_refuse_are_saved_as_they_are(betas):
    optimizers = [make(parameters([(3,)]), foreach=True) for make in (Adam, torch.optim.Adam)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["betas"] = betas
    ours, theirs = (optimizer.state_dict()["param_groups"][0] for optimizer in optimizers)
    assert ours["betas"] == theirs["betas"] == betas


def test_none_is_a_value_that_a_loaded_dict_gives():
    optimizer = Adam(parameters([(3,)]), foreach=True)
    optimizer.load_state_dict(torch.optim.Adam(parameters([(3,)])).state_dict())
    assert optimizer.param_groups[0]["foreach"] is None


def test_a_pickle_from_before_an_option_of_pytorch_gets_its_default():
    optimizer = Adam(parameters([(3,)]), maximize=True)
    pickled = optimizer.__getstate__()
    del pickled["param_groups"][0]["maximize"]
    copied = Adam.__new__(Adam)
    copied.__setstate__(pickled)
    assert copied.param_groups[0]["maximize"] is True


def test_a_loaded_step_count_that_nothing_counts_on_is_left_out():
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = SGD([param], lr=1.0, momentum=0.5)
    group = optimizer.state_dict()["param_groups"]
    state = {"momentum_buffer": torch.ones(2), "step": torch.tensor(7.0)}
    optimizer.load_state_dict({"param_groups": group, "state": {0: state}})
    assert set(optimizer.state[param]) == {"momentum_buffer"}
