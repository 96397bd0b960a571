"""Names of devices, as measurements record them."""

import platform
from pathlib import Path

import pytest
import torch

from dragon.vm.measuring.machine import device_name


@pytest.mark.parametrize(
    ("text", "model"),
    [("processor\t: 0\nmodel name\t: A: B\nmodel name\t: C\n", "A: B"), ("processor\t: 0\n", platform.machine())],
)
def test_a_cpu_has_the_name_of_its_model_or_of_its_architecture(
    text: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)
    assert device_name(torch.device("cpu")).startswith(f"{model}, ")
