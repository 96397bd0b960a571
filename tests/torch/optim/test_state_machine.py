"""Ours and PyTorch's Adam side by side through random interleavings of what training scripts do.

After each step ours is judged from its own start, and PyTorch's is set to where ours is, so that differences of
rounding neither grow nor hide a difference of behaviour: which parameters moved, what is saved, what is counted.
"""

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

from dragon.vm.torch.optim import Adam, AdamW

from .judging import judged_step, params_of, place, same_bits

PAIRS = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}
SHAPES = [(3,), (2, 3), (), (0,), (17,), (4, 5), (2, 1, 4)]
RATES = st.sampled_from([0.0, 1e-3, 0.1])
BETAS = st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.95, 0.9999)])
MISSING = st.just(set()) | st.sets(st.integers(0, 3), max_size=2)
SEEDS = st.integers(0, 2**32)


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class SideBySide(RuleBasedStateMachine):
    """The twins hold parameters of their own, equal at all times."""

    backend: str | None = None
    device = torch.device("cpu")

    @initialize(
        make=st.sampled_from([Adam, AdamW]),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
        options=st.fixed_dictionaries(
            {"lr": RATES, "betas": BETAS},
            optional={
                "weight_decay": st.sampled_from([0.0, 0.1]),
                "amsgrad": st.booleans(),
                "maximize": st.booleans(),
                "eps": st.sampled_from([1e-8, 1e-3]),
            },
        ),
        named=st.booleans(),
        seed=SEEDS,
    )
    def start(self, make: Any, shapes: list[Any], options: dict[str, Any], named: bool, seed: int) -> None:
        self.make = make
        self.named = named
        self.n_named = 0
        values = [randn(shape, seed + i) for i, shape in enumerate(shapes)]
        self.ours: Any = make(
            self.name([self.new(v) for v in values]), epsilon_hat=False, backend=self.backend, **options
        )
        self.n_named = 0
        self.theirs: Any = PAIRS[make](self.name([self.new(v) for v in values]), **options)

    def new(self, value: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.clone().to(self.device))

    def name(self, params: list[Any]) -> list[Any]:
        if not self.named:
            return params
        self.n_named += len(params)
        return [(f"p{self.n_named}.{i}", param) for i, param in enumerate(params)]

    def twins(self) -> list[Any]:
        return [self.ours, self.theirs]

    def each(self, index: int) -> list[torch.Tensor]:
        """One parameter of ours and its twin."""
        return [params_of(optimizer)[index % len(params_of(optimizer))] for optimizer in self.twins()]

    @rule(missing=MISSING, seed=SEEDS)
    def backward(self, missing: set[int], seed: int) -> None:
        """Accumulate gradients of a loss that some parameters take no part in."""
        for optimizer in self.twins():
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for i, param in enumerate(params_of(optimizer)):
                if i not in missing and param.requires_grad:
                    slope = randn(tuple(param.shape), seed + i, torch.float64).to(self.device)
                    total = total + (param.double() * slope).sum()
            if total.requires_grad:
                total.backward()

    @rule(missing=MISSING, seed=SEEDS)
    def train(self, missing: set[int], seed: int) -> None:
        self.backward(missing, seed)
        self.step()

    @rule()
    def step(self) -> None:
        before = [param.detach().clone() for param in params_of(self.ours)]
        judged_step(self.ours)
        self.theirs.step()
        for old, mine, their in zip(before, params_of(self.ours), params_of(self.theirs), strict=True):
            if not torch.equal(old, mine.detach()):
                assert their.grad is not None
        self.compare_structure()
        self.follow()

    def follow(self) -> None:
        """Set PyTorch's parameters and states to ours."""
        with torch.no_grad():
            for mine, their in zip(params_of(self.ours), params_of(self.theirs), strict=True):
                their.copy_(mine)
                for key, value in self.ours.state.get(mine, {}).items():
                    self.theirs.state[their][key].copy_(value)

    def compare_structure(self) -> None:
        ours, theirs = self.ours.state_dict(), self.theirs.state_dict()
        assert ours["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            mine = ours["state"][key]
            assert mine.keys() == state.keys()
            assert float(mine["step"]) == float(state["step"])
            for name, value in state.items():
                assert (mine[name].shape, mine[name].dtype) == (value.shape, value.dtype), name

    @invariant()
    def groups_are_equal(self) -> None:
        if not hasattr(self, "ours"):
            return
        pairs = zip(self.ours.state_dict()["param_groups"], self.theirs.state_dict()["param_groups"], strict=True)
        for mine, their in pairs:
            assert {name: mine[name] for name in their} == their

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for optimizer in self.twins():
            optimizer.zero_grad(set_to_none=set_to_none)

    @rule(
        group=st.integers(0, 3), lr=RATES, betas=BETAS, decay=st.sampled_from([0.0, 0.01]), maximize=st.booleans()
    )
    def change_hyperparameters(self, group: int, lr: float, betas: Any, decay: float, maximize: bool) -> None:
        for optimizer in self.twins():
            chosen = optimizer.param_groups[group % len(optimizer.param_groups)]
            chosen.update(lr=lr, betas=betas, weight_decay=decay, maximize=maximize)

    @rule(as_tensor=st.booleans(), lr=RATES)
    def set_the_rate_as_a_scheduler_does(self, as_tensor: bool, lr: float) -> None:
        for optimizer in self.twins():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(lr)
                else:
                    # PyTorch's refuses a tensor on another device than its parameters; foreach wants a number.
                    group["lr"] = torch.tensor(lr) if as_tensor and self.device.type == "cpu" else lr

    @precondition(lambda self: len(self.ours.param_groups) < 4)
    @rule(
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2),
        own=st.fixed_dictionaries({}, optional={"lr": RATES, "amsgrad": st.booleans()}),
        seed=SEEDS,
    )
    def add_param_group(self, shapes: list[Any], own: dict[str, Any], seed: int) -> None:
        n_named = self.n_named
        for optimizer in self.twins():
            self.n_named = n_named
            params = [self.new(randn(shape, seed + i)) for i, shape in enumerate(shapes)]
            optimizer.add_param_group({"params": self.name(params), **own})

    @rule(index=st.integers(0, 7))
    def freeze_or_thaw(self, index: int) -> None:
        for param in self.each(index):
            param.requires_grad_(not param.requires_grad)

    @rule(index=st.integers(0, 7), seed=SEEDS, transposed=st.booleans())
    def swap_data(self, index: int, seed: int, transposed: bool) -> None:
        """Replace the memory of a parameter, perhaps by one laid out in another order."""
        for param in self.each(index):
            value = randn(tuple(param.shape), seed, param.dtype).to(self.device)
            if transposed and value.dim() > 1:
                value = value.mT.contiguous().mT
            param.data = value

    @rule(index=st.integers(0, 7), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def move_to_dtype(self, index: int, dtype: torch.dtype) -> None:
        """What `model.to(dtype)` does to a parameter; the state follows when it is saved and loaded."""
        for optimizer, param in zip(self.twins(), self.each(index), strict=True):
            param.data = param.data.to(dtype)
            param.grad = None
            state = optimizer.state.get(param, {})
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(dtype)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "save"]))
    def go_on_with_a_copy(self, how: str) -> None:
        before = [param.detach().clone() for param in params_of(self.ours)], copy.deepcopy(self.ours.state_dict())
        grads = [[param.grad for param in params_of(optimizer)] for optimizer in self.twins()]
        if how == "deepcopy":
            self.ours, self.theirs = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)
        elif how == "pickle":
            self.ours, self.theirs = pickle.loads(pickle.dumps(self.ours)), pickle.loads(pickle.dumps(self.theirs))
        else:
            file = io.BytesIO()
            torch.save(self.ours.state_dict(), file)
            file.seek(0)
            self.ours.load_state_dict(torch.load(file, weights_only=True))
        for optimizer, kept in zip(self.twins(), grads, strict=True):
            for param, grad in zip(params_of(optimizer), kept, strict=True):
                param.grad = None if grad is None else grad.clone()
        after = [param.detach().clone() for param in params_of(self.ours)], self.ours.state_dict()
        assert same_bits(after, before)

    @rule(to_ours=st.booleans())
    def load_from_the_other(self, to_ours: bool) -> None:
        if to_ours:
            self.ours.load_state_dict(self.theirs.state_dict())
        else:
            self.theirs.load_state_dict(copy.deepcopy(self.ours.state_dict()))

    @rule()
    def fail_to_load(self) -> None:
        saved = copy.deepcopy(self.ours.state_dict())
        shaped = [state for state in saved["state"].values() if "exp_avg" in state]
        for state in shaped:
            state["exp_avg"] = torch.zeros(9, 9)
        for group in saved["param_groups"]:
            group["lr"] = 9.0
        if shaped:
            with pytest.raises(ValueError, match="exp_avg of shape"):
                self.ours.load_state_dict(saved)

    @rule(behind=st.booleans(), lr=RATES)
    def load_within_a_load(self, behind: bool, lr: float) -> None:
        for optimizer in self.twins():
            outer, inner = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
            for group in inner["param_groups"]:
                group["lr"] = lr
            nested = [inner]

            def hook(within: Any, *_: Any, nested: list[Any] = nested) -> None:
                if nested:
                    within.load_state_dict(nested.pop())

            when = "post" if behind else "pre"
            handle = getattr(optimizer, f"register_load_state_dict_{when}_hook")(hook)
            optimizer.load_state_dict(outer)
            handle.remove()

    @rule(where=st.sampled_from(["closure", "hook"]))
    def fail_before_a_step(self, where: str) -> None:
        def fail(*_: Any) -> Any:
            raise OSError

        for optimizer in self.twins():
            handle = optimizer.register_step_pre_hook(fail) if where == "hook" else None
            with pytest.raises(OSError):  # noqa: PT011  # it has no text
                optimizer.step(fail)
            if handle is not None:
                handle.remove()

    @rule(index=st.integers(0, 7), keeps_state=st.booleans())
    def replace_a_parameter(self, index: int, keeps_state: bool) -> None:
        for optimizer, param in zip(self.twins(), self.each(index), strict=True):
            new = self.new(param.detach()).requires_grad_(param.requires_grad)
            state = optimizer.state.pop(param, None)
            if keeps_state and state is not None:
                optimizer.state[new] = state
            for group in optimizer.param_groups:
                group["params"] = [new if each is param else each for each in group["params"]]

    @precondition(lambda self: len(self.ours.param_groups) > 1)
    @rule(index=st.integers(0, 3))
    def take_a_group_out(self, index: int) -> None:
        for optimizer in self.twins():
            group = optimizer.param_groups.pop(index % len(optimizer.param_groups))
            for param in group["params"]:
                optimizer.state.pop(param, None)

    @rule()
    def take_over_from_torch(self) -> None:
        twin = copy.deepcopy(self.theirs)
        grads = [param.grad for param in params_of(self.theirs)]
        self.ours = self.make.from_torch(twin, backend=self.backend)
        for param, grad in zip(params_of(self.ours), grads, strict=True):
            param.grad = None if grad is None else grad.clone()


# Runs for each example of other tests; fewest where kernels are interpreted.
SHARES = {None: 2, "native": 1, "eager": 1, "triton": 0.3}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout:UserWarning")
@pytest.mark.parametrize("backend", SHARES)
def test_ours_behaves_as_pytorchs_through_any_interleaving(backend: str | None, device: torch.device) -> None:
    machine = type("SideBySide", (SideBySide,), {"backend": backend, "device": place(backend, device)})
    runs = max(int(settings().max_examples * SHARES[backend]), 1)
    run_state_machine_as_test(machine, settings=settings(max_examples=runs, stateful_step_count=30))
