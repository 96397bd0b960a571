"""Without a GPU: compile the candidates for a named architecture, rank them, and estimate the default's worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import NamedTuple

from dragon.kernels.config import LaunchConfig, default_config
from dragon.kernels.launch import Variant
from dragon.vm.tuning.candidates import distinct, shapes
from dragon.vm.tuning.compiler import Compiler
from dragon.vm.tuning.identity import arch_key, kernel_hash, versions
from dragon.vm.tuning.ranking import Facts, Limits, Ranked, limits_of, rank
from dragon.vm.tuning.record import ESTIMATED, Record
from dragon.vm.tuning.sizes import SIZE_CLASSES


class Ranking(NamedTuple):
    """Candidates of one kernel variant, best first.

    Attributes:
        name: of the variant, in words.
        variant: which kernel.
        default: what is launched without tuning; one of the entries.
        entries: every candidate.
        limits: of the architecture.
    """

    name: str
    variant: Variant
    default: LaunchConfig
    entries: list[Ranked]
    limits: Limits


def rank_variants(
    variants: Mapping[str, Variant],
    arch: str,
    compiler: Compiler,
    is_time_up: Callable[[], bool],
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Iterable[Ranking]:
    """Compile and rank the shapes of each variant; a variant that is not begun in time is left out.

    Args:
        variants: by name.
        arch: as in "sm_90".
        compiler: tells facts.
        is_time_up: asked before each variant.
        progress: told of the name, how many are compiled, and of how many.
    """
    limits, default = limits_of(arch), default_config(arch_key(arch))
    for name, variant in variants.items():
        if is_time_up():
            return
        configs = distinct([default, *shapes(limits.warp_size)])
        facts: dict[LaunchConfig, Facts | str] = {}
        for config, found in compiler.compile(variant, configs, arch):
            facts[config] = found
            progress(name, len(facts), len(configs))
        yield Ranking(name, variant, default, rank(configs, facts, limits), limits)


def estimates(ranking: Ranking, arch: str) -> list[Record]:
    """Estimate each size class: the default, or the best candidate if the compiler is against the default."""
    default = next(entry for entry in ranking.entries if entry.config == ranking.default)
    chosen, against = default, ""
    if default.dropped and ranking.entries[0].dropped is None:
        chosen, against = ranking.entries[0], f"; the default {default.dropped}"
    facts = chosen.facts
    told = chosen.dropped
    if told is None and facts is not None:
        told = f"{facts.registers} registers, no spills, 16-byte accesses"
    return [
        Record(
            basis=ESTIMATED,
            arch=arch,
            device="",
            variant=ranking.variant,
            size=size,
            case=size,
            config=chosen.config,
            reason=f"by the compiler alone: {told}{against}",
            kernel_hash=kernel_hash(ranking.variant.algorithm),
            versions=versions(),
            date=datetime.now(timezone.utc).date().isoformat(),
        )
        for size in SIZE_CLASSES
    ]
