import re
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import settings

GUIDE = Path(__file__).parents[2] / "docs" / "parity.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def test_the_suite_of_the_guide_is_ten_lines_long():
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 10


@pytest.fixture
def short_profile():
    """Few examples, and a deadline that every test meets only by leaving it out."""
    name = settings.get_current_profile_name()
    settings.register_profile("guide", max_examples=20, deadline=timedelta(microseconds=1))
    settings.load_profile("guide")
    yield
    settings.load_profile(name)


@pytest.mark.usefixtures("short_profile")
def test_every_block_of_the_guide_runs_and_its_tests_pass(tmp_path):
    namespace = {}
    for index, block in enumerate(BLOCKS):
        # A file of its own, for Hypothesis reads the source of a test.
        path = tmp_path / f"block_{index}.py"
        path.write_text(block)
        exec(compile(block, str(path), "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


@pytest.mark.parametrize("name", re.findall(r"`(\w+)\(", GUIDE.read_text()))
def test_every_function_that_the_guide_calls_exists(name):
    import dragon.vm.testing as kit

    assert name in {*kit.__all__, "MyAdam", "state_dict", "settings"}
