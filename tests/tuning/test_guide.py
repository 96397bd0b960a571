"""docs/tuning.md says what there is: every option, and numbers only where they are from a file of this project."""

from pathlib import Path

import typer.main

from dragon.vm.cli import app
from dragon.vm.tuning import candidates, ranking, search, statistics
from dragon.vm.tuning.tables import RANKING_HEADINGS

GUIDE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def test_every_option_is_explained() -> None:
    command = typer.main.get_command(app).commands["tune"]
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert options
    assert {option for option in options if f"`{option}" not in GUIDE} == set()


def test_the_rules_of_the_search_are_those_of_the_code() -> None:
    assert (search.FIRST_REPETITIONS, search.N_REFINED, search.N_FINALISTS) == (3, 3, 3)
    assert f"up to {search.FINAL_REPETITIONS} repetitions" in GUIDE
    assert (statistics.SMALLEST_GAIN, statistics.CONFIDENCE, statistics.FEWEST_PAIRS) == (0.01, 3.0, 9)
    assert f"fewer than {ranking.FEWEST_WARPS} warps" in GUIDE


def test_the_table_is_what_the_command_prints() -> None:
    lines = [line for line in GUIDE.splitlines() if line.startswith("| kernel ")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(RANKING_HEADINGS)
    rows = [line for line in GUIDE.splitlines() if " (default)" in line and line.startswith("| ")]
    assert len(rows) >= 6
    described = {candidates.describe(config) for config in candidates.shapes(32)}
    assert {row.split("|")[3].strip().removesuffix(" (default)") for row in rows} <= described
