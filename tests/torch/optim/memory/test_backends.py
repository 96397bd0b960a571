"""The three backends agree bit for bit in every mode: in parameters and in all that is kept."""

import copy
import os
from typing import Any

import pytest
import torch

from dragon.kernels.config import LaunchConfig
from dragon.vm.torch.optim import AdamW
from dragon.vm.torch.optim._backends import host, launches
from dragon.vm.torch.optim._plan import preparation

from .modes import MODES, bits, give_gradients, make, train

SMALL = ((64, 64), (65, 64))
# A step of interpreted kernels takes 40 ms.
N_STEPS, N_INTERPRETED_STEPS = (300, 300) if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else (100, 12)

pytestmark = pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")


@pytest.mark.parametrize("mode", MODES)
def test_native_is_eager_for_300_steps_early_and_late_in_a_run(mode: str) -> None:
    runs = make(mode, SMALL, "native"), make(mode, SMALL, "eager")
    for first in (0, 300, 10_000):
        for run in runs:
            for state in run[1].state.values():
                state["step"].fill_(first)
            train(*run, N_STEPS, first)
        assert bits(*runs[0]) == bits(*runs[1])


@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_a_tensor_have_the_bits_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PIECE", 1024)
    ours, theirs = make(mode, ((81, 64),), "native"), make(mode, ((81, 64),), "eager")
    train(*ours, 3)
    train(*theirs, 3)
    assert bits(*ours) == bits(*theirs)


def test_pieces_of_a_shard_have_the_random_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PIECE", 1024)
    # As if other processes held what comes before.
    monkeypatch.setattr(preparation, "first_index", lambda param: 4096)
    runs = [make("bf16 stochastic, bf16 states", ((81, 64),), backend) for backend in ("native", "eager")]
    for run in runs:
        train(*run, 2)
    assert bits(*runs[0]) == bits(*runs[1])


@pytest.mark.parametrize("mode", ["bf16 states", "split8, 8bit"])
@pytest.mark.parametrize("own", [{}, {"clip_norm": 1e-7}, {"lr": 0.1}, {"weight_decay": 0.5}], ids=str)
def test_small_tensors_that_differ_in_what_updates_them_are_updated_apart(own: dict[str, Any], mode: str) -> None:
    runs = [make(mode, ((64, 64),) * 4, backend) for backend in ("native", "eager")]
    for params, optimizer in runs:
        others = torch.nn.Parameter(params[0].detach().clone()), torch.nn.Parameter(params[1].detach().clone())
        optimizer.add_param_group({"params": list(others), **own})
        params += others
        train(params, optimizer, 2)
    assert bits(*runs[0]) == bits(*runs[1])


@pytest.mark.parametrize("mode", MODES)
def test_small_tensors_are_updated_together_with_the_bits_of_each(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a piece holds, of the same count: that of the first and the last two is behind by one."""
    monkeypatch.setattr(host, "PIECE", 8384)
    # What is not stored in 8 bits is updated as without a mode.
    if "8bit" in mode:
        shapes, expected = ((65, 64), (64, 64)) * 4, [1, 2, 2, 1, 2]
    else:
        shapes, expected = ((3, 5, 7), (), (64,), (0,), (65, 64), (64, 64), (192,), (64, 64)), [1, 5, 2]
    pieces: list[int] = []
    updated = host.HostGroup._updated

    def counted(self: host.HostGroup, piece: host.Piece, *arguments: Any) -> Any:
        if self._piece:
            pieces.append(len(piece.spans))
        return updated(self, piece, *arguments)

    monkeypatch.setattr(host.HostGroup, "_updated", counted)
    runs = [make(mode, shapes, backend, max_grad_norm=1.0) for backend in ("native", "eager")]
    for step, chosen in enumerate([range(8), range(8), range(1, 6), range(8), range(8)]):
        for params, optimizer in runs:
            give_gradients(params, step)
            for index in {*range(8)} - {*chosen}:
                params[index].grad = None
            optimizer.step()
        assert bits(*runs[0]) == bits(*runs[1])
    pieces.clear()
    runs[0][1].step()
    assert pieces == expected


@pytest.mark.parametrize("mode", MODES)
def test_triton_is_eager(mode: str) -> None:
    shapes = ((64, 64), (17, 256))
    ours, theirs = make(mode, shapes, "triton"), make(mode, shapes, "eager")
    for first in range(0, N_INTERPRETED_STEPS, 4):
        train(*ours, 4, first)
        train(*theirs, 4, first)
        assert bits(*ours) == bits(*theirs)


@pytest.mark.parametrize("mode", [name for name in MODES if "8bit" not in name])
def test_triton_is_eager_for_tails_and_misaligned_tensors(mode: str) -> None:
    """37 elements are two vectors and five more; the second gradient starts within a vector."""
    found = []
    for backend in ("triton", "eager"):
        params, optimizer = make(mode, ((37,), (3, 5, 7)), backend)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                value = torch.randn(param.numel() + 1, generator=generator).to(param.dtype)
                param.grad = value[1:].view(param.shape) if param.ndim > 1 else value[:-1].clone()
            optimizer.step()
        found.append(bits(params, optimizer))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", ["8bit", "bf16 stochastic, bf16 states", "split8, 8bit, amsgrad, average"])
@pytest.mark.parametrize(
    "config",
    [
        LaunchConfig(chunk=256, n_warps=1),
        LaunchConfig(chunk=2048, n_warps=8, eviction="evict_first"),
        LaunchConfig(chunk=512, n_warps=2, programs_per_processor=2),
    ],
    ids=str,
)
def test_no_launch_configuration_changes_a_bit(
    mode: str, config: LaunchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "config_for", lambda *_: config)
    ours, theirs = (make(mode, ((17, 256),), backend) for backend in ("triton", "eager"))
    train(*ours, 2)
    train(*theirs, 2)
    assert bits(*ours) == bits(*theirs)


def test_blocks_with_misaligned_gradients() -> None:
    found = []
    for backend in ("triton", "eager"):
        params, optimizer = make("split8, 8bit", ((64, 64),), backend)
        for step in range(3):
            value = torch.randn(64 * 64 + 1, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            params[0].grad = value[1:].view(64, 64)
            optimizer.step()
        found.append(bits(params, optimizer))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0, "maximize": True, "grad_scale": 0.5},
        {"clip_value": 0.1, "eps": 1e-3, "epsilon_hat": True},
        {"betas": (0.0, 0.9)},
        {"betas": (0.99, 0.9)},
        {"betas": (0.9, 0.0)},
        {"betas": (0.9, 0.81)},
        {"rounding_seed": 2**62 + 12345},
    ],
    ids=repr,
)
def test_hyperparameters_reach_every_backend(backend: str, options: dict) -> None:
    ours, theirs = (make("split8, 8bit", ((64, 64),), each, **options) for each in (backend, "eager"))
    train(*ours, 5)
    train(*theirs, 5)
    assert bits(*ours) == bits(*theirs)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_channels_last_is_walked_as_it_lies(backend: str) -> None:
    """The blocks are of neighbours in memory, whatever the order of the dimensions."""

    def as_it_lies(value: torch.Tensor) -> torch.Tensor:
        return value.detach().permute(0, 2, 3, 1).reshape(8, 1024).clone() if value.ndim == 4 else value

    params, optimizer = make("8bit", ((8, 16, 8, 8),), backend)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    train(params, optimizer, 2)
    flat, other = make("8bit", ((8, 1024),), backend)
    generator = torch.Generator().manual_seed(7)
    gradient = torch.randn(8, 16, 8, 8, generator=generator)
    params[0].grad = gradient.to(memory_format=torch.channels_last)
    flat[0].grad = as_it_lies(gradient)
    other.step()  # makes the states
    mine, theirs = optimizer.state[params[0]], other.state[flat[0]]
    for name, value in theirs.items():
        if name != "stream":
            value.copy_(as_it_lies(mine[name]))
    flat[0].data.copy_(as_it_lies(params[0]))
    optimizer.step()
    other.step()
    assert torch.equal(as_it_lies(params[0]), flat[0])
    assert all(torch.equal(as_it_lies(mine[name]), theirs[name]) for name in theirs if name != "stream")


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_a_counter_of_one_dimension_counts_beside_others(mode: str, backend: str) -> None:
    runs = [make(mode, ((3,), (2, 2)), backend) for _ in range(2)]
    for run in runs:
        train(*run, 1)
    params, optimizer = runs[0]
    optimizer.state[params[0]]["step"] = optimizer.state[params[0]]["step"].reshape(1)
    for run in runs:
        train(*run, 2, first=1)
    assert bits(*runs[0]) == bits(*runs[1])


@pytest.mark.parametrize("shapes", [((2, 0),), ((2, 0), (2, 0)), ((3, 5), (2, 0))])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_empty_parameters_count_their_steps(backend: str, shapes: Any) -> None:
    for options in ({}, {"state_dtype": torch.bfloat16}):
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = AdamW(params, backend=backend, **options)
        train(params, optimizer, 2)
        assert [float(optimizer.state[param]["step"]) for param in params] == [2] * len(shapes)


@pytest.mark.parametrize("mode", ["bf16 states to nearest", "split16", "fp32 masters of fp16"])
def test_a_parameter_with_gaps_is_updated_as_one_without(mode: str) -> None:
    dtype, options = MODES[mode]
    whole = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).to(dtype))
    gaps = torch.nn.Parameter(torch.zeros(4, 6, dtype=dtype)[:, ::2].copy_(whole.detach()))
    for param in (whole, gaps):
        train([param], AdamW([param], **options), 2)
    assert torch.equal(whole, gaps)


@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_a_parameter_that_goes_on_alone_keeps_its_random_bits(backend: str) -> None:
    mode = "bf16 stochastic, bf16 states"
    (together, optimizer), ((param,), other) = (make(mode, ((64, 64),) * n, backend) for n in (2, 1))
    train(together, optimizer, 1)
    param.data.copy_(together[1])
    other.state[param] = copy.deepcopy(optimizer.state[together[1]])
    for step in (1, 2):
        give_gradients(together, step)
        param.grad = together[1].grad.clone()
        optimizer.step()
        other.step()
    assert bits([param], other) == bits(together[1:], optimizer)
