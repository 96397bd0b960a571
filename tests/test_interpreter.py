"""The faster interpreter of the tests computes what triton's does."""

from pathlib import Path

import pytest

from . import interpreted_steps
from .forking import Forking


@pytest.mark.usefixtures("interpreted")
def test_steps_have_the_bits_of_tritons_own_interpreter_with_bools_for_masks(
    forking: Forking, tmp_path: Path
) -> None:
    ended = forking.run(interpreted_steps.__file__, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert interpreted_steps.digest() == ended.out.strip()
