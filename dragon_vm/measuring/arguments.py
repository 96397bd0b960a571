"""Types of command line arguments that say what is wrong with a value."""

from __future__ import annotations

import argparse
import math

import torch


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def positive_seconds(text: str) -> float:
    """A time in seconds, above 0 and finite."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return number


def device(text: str) -> torch.device:
    """A device that is here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    # What torch raises for a device that it was not built for is an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no such device here: {text!r}: {reason}") from None
    return found
