"""What never changes a bit: order, grouping, neighbours, addresses, chunks, grids, and a save and load."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dragon.kernels import launch
from dragon.kernels.config import LaunchConfig
from dragon.vm.torch.optim import SGD, Adam

from .support import BACKENDS, bits, home, numbers, patient

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
backends = st.sampled_from(BACKENDS)
# Misaligned tensors are interpreted element by element, nearly.
fewer = settings(patient, max_examples=max(patient.max_examples // 3, 5))


@dataclass(frozen=True)
class Run:
    """Some steps of some tensors of one dtype with one set of hyperparameters."""

    numels: tuple[int, ...]
    dtype: torch.dtype
    algorithm: type
    options: dict

    def make(self, backend, parts=None, misaligned=False, beside=()):
        """An optimizer of the tensors, in groups of these positions; `beside` are positions of other tensors."""
        parts = [range(len(self.numels))] if parts is None else parts
        params = {i: self.param(i, backend, misaligned) for part in parts for i in part}
        groups = [{"params": [params[i] for i in part]} for part in parts]
        if beside:
            groups[0]["params"][:0] = [self.param(i, backend, False) for i in beside]
        return self.algorithm(groups, backend=backend, **self.options), params

    def param(self, index, backend, misaligned):
        return torch.nn.Parameter(place(self.values(index), home(backend), misaligned))

    def values(self, index, step=0):
        """The numbers of a parameter, or of its gradient at a step from 1."""
        return numbers(100 * step + index, self.numels[index % len(self.numels)], dtype=self.dtype)

    def step(self, optimizer, params, numbers_of_steps, misaligned=False):
        others = {id(param) for param in params.values()}
        for number in numbers_of_steps:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if id(param) not in others:
                        param.grad = torch.ones_like(param)
            for index, param in params.items():
                # Now and then a parameter has no gradient.
                has_grad = (index + number) % 4 != 3
                grad = place(self.values(index, number), param.device, misaligned)
                param.grad = grad if has_grad else None
            optimizer.step()

    def result(self, backend, *, misaligned=False, **arrangement):
        """Bits of each tensor and its states after three steps, in the order of the positions."""
        optimizer, params = self.make(backend, misaligned=misaligned, **arrangement)
        self.step(optimizer, params, range(1, 4), misaligned)
        return outcome(optimizer, params)


def place(values, device, misaligned):
    """A copy at a multiple of 16 bytes, or one element past one."""
    buffer = torch.empty(values.numel() + 16, dtype=values.dtype, device=device)
    first = (-buffer.data_ptr() % 16) // values.element_size() + int(misaligned)
    return buffer[first : first + values.numel()].copy_(values)


def outcome(optimizer, params):
    found = []
    for index in sorted(params):
        state = optimizer.state.get(params[index], {})
        found.append((bits(params[index]), {key: bits(value) for key, value in sorted(state.items())}))
    return found


adam_options = st.fixed_dictionaries(
    {"lr": st.sampled_from([1e-3, 0.1])},
    optional={
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.5, 0.9999)]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
        "epsilon_hat": st.booleans(),
        "clip_value": st.just(0.5),
        "clip_norm": st.just(0.5),
        "ema_decay": st.just(0.9),
    },
)
sgd_options = st.fixed_dictionaries(
    {"lr": st.sampled_from([1e-3, 0.1])},
    optional={"momentum": st.sampled_from([0.0, 0.9]), "dampening": st.just(0.5), "weight_decay": st.just(0.1)},
)
numels = st.lists(st.sampled_from([0, 1, 15, 16, 17, 33, 130, 257]), min_size=1, max_size=4).map(tuple)
runs = st.builds(Run, numels, st.sampled_from(DTYPES), st.just(Adam), adam_options) | st.builds(
    Run, numels, st.sampled_from(DTYPES), st.just(SGD), sgd_options
)


@patient
@given(backends, runs, st.randoms(use_true_random=False))
def test_the_order_of_parameters_does_not_matter(backend, run, random):
    order = list(range(len(run.numels)))
    random.shuffle(order)
    assert run.result(backend, parts=[order]) == run.result(backend)


@patient
@given(backends, runs, st.data())
def test_groups_of_equal_hyperparameters_may_be_split_or_merged(backend, run, data):
    cut = data.draw(st.integers(0, len(run.numels)))
    every = list(range(len(run.numels)))
    assert run.result(backend, parts=[every[:cut], every[cut:]]) == run.result(backend)


@patient
@given(backends, runs, st.data())
def test_a_tensor_more_or_less_beside_it_does_not_matter(backend, run, data):
    beside = data.draw(st.lists(st.integers(4, 7), min_size=1, max_size=2, unique=True))
    assert run.result(backend, beside=beside) == run.result(backend)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tensors_beside_it_do_not_matter(backend, options):
    """They take all rows of the program that advances the first ones."""
    run = Run((17,), torch.float32, Adam, options)
    n_rows = launch.advance_constants("adam", 0, bool(options))["ROWS"]
    assert run.result(backend, beside=range(1, 1 + n_rows)) == run.result(backend)


@fewer
@given(backends, runs)
def test_misaligned_addresses_do_not_matter(backend, run):
    assert run.result(backend, misaligned=True) == run.result(backend)


def saved(found, run):
    """What a state dict holds of an outcome: PyTorch's SGD has no counts, so ours knows but whether one is 0."""
    if run.algorithm is Adam:
        return found
    return [(param, {key: value for key, value in state.items() if key != "step"}) for param, state in found]


@patient
@given(backends, runs, st.integers(1, 2))
def test_a_run_goes_on_from_its_state_dict_bit_by_bit(backend, run, before):
    optimizer, params = run.make(backend)
    run.step(optimizer, params, range(1, before + 1))
    resumed, again = run.make(backend)
    for index, param in params.items():
        again[index].data.copy_(param.data)
    resumed.load_state_dict(optimizer.state_dict())
    run.step(resumed, again, range(before + 1, 4))
    assert saved(outcome(resumed, again), run) == saved(run.result(backend), run)


configs = st.sampled_from(
    [
        LaunchConfig(chunk=128),
        LaunchConfig(chunk=64, n_warps=1, n_stages=2),
        LaunchConfig(chunk=2048, n_warps=8),
        LaunchConfig(chunk=128, programs_per_processor=2),
    ]
)


@fewer
@given(configs, runs)
def test_chunk_size_and_grid_do_not_matter(config, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dragon.vm.torch.optim._backends.launches.config_for", lambda *_: config)
        other = run.result("triton")
    assert other == run.result("triton")
