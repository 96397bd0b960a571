"""Find the fastest configuration in a given time: successive halving over interleaved repetitions.

It calls neither torch nor a clock: both are passed in, so that the whole search runs in a test in no time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median, quantiles
from typing import NamedTuple, Protocol

from dragon.kernels.config import LaunchConfig
from dragon.vm._words import counted
from dragon.vm.tuning.candidates import refinements

# Repetitions of the first round of halving; each round of half the candidates has twice as many.
FIRST_REPETITIONS = 3

# Shapes that are refined, and rivals that meet the default in the final.
N_REFINED, N_FINALISTS = 3, 3

# Repetitions of the final. None of them has chosen a finalist, so none favours it.
FINAL_REPETITIONS = 41

# Shares of the time after which the shapes, and all candidates, are decided; of each, the share for checks.
SHAPES_END, REFINEMENTS_END, CHECK_SHARE = 0.4, 0.75, 0.8

# Standard errors by which a gain must exceed zero: one in a thousand of equals passes by chance.
CONFIDENCE = 3.0

# A smaller gain is not worth another configuration than the default.
SMALLEST_GAIN = 0.01

# Fewer pairs than this decide nothing.
FEWEST_PAIRS = 9

# Of a normal distribution, in standard deviations: between the 20th and 80th percentile, and the standard error of
# a median of n values times the square root of n.
_SPREAD, _MEDIAN_ERROR = 1.683, 1.2533


class Gain(NamedTuple):
    """How much faster one configuration is than another, as a share of the other's time.

    Attributes:
        gain: the median over pairs; negative if it is slower.
        noise: what a gain of equals stays below; 1 for too few pairs.
    """

    gain: float
    noise: float

    @property
    def is_real(self) -> bool:
        """Whether the gain exceeds the noise, and is worth it."""
        return self.gain > max(self.noise, SMALLEST_GAIN)


def compare(pairs: Sequence[tuple[float, float]]) -> Gain:
    """The gain of the second over the first, from times taken next to each other.

    Pairs, so that a clock that drifts takes both along; percentiles, so that a single outlier is none.
    """
    gains = [1 - second / first for first, second in pairs]
    if len(gains) < FEWEST_PAIRS:
        return Gain(median(gains or [0.0]), 1.0)
    fifths = quantiles(gains, n=5, method="inclusive")
    sigma = (fifths[3] - fifths[0]) / _SPREAD
    return Gain(median(gains), CONFIDENCE * _MEDIAN_ERROR * sigma / math.sqrt(len(gains)))


class Bench(Protocol):
    """A device that can run configurations."""

    def check(self, config: LaunchConfig) -> str | None:
        """Why a configuration's result is wrong; None if it is right."""
        ...

    def time_ms(self, configs: Sequence[LaunchConfig]) -> list[float]:
        """One time of each configuration, taken one after another in this order."""
        ...


@dataclass
class Decision:
    """The outcome of a search.

    Attributes:
        config: the decision; None if the default itself is wrong.
        reason: of the decision.
        outcomes: of each candidate, in words.
        repetitions: the times of every repetition, by configuration.
        finals: the last of them, which are of the final.
    """

    config: LaunchConfig | None = None
    reason: str = ""
    outcomes: dict[LaunchConfig, str] = field(default_factory=dict)
    repetitions: list[dict[LaunchConfig, float]] = field(default_factory=list)
    finals: list[dict[LaunchConfig, float]] = field(default_factory=list)

    def times(self, config: LaunchConfig) -> list[float]:
        """Times of a configuration: those of the final if it took part, else all."""
        final = [times[config] for times in self.finals if config in times]
        return final or [times[config] for times in self.repetitions if config in times]


class Search:
    """One search.

    Args:
        bench: runs configurations.
        default: measured beside every rival; it stays if none is faster by more than the noise.
        clock: seconds.
        limit: when to be done, by the clock.
    """

    def __init__(self, bench: Bench, default: LaunchConfig, clock: Callable[[], float], limit: float) -> None:
        self._bench, self._default, self._clock = bench, default, clock
        self._start, self._limit = clock(), limit
        self._seconds = 0.0  # that a configuration takes in a repetition
        self._order = random.Random(0)
        self._decision = Decision()

    def run(self, shapes: Sequence[LaunchConfig]) -> Decision:
        """Search the shapes, then the refinements of the best of them, then compare with the default."""
        decision = self._decision
        if not self._is_right(self._default):
            decision.reason = f"the default is {decision.outcomes[self._default]}"
            return decision
        decision.config, decision.reason = self._default, "nothing else was measured"
        decision.outcomes[self._default] = "default"
        best = self._halve("shapes", shapes, N_REFINED, SHAPES_END)
        refined = dict.fromkeys(chain(best, *map(refinements, best or [self._default])))
        finalists = self._halve("refinements", list(refined), N_FINALISTS, REFINEMENTS_END)
        n_earlier = len(decision.repetitions)
        for _ in range(FINAL_REPETITIONS if finalists else 0):
            if not self._repeat(finalists, self._limit):
                break
        decision.finals = decision.repetitions[n_earlier:]
        self._decide(finalists)
        return decision

    def _is_right(self, config: LaunchConfig) -> bool:
        if (reason := self._bench.check(config)) is not None:
            self._decision.outcomes[config] = f"wrong: {reason}"
        return reason is None

    def _check(self, configs: Iterable[LaunchConfig], end: float) -> list[LaunchConfig]:
        """Candidates that are right; checking, which is mostly compiling, has most of the time until `end`."""
        limit = self._clock() + CHECK_SHARE * (end - self._clock())
        right, longest, outcomes = [], 0.0, self._decision.outcomes
        for config in configs:
            start = self._clock()
            if config in outcomes:
                # Of an earlier stage; the default is timed beside all.
                right += [config] if outcomes[config].startswith("best") else []
            elif start + longest > limit:
                outcomes[config] = "not reached"
            elif self._is_right(config):
                right.append(config)
            longest = max(longest, self._clock() - start)
        return right

    def _repeat(self, rivals: Sequence[LaunchConfig], limit: float) -> bool:
        """Time each rival and the default once, in random order; False if there is no time left for that."""
        start, configs = self._clock(), [self._default, *rivals]
        if start + self._seconds * len(configs) > limit:
            return False
        self._order.shuffle(configs)
        times = self._bench.time_ms(configs)
        self._decision.repetitions.append(dict(zip(configs, times, strict=True)))
        self._seconds = max(self._seconds, (self._clock() - start) / len(configs))
        return True

    def _relative(self, config: LaunchConfig) -> float:
        """Median time as a share of the default's beside it; infinite without a measurement."""
        repetitions = self._decision.repetitions
        shares = [times[config] / times[self._default] for times in repetitions if config in times]
        return median(shares) if shares else math.inf

    def _halve(self, stage: str, configs: Sequence[LaunchConfig], n_keep: int, share: float) -> list[LaunchConfig]:
        """The best candidates, fastest first; half of them leave after each round."""
        limit = self._start + share * (self._limit - self._start)
        rivals, repetitions = self._check(configs, limit), FIRST_REPETITIONS
        for _ in range(max(math.ceil(math.log2(max(len(rivals), 1) / n_keep)), 1)):
            if not rivals or not all(self._repeat(rivals, limit) for _ in range(repetitions)):
                break
            self._drop(stage, rivals, max(n_keep, math.ceil(len(rivals) / 2)))
            repetitions *= 2
        self._drop(stage, rivals, n_keep)
        return rivals

    def _drop(self, stage: str, rivals: list[LaunchConfig], n_keep: int) -> None:
        """Leave the fastest, fastest first; whatever was never timed goes too."""
        rivals.sort(key=self._relative)
        n_timed = sum(self._relative(rival) < math.inf for rival in rivals)
        outcomes = self._decision.outcomes
        outcomes.update(dict.fromkeys(rivals[:n_keep], f"best {n_keep} of the {stage}"))
        outcomes.update(dict.fromkeys(rivals[n_keep:], f"slower among the {stage}"))
        outcomes.update(dict.fromkeys(rivals[n_timed:], "not reached"))
        del rivals[min(n_keep, n_timed) :]

    def _decide(self, rivals: Sequence[LaunchConfig]) -> None:
        """Choose the fastest finalist if it beats the default by more than the noise."""
        decision, finals = self._decision, self._decision.finals
        if len(finals) < FEWEST_PAIRS:
            if decision.repetitions:
                found = counted(len(finals), "repetition")
                decision.reason = f"the default stays: {found} of the final decided nothing"
            return
        gains = {rival: compare([(times[self._default], times[rival]) for times in finals]) for rival in rivals}
        best = max(rivals, key=lambda rival: gains[rival].gain)
        gain = gains[best]
        against = f"{gain.gain:+.1%} against the default, noise {gain.noise:.1%}, {len(finals)} pairs"
        decision.reason = against if gain.is_real else f"the default stays: best rival {against}"
        if gain.is_real:
            decision.config = best
            decision.outcomes[best] = "winner"
