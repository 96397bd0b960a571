import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from dragon.vm.testing import (
    ADAM_OPTIONS,
    BLOCK_BORDERS,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    SGD_OPTIONS,
    GradientCase,
    TensorCase,
    adam_cases,
    gradient_cases,
    hyperparameters,
    numels,
    sgd_cases,
    tensor_cases,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
# What is asked is whether it is drawn, not its smallest example.
first = settings(derandomize=True, database=None, max_examples=1000, phases=[Phase.generate])


@given(tensor_cases(dtypes=DTYPES))
def test_a_tensor_has_the_elements_dtype_and_values_of_its_case(case):
    fenced = case.build()
    assert (fenced.tensor.numel(), fenced.tensor.dtype) == (case.numel, case.dtype)
    assert torch.equal(fenced.tensor, case.build().tensor)
    assert torch.isfinite(fenced.tensor).all()
    fenced.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_of_a_case_are_the_same_in_every_dtype_but_for_one_rounding(dtype):
    """Subnormal numbers of float16 among them, which products would round once more."""
    wide, narrow = (TensorCase(0, -14, 1000, dtype=each).build().tensor for each in (torch.float64, dtype))
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_what_its_name_says(layout):
    tensor = TensorCase(seed=0, binade=0, numel=3 * 5 * 7, layout=layout).build().tensor
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert tensor.is_contiguous(memory_format=memory_format) == (
        layout in ("contiguous", "channels_last", "misaligned")
    )
    assert (tensor.data_ptr() % 16 == 0) == (layout != "misaligned")
    dense = sorted(tensor.stride())[0] == 1
    assert dense == (layout != "non_dense")


def test_a_scalar_has_no_dimension():
    assert TensorCase(seed=0, binade=0, numel=1, layout="scalar").build().tensor.dim() == 0


@given(st.data(), tensor_cases(dtypes=DTYPES))
def test_a_gradient_has_its_parameters_shape_in_any_layout(data, case):
    param = case.build().tensor
    gradient = data.draw(gradient_cases(case, dtypes=[None, torch.float32]))
    fenced = gradient.build(param)
    assert fenced.tensor.shape == param.shape
    assert fenced.tensor.dtype == (gradient.dtype or param.dtype)
    assert gradient.zeros <= (fenced.tensor == 0).all().item()
    fenced.check()


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
def test_gradient_layouts_differ_from_the_parameter_as_named(layout):
    param = TensorCase(seed=0, binade=0, numel=3 * 5, layout="transposed").build().tensor
    assert param.stride() == (1, 3)
    strides = {"same": (1, 3), "reversed": (5, 1), "non_dense": (10, 2), "expanded": (0, 0)}
    gradient = GradientCase(seed=1, binade=0, layout=layout).build(param).tensor
    assert gradient.stride() == strides.get(layout, (5, 1))


@pytest.mark.parametrize("name", ADAM_OPTIONS)
def test_each_hyperparameter_is_sometimes_given_and_sometimes_left_out(name):
    find(hyperparameters(), lambda kwargs: name in kwargs, settings=first)
    find(hyperparameters(), lambda kwargs: name not in kwargs and len(kwargs) > 2, settings=first)


@pytest.mark.parametrize("beta2", [0.999, 0.9999, 0.95, 0.0])
def test_betas_that_people_use_are_drawn(beta2):
    find(hyperparameters(), lambda kwargs: kwargs.get("betas", (0, 0.5))[1] == beta2, settings=first)


@pytest.mark.parametrize("numel", BLOCK_BORDERS)
def test_every_block_border_is_drawn(numel):
    find(numels(), lambda drawn: drawn == numel, settings=first)


HISTORIES = {
    "a parameter with and without gradient": lambda c: len({s.gradients[0] is None for s in c.steps}) == 2,
    "a save and load after the first step": lambda c: any(step.reload for step in c.steps[1:]),
    "the count of a long run": lambda c: any(step.count is not None for step in c.steps[1:]),
    "a new lr after the first step": lambda c: any(step.lr for step in c.steps[1:]),
    "groups with options of their own": lambda c: len(c.groups) > 1 and c.groups[0].options != c.groups[1].options,
    "a tensor of no elements beside one of some": lambda c: len({t.numel > 0 for t in c.tensors}) == 2,
    "a gradient of zeros": lambda c: any(g is not None and g.zeros for s in c.steps for g in s.gradients),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_histories_are_drawn_with(history):
    find(adam_cases(), HISTORIES[history], settings=first)


@given(sgd_cases())
def test_sgd_cases_are_such_as_torch_takes(case):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1)) for _ in group.tensors], **group.options}
        for group in case.groups
    ]
    assert len(torch.optim.SGD(groups, **case.options).param_groups) == len(groups)


@given(adam_cases(options=["lr"], layouts=["contiguous"], max_groups=1, max_tensors=1, max_steps=2))
def test_limits_are_kept(case):
    assert set(case.options) <= {"lr"}
    assert (len(case.groups), len(case.tensors)) == (1, 1)
    assert len(case.steps) <= 2
    assert case.tensors[0].layout == "contiguous"


@pytest.mark.parametrize("make", [adam_cases, sgd_cases])
@pytest.mark.parametrize(
    ("limits", "error", "said"),
    [
        ({"layouts": ["x"]}, ValueError, r"^layouts: no layout 'x'; known are contiguous, .*, scalar\b"),
        ({"layouts": ["scalar", "Contiguous"]}, ValueError, r"^layouts: no layout 'Contiguous'; known are"),
        ({"layouts": "scalar"}, ValueError, r"^layouts: no layout 's', "),
        ({"gradient_layouts": ["q"]}, ValueError, r"^gradient_layouts: no layout 'q'; known are same, "),
        ({"gradient_dtypes": ["a"]}, TypeError, r"^gradient_dtypes: expected floating point .*, got 'a'"),
        ({"gradient_dtypes": [None, torch.int64]}, TypeError, r"^gradient_dtypes: .*, got torch\.int64\b"),
        ({"dtypes": [torch.int32]}, TypeError, r"^dtypes: expected floating point .*, got torch\.int32\b"),
        ({"dtypes": [None]}, TypeError, r"^dtypes: expected floating point .*, got None\b"),
    ],
)
def test_limits_that_mean_nothing_are_refused_by_name(make, limits, error, said):
    with pytest.raises(error, match=said):
        find(make(**limits), lambda case: True, settings=first)


def test_layouts_that_are_not_known_are_refused_wherever_they_are_named():
    with pytest.raises(ValueError, match=r"^layout: no layout 'dense'; known are contiguous"):
        TensorCase(seed=0, binade=0, numel=1, layout="dense")
    with pytest.raises(ValueError, match=r"^layout: no layout 'scalar'; known are same"):
        GradientCase(seed=0, binade=0, layout="scalar")
    param = TensorCase(seed=0, binade=0, numel=1)
    for strategy in (tensor_cases(layouts=["same"]), gradient_cases(param, layouts=["scalar"])):
        with pytest.raises(ValueError, match=r"^layouts: no layout"):
            find(strategy, lambda case: True, settings=first)


@settings(first, max_examples=1000)
@given(sgd_cases(options=("momentum", "nesterov"), group_options=("momentum",), max_tensors=1, max_steps=1))
def test_nesterov_has_momentum_in_every_group(case):
    for group in case.groups:
        merged = case.options | group.options
        assert merged.get("momentum") or not merged.get("nesterov")


@given(
    gradient_cases(TensorCase(0, 0, 50, dtype=torch.float16)),
    gradient_cases(TensorCase(0, 0, 50), dtypes=[torch.float16]),
)
def test_squares_of_float16_gradients_fit(own, given):
    for case, dtype in ((own, torch.float16), (given, torch.float32)):
        grad = case.build(torch.zeros(50, dtype=dtype)).tensor
        assert grad.dtype == torch.float16
        assert grad.square().isfinite().all()


def test_unknown_hyperparameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no strategy for rho; known are lr, betas"):
        hyperparameters(["lr", "rho"])
    assert set(SGD_OPTIONS) == {"lr", "momentum", "dampening", "weight_decay", "nesterov"}
