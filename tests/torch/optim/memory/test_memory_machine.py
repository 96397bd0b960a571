"""The three backends side by side in every memory mode, through random interleavings of what scripts do."""

import copy
import io
import pickle
from typing import Any

import pytest
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

from dragon.vm.torch.optim import AdamW

from ..judging import params_of, same_bits
from .modes import MODES

# In 8 bits where the mode says so, and with tails.
SHAPES = ((64, 64), (37,), (3, 5, 7))
SEEDS = st.integers(0, 2**32)
MISSING = st.just(set()) | st.sets(st.integers(0, 3), max_size=2)
OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"flatten": True}, {"max_grad_norm": 1e9}, {"ema_decay": 0.9}, {"amsgrad": True},
    {"native_state_dict": True}, {"amsgrad": True, "ema_decay": 0.5, "native_state_dict": True},
)  # fmt: skip
CHANGES = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.0, 1e-3, 0.1])},
    optional={
        "betas": st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.95, 0.9999)]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "clip_value": st.sampled_from([0.0, 0.01]),
    },
)
# A 16-bit parameter's modes know each other's masters.
OTHERS = {
    torch.float32: ["bf16 states", "8bit", "bf16 states to nearest"],
    torch.bfloat16: ["split16, bf16 states", "split8, 8bit", "fp32 masters, 8bit", "bf16 stochastic, 8bit"],
    torch.float16: ["fp32 masters of fp16"],
}


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers of a size that depends on the seed, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator) * 10.0 ** (seed % 7 - 4)
    return (value * (torch.rand(shape, generator=generator) < 0.9)).to(dtype)


class Modes(RuleBasedStateMachine):
    """Optimizers that are equal bit by bit at all times, on parameters of their own."""

    backends: tuple[str, ...] = ("eager", "native")

    @initialize(mode=st.sampled_from(sorted(MODES)), options=st.sampled_from(OPTIONS), seed=SEEDS)
    def start(self, mode: str, options: dict[str, Any], seed: int) -> None:
        if "triton" in self.backends and self.is_plain(MODES[mode][1]):
            mode = "bf16 states"
        self.dtype, own = MODES[mode]
        self.options = {"lr": 1e-2, "skip_nonfinite": True, **own, **options}
        self.optimizers, self.is_written = [], False
        for backend in self.backends:
            params = [torch.nn.Parameter(drawn(shape, seed, self.dtype)) for shape in SHAPES]
            # Without a mode of its own a tensor is PyTorch's, which rounds otherwise than the kernels.
            mine = "eager" if backend == "native" and self.is_plain(own) else backend
            self.optimizers.append(AdamW(params, backend=mine, **self.options))
        self.train(set(), seed, False)

    def is_plain(self, own: dict[str, Any]) -> bool:
        """Whether some tensor has fp32 states and no rounding."""
        return (own.get("state_dtype") == "8bit" and "master_weights" not in own) or "exp_avg" in str(own)

    def parameters(self) -> Any:
        return zip(*map(params_of, self.optimizers), strict=True)

    @rule(missing=MISSING, seed=SEEDS)
    def give_gradients(self, missing: set[int], seed: int) -> None:
        for i, twins in enumerate(self.parameters()):
            for param in twins:
                param.grad = None if i in missing else drawn(tuple(param.shape), seed + i, param.dtype)

    @rule(missing=MISSING, seed=SEEDS, zero_grad=st.booleans())
    def train(self, missing: set[int], seed: int, zero_grad: bool) -> None:
        self.give_gradients(missing, seed)
        for optimizer in self.optimizers:
            optimizer.step(zero_grad=zero_grad)

    @rule()
    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    @rule(seed=SEEDS, index=st.integers(0, 3), bad=st.sampled_from([torch.inf, torch.nan]))
    def skip(self, seed: int, index: int, bad: float) -> None:
        """A step with a non-finite gradient changes no code, scale, remainder or counter."""
        # Sums of parameters that joined are steps of theirs.
        self.step()
        self.give_gradients(set(), seed)
        if self.is_written:
            # A step notices writes, also if it is skipped.
            for optimizer in self.optimizers:
                optimizer.resync_master()
        self.is_written = False
        for param in (param for twins in self.parameters() for param in twins):
            # A first step makes states, skipped or not.
            if not any(optimizer.state.get(param) for optimizer in self.optimizers):
                param.grad = None
        before = copy.deepcopy(list(map(self.everything, self.optimizers)))
        for optimizer in self.optimizers:
            params = [param for param in params_of(optimizer) if optimizer.state.get(param)]
            params[index % len(params)].grad.view(-1)[-1] = bad
            n_skipped = optimizer.n_skipped_steps
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.n_skipped_steps == n_skipped + 1
        assert same_bits(list(map(self.everything, self.optimizers)), before)

    @rule(seed=SEEDS)
    def sum_up(self, seed: int) -> None:
        self.give_gradients(set(), seed)
        for optimizer in self.optimizers:
            optimizer.sum_grad()

    @rule(change=CHANGES, group=st.integers(0, 3))
    def change(self, change: dict[str, Any], group: int) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[group % len(optimizer.param_groups)].update(change)

    @precondition(lambda self: len(params_of(self.optimizers[0])) < 5)
    @rule(shape=st.sampled_from(SHAPES), seed=SEEDS, amsgrad=st.booleans())
    def add_param_group(self, shape: tuple[int, ...], seed: int, amsgrad: bool) -> None:
        for optimizer in self.optimizers:
            param = torch.nn.Parameter(drawn(shape, seed, self.dtype))
            optimizer.add_param_group({"params": [param], "amsgrad": amsgrad})

    @rule(index=st.integers(0, 4), factor=st.sampled_from([0.5, -1.0, 3.0]))
    def write(self, index: int, factor: float) -> None:
        """A parameter that somebody wrote to is its own master."""
        self.is_written = True
        for optimizer in self.optimizers:
            params = params_of(optimizer)
            with torch.no_grad():
                params[index % len(params)].mul_(factor)

    @rule()
    def evaluate(self) -> None:
        for optimizer in self.optimizers:
            if any("ema" in state for state in optimizer.state.values()):
                with optimizer.swap_ema():
                    optimizer.state_dict()

    @rule(how=st.sampled_from(["deepcopy", "pickle", "load", "fresh"]))
    def go_on_with_a_copy(self, how: str) -> None:
        """It has the same bits, and so have the states that are saved of it."""
        for i, optimizer in enumerate(self.optimizers):
            optimizer._settle_masters()
            before = copy.deepcopy(self.everything(optimizer))
            grads = [param.grad for param in params_of(optimizer)]
            self.optimizers[i] = self.copied(optimizer, how)
            for param, grad in zip(params_of(self.optimizers[i]), grads, strict=True):
                param.grad = None if grad is None else grad.clone()
            assert same_bits(self.everything(self.optimizers[i]), before)

    def copied(self, optimizer: Any, how: str) -> Any:
        if how == "deepcopy":
            return copy.deepcopy(optimizer)
        if how == "pickle":
            return pickle.loads(pickle.dumps(optimizer))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if how == "fresh":
            groups = [dict(group) for group in optimizer.param_groups]
            options = {**self.options, "backend": optimizer.defaults["backend"]}
            optimizer = AdamW(groups, **options)
        optimizer.load_state_dict(saved)
        return optimizer

    @rule(data=st.data())
    def go_on_in_another_mode(self, data: st.DataObject) -> None:
        others = OTHERS[self.dtype]
        if "triton" in self.backends:
            others = [other for other in others if not self.is_plain(MODES[other][1])]
        mode = data.draw(st.sampled_from(others))
        _, own = MODES[mode]
        kept = {key: value for key, value in self.options.items() if key not in MODES_OPTIONS}
        self.options = {**kept, **own}
        if self.options.get("flatten"):
            del self.options["flatten"]
        for i, optimizer in enumerate(self.optimizers):
            saved = copy.deepcopy(optimizer.state_dict())
            groups = [
                {key: value for key, value in group.items() if key not in MODES_OPTIONS}
                for group in optimizer.param_groups
            ]
            backend = (
                ("eager" if self.is_plain(own) else "native") if self.backends[i] == "native" else self.backends[i]
            )
            self.optimizers[i] = AdamW(groups, backend=backend, **self.options)
            self.optimizers[i].load_state_dict(saved)
        self.train(set(), data.draw(SEEDS), False)

    def everything(self, optimizer: Any) -> list[Any]:
        """Parameters and states, but for numbers that a dict does not hold as long as nothing was rounded anew."""
        params = params_of(optimizer)
        states = [
            {key: value for key, value in optimizer.state.get(param, {}).items() if key != "stream"}
            for param in params
        ]
        return [[param.detach() for param in params], states]

    @invariant()
    def all_are_equal(self) -> None:
        if hasattr(self, "optimizers"):
            first, *others = map(self.everything, self.optimizers)
            for other in others:
                assert same_bits(first, other)


MODES_OPTIONS = ("state_dtype", "stochastic_rounding", "master_weights", "bound_betas")
# Runs for each example of other tests; fewest where kernels are interpreted.
SHARES = {("eager", "native"): 0.4, ("eager", "triton"): 0.04}


@pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")
@pytest.mark.parametrize("backends", SHARES, ids=str)
def test_backends_agree_through_any_interleaving(backends: tuple[str, ...]) -> None:
    machine = type("Modes", (Modes,), {"backends": backends})
    runs = max(int(settings().max_examples * SHARES[backends]), 1)
    n_steps = 6 if "triton" in backends else 12
    run_state_machine_as_test(machine, settings=settings(max_examples=runs, stateful_step_count=n_steps))
