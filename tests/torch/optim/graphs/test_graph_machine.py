"""Graphs among other steps: whatever happens between its replays, each is a step like any other."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dragon.vm.torch.optim import SGD, AdamW

from ..judging import params_of, same_bits
from ..recorded import RecordedGraph

SHAPES = ((3, 5), (16,), (), (17,))
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}, {"clip_norm": 0.7}, {"ema_decay": 0.9},
)  # fmt: skip
CHANGES = st.one_of(
    st.fixed_dictionaries({"lr": st.floats(0, 0.5)}),
    st.fixed_dictionaries({"weight_decay": st.sampled_from([0.0, 0.1, 1.0]), "maximize": st.booleans()}),
    st.fixed_dictionaries({"grad_scale": st.floats(0.5, 2)}),
)


def made(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Graphs(RuleBasedStateMachine):
    """One optimizer whose steps are captured, and one that takes each step itself."""

    @initialize(
        kind=st.sampled_from([AdamW, SGD]),
        options=st.sampled_from(OPTIONS),
        flatten=st.booleans(),
        two=st.booleans(),
    )
    def build(self, kind: Any, options: dict[str, Any], flatten: bool, two: bool) -> None:
        self.optimizers = []
        options = {"backend": "triton", "flatten": flatten, "momentum": 0.9, **options}
        if kind is AdamW:
            del options["momentum"]
        for capturable in (True, False):
            params = [torch.nn.Parameter(made(shape, i)) for i, shape in enumerate(SHAPES)]
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}] if two else [{"params": params}]
            self.optimizers.append(kind(groups, lr=0.1, capturable=capturable, **options))
        self.ours, self.twin = self.optimizers
        # Each with the gradients whose memory it reads.
        self.graphs: list[tuple[Any, list[torch.Tensor]]] = []
        self.step([True] * len(SHAPES), 0, True)

    @rule(present=st.lists(st.booleans(), min_size=6, max_size=6), seed=st.integers(0, 99), anew=st.booleans())
    def step(self, present: list[bool], seed: int, anew: bool) -> None:
        for optimizer in self.optimizers:
            for i, (param, has_grad) in enumerate(zip(params_of(optimizer), present, strict=False)):
                if not has_grad:
                    param.grad = None
                elif anew or param.grad is None:
                    param.grad = made(param.shape, seed + i)
                else:
                    param.grad.copy_(made(param.shape, seed + i))
            optimizer.step()

    @precondition(lambda self: len(self.graphs) < 3)
    @rule(seed=st.integers(0, 99))
    def capture(self, seed: int) -> None:
        """After a step with the same parameters, as a first one may not be captured."""
        self.step([True] * 6, seed, True)
        replay = RecordedGraph().capture(self.ours.step)
        self.graphs.append((replay, [param.grad for param in params_of(self.ours)]))

    @precondition(lambda self: self.graphs)
    @rule(index=st.integers(0, 2), seed=st.integers(0, 99), finite=st.booleans())
    def replay(self, index: int, seed: int, finite: bool) -> None:
        run, grads = self.graphs[index % len(self.graphs)]
        for i, grad in enumerate(grads):
            grad.copy_(made(grad.shape, seed + i))
        if not finite:
            grads[1][3] = torch.inf
        for param in params_of(self.twin):
            param.grad = None
        for param, grad in zip(params_of(self.twin), grads, strict=False):
            param.grad = grad.clone()
        run()
        self.twin.step()

    @rule(row=st.integers(0, 2), change=CHANGES, several=st.booleans())
    def change(self, row: int, change: dict[str, Any], several: bool) -> None:
        for optimizer in self.optimizers:
            group = optimizer.param_groups[row % len(optimizer.param_groups)]
            if several:
                group.update(change)
            else:
                for name, value in change.items():
                    group[name] = value

    @precondition(lambda self: len(params_of(self.ours)) < 6)
    @rule(seed=st.integers(0, 99))
    def add_a_group(self, seed: int) -> None:
        """A graph goes on with the parameters it knows."""
        for optimizer in self.optimizers:
            optimizer.add_param_group({"params": [torch.nn.Parameter(made((5,), seed))], "lr": 0.2})

    @invariant()
    def both_are_the_same(self) -> None:
        ours, twins = ([param.detach() for param in params_of(optimizer)] for optimizer in self.optimizers)
        assert same_bits(ours, twins)
        states = [[dict(each.state.get(param, {})) for param in params_of(each)] for each in self.optimizers]
        assert same_bits(*states)


def test_a_replay_is_a_step_through_any_interleaving() -> None:
    runs = max(settings().max_examples // 4, 1)
    run_state_machine_as_test(Graphs, settings=settings(max_examples=runs, stateful_step_count=20))
