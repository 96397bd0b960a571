"""Averages that began when somebody only asked for the states: the weights may be loaded after that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# The averages of steps that PyTorch's checkpoint functions took to create states.
_early: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note_early(params: Iterable[Tensor], state: Mapping[Any, Any]) -> None:
    """Take the averages of parameters for too early: only a step count shows whether they were loaded in place."""
    for param in params:
        entries = state.get(param, {})
        if "ema" in entries and "step" in entries:
            _early[entries["ema"]] = None


def drop_early(params: Iterable[Tensor], state: Mapping[Any, Any]) -> None:
    """Take early averages out of the state, so that they begin anew; those that were loaded stay.

    It reads step counts, once after states were asked for.
    """
    for param in params if _early else ():
        entries = state.get(param, {})
        average = entries.get("ema")
        if average is not None and average in _early:
            del _early[average]
            if float(entries["step"]) == 1:
                del entries["ema"]
