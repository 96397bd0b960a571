"""The picture shows the times of a result and its distance from the roof."""

from pathlib import Path

import pytest

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning.plot import best_times, copy_speed, plot, roofline_point
from dragon.vm.tuning.record import Trial

from .support import record, summary


def test_a_cell_of_the_heat_map_is_the_fastest_of_its_shape() -> None:
    shape, hinted, other = LaunchConfig(), LaunchConfig(eviction="evict_first"), LaunchConfig(chunk=2048)
    trials = (
        Trial(shape, "default", summary(3.0)),
        Trial(hinted, "winner", summary(2.0)),
        Trial(other, "slower", summary(5.0)),
        Trial(LaunchConfig(chunk=8192), "spills 8 bytes a thread"),
    )
    assert best_times(record(trials=trials)) == {(1024, 4): 2.0, (2048, 4): 5.0}


def test_a_point_lies_under_the_roof_by_its_share_of_copy() -> None:
    shown = record()
    assert shown.times is not None
    intensity, speed = roofline_point(shown, shown.times)
    assert intensity == pytest.approx(18 / 28)
    assert speed / (intensity * copy_speed(shown.times)) == pytest.approx(shown.times.share_of_copy)


def test_only_measurements_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no measured result"):
        plot([record(basis="estimated", device="", times=None)], tmp_path / "picture.png")
    plot([record(), record(size="large")], tmp_path / "folder" / "picture.svg")
    assert "<svg" in (tmp_path / "folder" / "picture.svg").read_text(encoding="utf-8")
