"""Arguments of commands: what is taken, and that one line says what is wrong with anything else."""

import argparse
from collections.abc import Callable

import pytest
import torch

from dragon.vm.measuring.arguments import device, positive, positive_seconds


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [
        (positive, "1", 1),
        (positive, "12", 12),
        (positive_seconds, "0.5", 0.5),
        (positive_seconds, "1e9", 1e9),
        (device, "cpu", torch.device("cpu")),
        (device, "meta", torch.device("meta")),
    ],
)
def test_an_argument_is_converted(convert: Callable[[str], object], text: str, value: object) -> None:
    assert convert(text) == value


@pytest.mark.parametrize(
    ("convert", "wrong"),
    [
        (positive, ["0", "-3", "1.5", "many"]),
        (positive_seconds, ["0", "-1", "nan", "inf", "soon"]),
        (device, ["gpu"]),
    ],
)
def test_what_is_wrong_is_said_with_the_value(convert: Callable[[str], object], wrong: list[str]) -> None:
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
            convert(text)


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_device_that_fails_is_refused_with_the_first_line_of_the_reason(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise kind("not compiled in\nCompile with it")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        device("cuda")
    assert str(raised.value) == "no such device here: 'cuda': not compiled in"
