"""The options of the optimizers: their defaults, and the errors for values out of range."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from operator import is_not
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dragon.vm.torch.optim._modes import if_possible

# A parameter group.
Group = dict[str, Any]

# Options of our own that each parameter group may override, with the value that means what PyTorch does. Other
# options of our own belong to the optimizer.
OWN_GROUP_DEFAULTS: dict[str, Any] = {
    "epsilon_hat": False,
    "grad_scale": 1.0,
    "clip_norm": 0.0,
    "clip_value": 0.0,
    "ema_decay": 0.0,
    "state_dtype": None,
    "stochastic_rounding": None,
    "master_weights": None,
}
# How tensors are stored is this optimizer's choice: state dicts do not have it.
STORAGE_OPTIONS = ("state_dtype", "stochastic_rounding", "master_weights")

# Those of a group that are numbers, beside its betas.
_NUMBERS = {
    *("lr", "weight_decay", "eps", "momentum", "dampening"),
    *("grad_scale", "clip_norm", "clip_value", "ema_decay"),
}

# Those that are true or false, whatever says so.
_FLAGS = {
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
    *("nesterov", "decoupled_weight_decay", "epsilon_hat"),
}

# Hyperparameters that kernels read where they are, if they are tensors on the device.
_LIVE_TENSORS = ("lr", "betas[0]", "betas[1]")

# Immutable: whoever holds one of these sees no change in it.
PLAIN_TYPES = {float, int, bool, str, NoneType, torch.dtype}

# Of the hyperparameters of all groups: a number that is new after each change but of learning rates alone, and one
# that is new after each of those.
Version = tuple[int, int]


class Settings(NamedTuple):
    """Options of the optimizer as a whole; see `Adam`."""

    max_grad_norm: float = 0.0
    norm_type: float = 2.0
    skip_nonfinite: bool = False
    backend: str | None = None
    flatten: bool = False
    process_group: Any = None
    release_gradients: Any = False
    rounding_seed: int = 0
    native_state_dict: bool = False


# To a subclass that calls the constructor of its base's base.
_PASSED_OVER = (
    "a subclass has called the base's constructor with defaults of its own, which no step here could use: "
    "call the constructor of Adam, AdamW or SGD, or derive the class from torch.optim.Optimizer"
)


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the local variables of a constructor at its beginning."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def read_settings(options: Mapping[str, Any]) -> Settings:
    """Check the options of the optimizer as a whole, and take them out of all options."""
    if "grad_scale" not in options:
        raise TypeError(_PASSED_OVER)
    settings = Settings(**{name: options[name] for name in Settings._fields if name in options})
    if settings.backend not in (None, "triton", "native", "eager"):
        raise ValueError(f"backend must be None, 'triton', 'native' or 'eager', but got {settings.backend!r}")
    for name in ("skip_nonfinite", "flatten", "native_state_dict"):
        if (value := getattr(settings, name)) not in (True, False):
            raise TypeError(f"{name} must be a bool, but got {value!r}")
    check_number("max_grad_norm", settings.max_grad_norm)
    if not settings.max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm must not be negative or NaN, but got {settings.max_grad_norm}")
    if settings.norm_type not in (2, math.inf):
        raise ValueError(f"norm_type must be 2 or infinity, but got {settings.norm_type!r}")
    # A tensor that is filled later would be read by some backends and not by others.
    settings = settings._replace(max_grad_norm=float(settings.max_grad_norm))
    seed = settings.rounding_seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"rounding_seed must be an integer of 0 to 2**63 - 1, but got {seed!r}")
    return settings


def check_number(name: str, value: Any) -> None:
    """Check that an option is a number, fits a float, and is no tensor where kernels do not read it."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if value.device.type != "cpu" and name not in _LIVE_TENSORS:
            raise ValueError(f"{name} must be a number or a tensor on the CPU, but got a tensor on {value.device}")
        if value.device.type == "meta" or value.is_complex():
            raise TypeError(f"{name} must be a real number, but got {value!r}")
    elif not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, but got {value!r}")
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must fit a float, but got an integer of {value.bit_length()} bits")


def check_bound(group: Mapping[str, Any]) -> None:
    """Check a group's "bound_betas", which state dicts have: two numbers, and a third one where they changed."""
    bound = group.get("bound_betas")
    if bound is None:
        return
    numbers = bound if isinstance(bound, tuple | list) else ()
    if len(numbers) not in (2, 3) or not all(isinstance(each, int | float) and each >= 0 for each in numbers):
        raise ValueError(
            f"bound_betas must be two or three numbers, as state_dict() saves them, but got {bound!r}"
        )


def check_numbers(group: Mapping[str, Any]) -> None:
    """Check that a group's hyperparameters are numbers, in range or not. Betas that are tensors may be any."""
    check_bound(group)
    for name in _NUMBERS & group.keys():
        if type(value := group[name]) is not float:
            check_number(name, value)
    betas = group.get("betas", ())
    if not hasattr(betas, "__len__"):
        raise TypeError(f"betas must be two numbers, but got {betas!r}")
    if len(betas) > 2:
        raise ValueError(f"betas must be two numbers, but got {betas}")
    for index, beta in enumerate(betas):
        if type(beta) is not float and not isinstance(beta, Tensor):
            check_number(f"betas[{index}]", beta)


def check_flags(group: Mapping[str, Any]) -> None:
    """Check that a group's flags are true or false."""
    for name in _FLAGS & group.keys():
        if if_possible((RuntimeError, ValueError), bool, group[name]) is None:
            raise TypeError(f"{name} must be true or false, but got {group[name]!r}")


def check_keys(group: Any, attributes: Mapping[str, Any]) -> None:
    """Refuse a dict with an option of the optimizer as a whole that says something else than the settings.

    `attributes` are the optimizer's. One whose own constructor was passed over has no settings among them.
    """
    if "_settings" not in attributes:
        raise TypeError(_PASSED_OVER)
    for name, own in attributes["_settings"]._asdict().items() if isinstance(group, dict) else ():
        value = group.get(name, own)
        if value is not own and value != own:
            raise ValueError(
                f"{name} is an option of the optimizer as a whole, not of a parameter group: got {name}={value!r}"
            )


def complete(group: Mapping[str, Any], own_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group with all options: one of our own that it does not hold means what PyTorch does."""
    return {**own_defaults, **group}


def needs_norm(settings: Settings) -> bool:
    """Whether the options ask for the norm of all gradients."""
    return bool(settings.max_grad_norm) or settings.skip_nonfinite


def check_own(group: Mapping[str, Any], settings: Settings) -> None:
    """Check that hyperparameters are numbers or flags, and ranges of those of our own that all optimizers have."""
    check_numbers(group)
    check_flags(group)
    grad_scale, ema_decay = group["grad_scale"], group["ema_decay"]
    if not 0.0 < grad_scale < math.inf:
        raise ValueError(f"grad_scale must be positive and finite, but got {grad_scale}")
    for name in ("clip_norm", "clip_value"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must not be negative or NaN, but got {group[name]}")
    if group.get("epsilon_hat") not in (None, True, False):
        raise TypeError(f"epsilon_hat must be a bool or None, but got {group['epsilon_hat']!r}")
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must be at least 0 and below 1, but got {ema_decay}")
    if group["clip_norm"] and settings.norm_type != 2:
        raise ValueError(
            f"clip_norm bounds L2 norms: got clip_norm={group['clip_norm']} and norm_type={settings.norm_type}"
        )
    if group["clip_norm"] and settings.max_grad_norm:
        raise ValueError(
            "clip_norm and max_grad_norm contradict each other: "
            f"got clip_norm={group['clip_norm']} and max_grad_norm={settings.max_grad_norm}"
        )


def check_common(group: Mapping[str, Any], settings: Settings) -> None:
    """Check the options that all optimizers' groups have; `fused` is refused with the errors of PyTorch."""
    check_own(group, settings)
    if group["fused"]:
        if group["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["differentiable"] and settings.backend in ("triton", "native"):
        raise ValueError(f"differentiable=True needs backend='eager', but got backend={settings.backend!r}")


def own_tensors(group: dict[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Give a group copies of those hyperparameters that are tensors of another group too.

    What a scheduler writes into one group's tensor must not change another's. A tensor that autograd sees stays.
    """
    if not any(isinstance(value, Tensor) for value in (group["lr"], *group.get("betas", ()))):
        return
    held = {id(value) for other in others for value in (other["lr"], *other.get("betas", ()))}

    def own(value: Any) -> Any:
        shared = isinstance(value, Tensor) and id(value) in held and not value.requires_grad
        return value.clone() if shared else value

    group["lr"] = own(group["lr"])
    betas = group.get("betas", ())
    owned = list(map(own, betas))
    # A list that holds none stays the user's, who may write into it.
    if any(map(is_not, owned, betas)):
        group["betas"] = owned if isinstance(betas, list) else tuple(owned)


def by_value(value: Any) -> Any:
    """A hyperparameter in a form that tells whether it changed: a tensor's numbers, or its address on a device."""
    if type(value) in PLAIN_TYPES:
        return value
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return value.data_ptr(), value.dtype, value.device
        return float(value.detach()) if value.numel() == 1 else by_value(value.tolist())
    if isinstance(value, tuple | list):
        return tuple(map(by_value, value))
    if isinstance(value, Mapping):
        return tuple((name, by_value(entry)) for name, entry in value.items())
    # An array may change in place.
    if getattr(value, "ndim", 0):
        return by_value(value.tolist())
    if hasattr(value, "__float__"):
        return float(value)
    # So may a sequence of any other type, which need not have a hash.
    return tuple(map(by_value, value)) if hasattr(value, "__len__") else value
