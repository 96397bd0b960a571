"""One tuning result, and the strict way from and to JSON. A file is data: nothing in it is ever run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dragon.kernels.config import LaunchConfig
from dragon.kernels.launch import Variant
from dragon.vm.tuning._fields import Fields, RecordError

SCHEMA = 1

MEASURED, ESTIMATED = "measured", "estimated"

ALGORITHMS = ("adam", "sgd", "accumulate")
DTYPES = ("float64", "float32", "float16", "bfloat16")
EVICTIONS = ("", "evict_first", "evict_last")


@dataclass(frozen=True)
class Summary:
    """Times of one configuration in milliseconds: median, 20th and 80th percentile, and of how many."""

    median_ms: float
    low_ms: float
    high_ms: float
    n_times: int


@dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Attributes:
        config: the candidate.
        outcome: in words: "winner", "spills 16 bytes a thread", ...
        summary: its times, if it was timed.
    """

    config: LaunchConfig
    outcome: str
    summary: Summary | None = None


@dataclass(frozen=True)
class Times:
    """What a measured decision rests on.

    Attributes:
        best: of the chosen configuration, in the last comparison.
        default: of the default configuration, beside it.
        gain: by which part of the default's time the best rival is faster; the chosen one if a rival won.
        noise: what `gain` had to exceed.
        copy_ms: of a `copy_` that moves as many bytes.
        nbytes: read and written by a launch.
    """

    best: Summary
    default: Summary
    gain: float
    noise: float
    copy_ms: float
    nbytes: int

    @property
    def share_of_copy(self) -> float:
        """Speed as a share of `copy_`'s."""
        return self.copy_ms / self.best.median_ms


@dataclass(frozen=True)
class Record:
    """The configuration of one kernel variant for one device and size, and why it is this one.

    Attributes:
        basis: `MEASURED` or `ESTIMATED`.
        arch: as in "sm_90".
        device: the GPU's name; "" for an estimate, which holds for every device of the architecture.
        variant: which kernel.
        size: a size class, or the fingerprint of a model's shapes.
        case: what the user called it.
        config: the decision.
        reason: of the decision, in words.
        kernel_hash: of the source that was measured.
        versions: of torch and triton.
        date: ISO 8601, UTC.
        finished: False if the search was interrupted.
        times: None for an estimate.
        trials: every candidate.
    """

    basis: str
    arch: str
    device: str
    variant: Variant
    size: str
    case: str
    config: LaunchConfig
    reason: str
    kernel_hash: str
    versions: dict[str, str]
    date: str
    finished: bool = True
    times: Times | None = None
    trials: tuple[Trial, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Plain types, with the schema version and the share of `copy_`."""
        data = asdict(self)
        data["variant"], data["trials"] = self.variant._asdict(), list(data["trials"])
        if self.times is not None:
            data["times"]["share_of_copy"] = self.times.share_of_copy
        return {"schema": SCHEMA, **data}


def dumps(data: Any) -> str:
    """JSON as it is written to files."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def loads(text: str) -> Any:
    """JSON from a file.

    Raises:
        RecordError: if it is none.
    """

    def refuse(name: str) -> None:
        raise RecordError(f"{name} is no number that a result can have")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from None


def check_schema(fields: Fields) -> None:
    """Refuse data of another schema version."""
    schema = fields.integer("schema", 0, 2**31)
    if schema != SCHEMA:
        raise RecordError(f"schema version {schema}, and this release reads {SCHEMA}")


def parse_record(data: Any) -> Record:
    """A record from plain types.

    Raises:
        RecordError: says which field is wrong and how.
    """
    fields = Fields(data)
    check_schema(fields)
    arch, times = fields.text("arch"), fields.optional("times")
    warp_size = 64 if arch.startswith("gfx9") else 32
    basis = fields.choice("basis", (MEASURED, ESTIMATED))
    if (basis == MEASURED) != (times is not None):
        raise RecordError(f"basis is {basis!r}, but times are {'present' if times else 'absent'}")
    return Record(
        basis=basis,
        arch=arch,
        device=fields.text("device", allow_empty=basis == ESTIMATED),
        variant=_parse_variant(fields.inner("variant")),
        size=fields.text("size"),
        case=fields.text("case"),
        config=parse_config(fields.inner("config"), warp_size),
        reason=fields.text("reason"),
        kernel_hash=fields.text("kernel_hash"),
        versions={name: fields.inner("versions").text(name) for name in fields.inner("versions").names()},
        date=fields.text("date"),
        finished=fields.flag("finished"),
        times=None if times is None else _parse_times(times),
        trials=tuple(_parse_trial(trial, warp_size) for trial in fields.items("trials")),
    )


def parse_config(fields: Fields, warp_size: int) -> LaunchConfig:
    """A configuration that a launch can take: a broken one could fail, or be slow, but never be wrong."""
    n_warps = fields.power_of_two("n_warps", 1, 32)
    return LaunchConfig(
        # The misaligned path takes an element a thread: more threads than elements would reach the next chunk.
        chunk=fields.power_of_two("chunk", max(128, warp_size * n_warps), 2**16),
        n_warps=n_warps,
        n_stages=fields.integer("n_stages", 1, 8),
        eviction=fields.choice("eviction", EVICTIONS),
        programs_per_processor=fields.integer("programs_per_processor", 0, 64),
    )


def _parse_variant(fields: Fields) -> Variant:
    return Variant(
        fields.choice("algorithm", ALGORITHMS),
        fields.integer("n_states", 0, 3),
        fields.choice("param_dtype", DTYPES),
        fields.choice("grad_dtype", DTYPES),
        fields.choice("state_dtype", DTYPES),
        average=fields.flag("average"),
        zero_grad=fields.flag("zero_grad"),
    )


def _parse_summary(fields: Fields) -> Summary:
    return Summary(
        fields.number("median_ms", positive=True),
        fields.number("low_ms", positive=True),
        fields.number("high_ms", positive=True),
        fields.integer("n_times", 1, 2**31),
    )


def _parse_times(fields: Fields) -> Times:
    return Times(
        best=_parse_summary(fields.inner("best")),
        default=_parse_summary(fields.inner("default")),
        gain=fields.number("gain"),
        noise=fields.number("noise"),
        copy_ms=fields.number("copy_ms", positive=True),
        nbytes=fields.integer("nbytes", 1, 2**62),
    )


def _parse_trial(fields: Fields, warp_size: int) -> Trial:
    summary = fields.optional("summary")
    return Trial(
        parse_config(fields.inner("config"), warp_size),
        fields.text("outcome"),
        None if summary is None else _parse_summary(summary),
    )
