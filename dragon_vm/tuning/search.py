"""Find the fastest configuration in a given time: successive halving over interleaved repetitions.

Knows neither torch nor a clock: both are passed in, so that the whole search runs in a test in no time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from dragon.kernels.config import LaunchConfig
from dragon.vm.tuning.candidates import distinct
from dragon.vm.tuning.record import Summary
from dragon.vm.tuning.statistics import FEWEST_PAIRS, Gain, compare, median, quantile

# Repetitions of the first round of halving; each round of half the candidates has twice as many.
FIRST_REPETITIONS = 3

# Shapes that are refined, and rivals that meet the default in the final.
N_REFINED, N_FINALISTS = 3, 3

# Repetitions of the final. None of them has chosen a finalist, so none flatters it.
FINAL_REPETITIONS = 41

# Shares of the time after which the shapes, and all candidates, are decided.
SHAPES_END, REFINEMENTS_END = 0.4, 0.75

# Of a stage's time: a launch is compiled in a second, and timed in milliseconds.
CHECK_SHARE = 0.8

DEFAULT_OUTCOME = "default"
WRONG = "wrong: "
SLOWER = "slower among the "


class Bench(Protocol):
    """What can run a configuration."""

    def check(self, config: LaunchConfig) -> str | None:
        """Why a configuration's result is wrong; None if it is right."""
        ...

    def time_ms(self, configs: Sequence[LaunchConfig]) -> list[float]:
        """One time of each configuration, taken one after another in this order."""
        ...


@dataclass(frozen=True)
class Standing:
    """The state of a search, for a progress bar."""

    stage: str
    n_rivals: int
    done: float
    best: LaunchConfig
    best_ms: float | None


@dataclass
class SearchResult:
    """The outcome of a search.

    Attributes:
        config: the decision; None if the default itself is wrong.
        reason: of the decision.
        gain: of the best finalist over the default.
        outcomes: what became of each candidate.
        repetitions: every repetition's times by configuration.
        finals: those of the final.
        finished: whether the search came to its end, and was not interrupted.
    """

    config: LaunchConfig | None = None
    reason: str = ""
    gain: Gain = field(default_factory=lambda: compare([]))
    outcomes: dict[LaunchConfig, str] = field(default_factory=dict)
    repetitions: list[dict[LaunchConfig, float]] = field(default_factory=list)
    finals: list[dict[LaunchConfig, float]] = field(default_factory=list)
    finished: bool = True

    def summary(self, config: LaunchConfig) -> Summary | None:
        """Times of a configuration: those of the final if it took part, else all."""
        final = [times[config] for times in self.finals if config in times]
        times = final or [times[config] for times in self.repetitions if config in times]
        return Summary(median(times), quantile(times, 0.2), quantile(times, 0.8), len(times)) if times else None


class Search:
    """One search.

    Args:
        bench: runs configurations.
        default: what every rival is measured beside, and what stays if none is faster by more than the noise.
        clock: seconds.
        limit: when to be done, by the clock.
        listener: told of each repetition.
        settled: candidates that an interrupted search had already lost, with their outcomes.
    """

    def __init__(
        self,
        bench: Bench,
        default: LaunchConfig,
        clock: Callable[[], float],
        limit: float,
        listener: Callable[[Standing], None] = lambda standing: None,
        settled: Mapping[LaunchConfig, str] = MappingProxyType({}),
    ) -> None:
        self._bench, self._default, self._clock, self._listener = bench, default, clock, listener
        self._start, self._limit = clock(), limit
        self._settled = settled
        # Seconds that a configuration takes in a repetition.
        self._cost = 0.0
        self._order = random.Random(0)
        self.result = SearchResult(outcomes=dict(settled))

    def run(
        self,
        shapes: Sequence[LaunchConfig],
        refine: Callable[[Sequence[LaunchConfig]], Iterable[LaunchConfig]],
    ) -> SearchResult:
        """Search the shapes, then what `refine` makes of the best of them, then meet the default.

        Ctrl-C ends the search where it is; what is measured counts as far as it goes.
        """
        result = self.result
        try:
            if self._is_right(self._default):
                result.config, result.reason = self._default, "nothing else was measured"
                result.outcomes[self._default] = DEFAULT_OUTCOME
                best = self._halve("shapes", shapes, N_REFINED, SHAPES_END)
                refined = distinct([*best, *refine(best or [self._default])])
                finalists = self._halve("refinements", refined, N_FINALISTS, REFINEMENTS_END)
                self._final(finalists)
            else:
                result.reason = f"the default is wrong: {result.outcomes[self._default]}"
        except KeyboardInterrupt:
            result.finished = False
        if result.config is not None:
            self._decide()
        return result

    def _time_at(self, share: float) -> float:
        return self._start + share * (self._limit - self._start)

    def _is_right(self, config: LaunchConfig) -> bool:
        if (reason := self._bench.check(config)) is not None:
            self.result.outcomes[config] = f"{WRONG}{reason}"
        return reason is None

    def _is_known_wrong(self, config: LaunchConfig) -> bool:
        return self.result.outcomes.get(config, "").startswith(WRONG)

    def _check(self, configs: Iterable[LaunchConfig], end: float) -> list[LaunchConfig]:
        """Candidates that are right; checking, which is mostly compiling, has most of the time until `end`."""
        limit = self._clock() + CHECK_SHARE * (end - self._clock())
        right, longest = [], 0.0
        for config in configs:
            start = self._clock()
            if config == self._default or config in self._settled or self._is_known_wrong(config):
                continue
            if config in self.result.outcomes:
                right.append(config)
            elif start + longest > limit:
                self.result.outcomes[config] = "not reached"
            elif self._is_right(config):
                right.append(config)
            longest = max(longest, self._clock() - start)
        return right

    def _repeat(self, stage: str, rivals: Sequence[LaunchConfig], limit: float) -> bool:
        """Time each rival and the default once, in random order; False if there is no time left for that."""
        start, configs = self._clock(), [self._default, *rivals]
        if start + self._cost * len(configs) > limit:
            return False
        self._order.shuffle(configs)
        times = dict(zip(configs, self._bench.time_ms(configs), strict=True))
        self.result.repetitions.append(times)
        if stage == "final":
            self.result.finals.append(times)
        self._cost = max(self._cost, (self._clock() - start) / len(configs))
        self._tell(stage, rivals)
        return True

    def _tell(self, stage: str, rivals: Sequence[LaunchConfig]) -> None:
        best = min([self._default, *rivals], key=self._relative)
        done = (self._clock() - self._start) / max(self._limit - self._start, 1e-9)
        summary = self.result.summary(best)
        self._listener(
            Standing(stage, len(rivals), min(done, 1.0), best, None if summary is None else summary.median_ms)
        )

    def _relative(self, config: LaunchConfig) -> float:
        """Median time as a share of the default's beside it; infinite for what is not measured."""
        shares = [times[config] / times[self._default] for times in self.result.repetitions if config in times]
        return median(shares) if shares else math.inf

    def _halve(self, stage: str, configs: Sequence[LaunchConfig], n_keep: int, share: float) -> list[LaunchConfig]:
        """The best candidates, fastest first; half of them leave after each round."""
        limit = self._time_at(share)
        rivals, repetitions = self._check(configs, limit), FIRST_REPETITIONS
        n_rounds = max(math.ceil(math.log2(max(len(rivals), 1) / n_keep)), 1)
        for _ in range(n_rounds):
            if not rivals or not all(self._repeat(stage, rivals, limit) for _ in range(repetitions)):
                break
            rivals.sort(key=self._relative)
            self._drop(stage, rivals, max(n_keep, math.ceil(len(rivals) / 2)))
            repetitions *= 2
        rivals.sort(key=self._relative)
        self._drop(stage, rivals, n_keep)
        return [config for config in rivals if self._relative(config) < math.inf]

    def _drop(self, stage: str, rivals: list[LaunchConfig], n_keep: int) -> None:
        for config in rivals[n_keep:]:
            self.result.outcomes[config] = f"{SLOWER}{stage}"
        for config in rivals[:n_keep]:
            self.result.outcomes[config] = f"best {n_keep} of the {stage}"
        del rivals[n_keep:]

    def _final(self, finalists: Sequence[LaunchConfig]) -> None:
        for config in finalists:
            self.result.outcomes[config] = "finalist"
        for _ in range(FINAL_REPETITIONS if finalists else 0):
            if not self._repeat("final", finalists, self._limit):
                break

    def _decide(self) -> None:
        """Choose the fastest finalist if it beats the default by more than the noise."""
        result, finals = self.result, self.result.finals
        if len(finals) < FEWEST_PAIRS:
            if result.repetitions:
                result.reason = f"the default stays: {len(finals)} repetitions of the final decide nothing"
            return
        rivals = [config for config in finals[0] if config != self._default]
        gains = {rival: compare([(times[self._default], times[rival]) for times in finals]) for rival in rivals}
        best = max(rivals, key=lambda rival: gains[rival].gain)
        result.gain = gains[best]
        against = f"{result.gain.gain:+.1%} against the default, noise {result.gain.noise:.1%}"
        if result.gain.is_real:
            result.config, result.reason = best, f"{against}, {len(finals)} pairs"
            result.outcomes[best] = "winner"
        else:
            result.reason = f"the default stays: best rival {against}, {len(finals)} pairs"
