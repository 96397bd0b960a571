"""Hypothesis strategies: hyperparameters as practitioners use them, tensors, gradient histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .cases import (
    GRADIENT_LAYOUTS,
    TENSOR_LAYOUTS,
    GradientCase,
    GroupCase,
    OptimizerCase,
    StepCase,
    TensorCase,
    check_layouts,
)

ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
BLOCK_BORDERS = (0, 1, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049)
# Uniform floats alone did not find `1 - beta` in float32 in 100 examples: what people use comes first.
_LRS = st.sampled_from([1e-3, 0.1, 1.0, 1e-30, 0.0]) | st.floats(0, 1)
_BETA1S = st.sampled_from([0.9, 0.95, 0.5, 0.0]) | st.floats(0, 0.9999)
_BETA2S = st.sampled_from([0.999, 0.9999, 0.95, 0.9, 0.0]) | st.floats(0, 0.99999)
_OPTION_VALUES: dict[str, SearchStrategy[Any]] = {
    "lr": _LRS,
    "betas": st.tuples(_BETA1S, _BETA2S),
    "eps": st.sampled_from([1e-8, 1e-15, 1e-3, 1.0, 0.0]),
    "weight_decay": st.sampled_from([0.0, 0.01, 1.0]) | st.floats(0, 1),
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "grad_scale": st.sampled_from([1.0, 0.1, 2.0**-16]),
    "clip_value": st.sampled_from([1.0, 1e-3]),
    "momentum": st.sampled_from([0.9, 0.0, 0.99]) | st.floats(0, 1),
    "dampening": st.sampled_from([0.0, 0.5, 0.9]),
    "nesterov": st.booleans(),
}
# By what a square may reach in the dtype of the arithmetic; a float16 state must hold the square itself.
_GRADIENT_BINADES = st.sampled_from([0, -7, 3, -20, -40, -70, 20, 50])
_FLOAT16_BINADES = st.sampled_from([0, -3, 4, -7, -14])
# Of a long run: a counter of 8 or 11 bits of mantissa no longer counts there, and one of 16 bits goes on with 0.
_COUNTS = st.sampled_from([None, None, None, 300, 3000, 2**16 - 1])


def _check_dtypes(name: str, dtypes: Sequence[Any]) -> None:
    """Check that dtypes are such as a parameter that is trained, or its gradient, may have."""
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(f"{name}: expected floating point or complex dtypes, got {dtype!r}")


def _check_gradients(
    layouts: Sequence[str], dtypes: Sequence[torch.dtype | None], prefix: str = "gradient_"
) -> None:
    check_layouts(f"{prefix}layouts", layouts, GRADIENT_LAYOUTS)
    # None is the parameter's.
    _check_dtypes(f"{prefix}dtypes", [dtype for dtype in dtypes if dtype is not None])


def hyperparameters(names: Sequence[str] = ADAM_OPTIONS) -> SearchStrategy[dict[str, Any]]:
    """Draw keyword arguments of an optimizer; each name may be left out.

    Args:
        names: Of `AdamOptions` (without epsilon_hat) or `SGDOptions`.

    Raises:
        ValueError: A name that no strategy is known for.
    """
    unknown = sorted(set(names) - set(_OPTION_VALUES))
    if unknown:
        raise ValueError(f"no strategy for {', '.join(unknown)}; known are {', '.join(_OPTION_VALUES)}")
    return st.fixed_dictionaries({}, optional={name: _OPTION_VALUES[name] for name in names})


def numels() -> SearchStrategy[int]:
    """Draw element counts, half of them at the borders of blocks."""
    return st.sampled_from(BLOCK_BORDERS) | st.integers(0, 300)


@st.composite
def tensor_cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layouts: Sequence[str] = TENSOR_LAYOUTS,
) -> TensorCase:
    """Draw a parameter by seed, binade, numel and layout."""
    _check_dtypes("dtypes", dtypes)
    check_layouts("layouts", layouts, TENSOR_LAYOUTS)
    layout = draw(st.sampled_from(layouts))
    return TensorCase(
        seed=draw(st.integers(0, 2**16)),
        binade=draw(st.sampled_from([0, -5, 3, -14])),
        numel=1 if layout == "scalar" else draw(numels()),
        layout=layout,
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def gradient_cases(
    draw: st.DrawFn,
    param: TensorCase,
    layouts: Sequence[str] = GRADIENT_LAYOUTS,
    dtypes: Sequence[torch.dtype | None] = (None,),
) -> GradientCase:
    """Draw a gradient for a parameter: ordinary, tiny, huge or zeros, in a layout of its own."""
    _check_gradients(layouts, dtypes, "")
    dtype = draw(st.sampled_from(dtypes))
    small = torch.float16 in (dtype, param.dtype)
    return GradientCase(
        seed=draw(st.integers(0, 2**16)),
        binade=draw(_FLOAT16_BINADES if small else _GRADIENT_BINADES),
        zeros=draw(st.integers(0, 7)) == 7,
        layout=draw(st.sampled_from(layouts)),
        dtype=dtype,
    )


@st.composite
def step_cases(
    draw: st.DrawFn,
    groups: Sequence[GroupCase],
    gradient_layouts: Sequence[str] = GRADIENT_LAYOUTS,
    gradient_dtypes: Sequence[torch.dtype | None] = (None,),
) -> StepCase:
    """Draw one step: gradients or none; now and then another lr, a save and load, or another count before it."""
    gradients = tuple(
        None if draw(st.integers(0, 3)) == 3 else draw(gradient_cases(tensor, gradient_layouts, gradient_dtypes))
        for group in groups
        for tensor in group.tensors
    )
    lr = {i: draw(_LRS) for i in range(len(groups)) if draw(st.integers(0, 3)) == 3}
    reload = draw(st.integers(0, 3)) == 3
    return StepCase(gradients, lr, reload, count=draw(_COUNTS))


@st.composite
def optimizer_cases(
    draw: st.DrawFn,
    *,
    options: Sequence[str],
    group_options: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layouts: Sequence[str] = TENSOR_LAYOUTS,
    gradient_layouts: Sequence[str] = GRADIENT_LAYOUTS,
    gradient_dtypes: Sequence[torch.dtype | None] = (None,),
    max_groups: int = 3,
    max_tensors: int = 3,
    max_steps: int = 4,
) -> OptimizerCase:
    """Draw a run: see `adam_cases`, which this is with other options."""
    _check_gradients(gradient_layouts, gradient_dtypes)
    own = hyperparameters(options if group_options is None else group_options)
    tensors = st.lists(tensor_cases(dtypes, layouts), min_size=1, max_size=max_tensors).map(tuple)
    groups = tuple(
        draw(st.lists(st.builds(GroupCase, tensors=tensors, options=own), min_size=1, max_size=max_groups))
    )
    steps = st.lists(step_cases(groups, gradient_layouts, gradient_dtypes), min_size=1, max_size=max_steps)
    return OptimizerCase(draw(hyperparameters(options)), groups, tuple(draw(steps)))


def adam_cases(
    *, options: Sequence[str] = ADAM_OPTIONS, group_options: Sequence[str] | None = None, **limits: Any
) -> SearchStrategy[OptimizerCase]:
    """Draw a run of an Adam: constructor arguments, groups of parameters, and a history of steps.

    Args:
        options: Hyperparameters that the constructor takes; each is sometimes left out.
        group_options: Those that a group may set, None for the same as `options`.
        **limits: What to draw less of, or more: `dtypes` of parameters, `layouts` (default: all of `LAYOUTS`
            and "scalar"), `gradient_layouts` (default: all of `GRADIENT_LAYOUTS`), `gradient_dtypes` (None
            is the parameter's), `max_groups`, `max_tensors` of a group, `max_steps`.

    Raises:
        TypeError, ValueError: A dtype that parameters cannot have, a layout or option that is not known; when the
            first case is drawn.
    """
    return optimizer_cases(options=options, group_options=group_options, **limits)


def _legal(options: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
    """Drop what PyTorch refuses beside the rest: nesterov asks for momentum and no dampening."""
    for dropped in ((), ("dampening",), ("dampening", "nesterov")):
        kept = {name: value for name, value in options.items() if name not in dropped}
        merged = {**inherited, **kept}
        if not merged.get("nesterov") or (merged.get("momentum") and not merged.get("dampening")):
            return kept
    # It inherits nesterov, and has no momentum.
    return {name: value for name, value in kept.items() if name != "momentum"}


def _legal_case(case: OptimizerCase) -> OptimizerCase:
    options = _legal(case.options, {})
    groups = tuple(replace(group, options=_legal(group.options, options)) for group in case.groups)
    return replace(case, options=options, groups=groups)


def sgd_cases(
    *, options: Sequence[str] = SGD_OPTIONS, group_options: Sequence[str] | None = None, **limits: Any
) -> SearchStrategy[OptimizerCase]:
    """Draw a run of an SGD; arguments as in `adam_cases`."""
    return optimizer_cases(options=options, group_options=group_options, **limits).map(_legal_case)
