"""What this project set out to reach, held against the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.contenders import TORCH_FUSED, TORCH_HOST
from benchmarks.records import TIMED, Record

OURS_HOST = "ours triton-host"


class Quantity(NamedTuple):
    """Something that a record says: its unit and its value, and whether more of it is better."""

    unit: str
    of: Callable[[Record], float | None]
    more_is_better: bool = True


SPEEDUP = Quantity("times as fast as", lambda record: record.ratio.median if record.ratio else None)
SHARE = Quantity(
    "% of the bandwidth of a copy_", lambda record: 100 * record.share_of_copy if record.share_of_copy else None
)
HOST_US = Quantity(
    "us of the host a step", lambda record: 1000 * record.host_ms.median if record.host_ms else None, False
)


class Target(NamedTuple):
    """A limit on what one record says."""

    case: str
    contender: str
    quantity: Quantity
    limit: float
    device_type: str = "cpu"
    precision: str = "fp32"

    @property
    def text(self) -> str:
        """The target in words."""
        rival = TORCH_HOST if self.contender == OURS_HOST else TORCH_FUSED
        limit = "at least" if self.quantity.more_is_better else "at most"
        return f"{limit} {self.limit:g} {self.quantity.unit}" + (f" {rival}" if self.quantity is SPEEDUP else "")

    def is_met_by(self, value: float) -> bool:
        """Whether a measured value is within the limit."""
        return value >= self.limit if self.quantity.more_is_better else value <= self.limit


# The host's share is 0.35 us a tensor and 60 us.
HOST_LIMIT_US = 1000 * 0.35 + 60

TARGETS = (
    Target("1000 x 1", "ours native", SPEEDUP, 5),
    Target("1000 x 1000", "ours native", SPEEDUP, 2.5),
    Target("1000 x 1000", "ours flatten", SPEEDUP, 20),
    Target("465 groups", "ours native", SPEEDUP, 2),
    Target("465 groups", OURS_HOST, SPEEDUP, 10),
    Target("1 x 20M", "ours native", SPEEDUP, 0.97),
    Target("GPT-2 124M", "ours native", SPEEDUP, 0.97),
    Target("chain, GPT-2 124M", "ours native", SPEEDUP, 1.4),
    Target("chain, GPT-2 124M", "ours flatten", SPEEDUP, 1.4),
    Target("chain, 1000 x 1000", "ours native", SPEEDUP, 3),
    Target("chain, 1000 x 1000", "ours flatten", SPEEDUP, 3),
    Target("1000 x 16", OURS_HOST, HOST_US, HOST_LIMIT_US),
    Target("1000 x 16", OURS_HOST, SPEEDUP, 6),
    Target("1 x 1B", "ours triton", SHARE, 95, "cuda"),
    Target("10000 x 1000", "ours triton", SPEEDUP, 5, "cuda"),
)


class Verdict(NamedTuple):
    """A target with what was measured; None for what is not in the records."""

    target: Target
    value: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether it is reached; None if it was not measured."""
        return None if self.value is None else self.target.is_met_by(self.value)


def verdicts(records: Sequence[Record], device_type: str) -> list[Verdict]:
    """Every target for a type of device, with the value in one device's records."""
    values = {(r.case, r.precision, r.contender): r for r in records if r.status == TIMED}
    found = []
    for target in TARGETS:
        if target.device_type == device_type:
            record = values.get((target.case, target.precision, target.contender))
            found.append(Verdict(target, target.quantity.of(record) if record else None))
    return found


class Rival(NamedTuple):
    """Our default backend beside the fastest of all others, in one case."""

    ours: Record
    other: Record

    @property
    def speedup(self) -> float:
        """How many times as fast as the other ours is, each compared with torch in its own turns."""
        assert self.ours.ratio is not None
        assert self.other.ratio is not None
        return self.ours.ratio.median / self.other.ratio.median


def rivals(records: Sequence[Record], device_type: str) -> list[Rival]:
    """For each case, our default backend and the fastest optimizer that is not ours."""
    default = "ours native" if device_type == "cpu" else "ours triton"
    found = []
    for ours in records:
        if ours.contender == default and ours.ratio is not None:
            others = [
                (record.ratio.median, record)
                for record in records
                if (record.case, record.precision) == (ours.case, ours.precision)
                and record.reference == ours.reference
                and record.ratio is not None
                and not record.contender.startswith(("ours", "bound"))
            ]
            if others:
                found.append(Rival(ours, max(others, key=lambda pair: pair[0])[1]))
    return found
