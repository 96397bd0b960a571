"""The faster interpreter of the tests computes what triton's does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import interpreted_steps


@pytest.mark.usefixtures("interpreted")
def test_steps_have_the_bits_of_tritons_own_interpreter() -> None:
    script = Path(interpreted_steps.__file__)
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert interpreted_steps.digest() == done.stdout.strip()
