"""Parameters cut along their first dimension: every process has the bits that it would have of the whole."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dragon.vm.torch.optim import AdamW

from .modes import MODES

SHAPE = (65, 64)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Act as one process of several: no step here needs the others."""
    # PyTorch puts the rank before each traceback of this process from now on.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def become(rank: int, n_ranks: int) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n_ranks)
        # A name of its own: PyTorch caches meshes, with their coordinates, by what they are equal in.
        return init_device_mesh("cpu", (n_ranks,), mesh_dim_names=(f"seen by {rank} of {n_ranks}",))

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def values(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stepped(make: Any, mode: str, backend: str = "eager", shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any]:
    dtype, options = MODES[mode]
    param = torch.nn.Parameter(make(values(0, dtype, shape)))
    optimizer = AdamW([param], lr=1e-2, backend=backend, **options)
    for step in range(3):
        param.grad = make(values(step + 1, dtype, shape))
        optimizer.step()
    return param, optimizer


@pytest.mark.parametrize("mode", ["8bit", "split8, 8bit", "bf16 stochastic, bf16 states", "split16"])
@pytest.mark.parametrize("n_ranks", [2, 3, 70])
def test_shards_have_the_bits_of_the_whole(mode: str, n_ranks: int, as_rank: Any) -> None:
    """65 rows are cut unevenly, and 70 processes leave some without any."""
    whole, whole_optimizer = stepped(lambda value: value, mode)
    rows = -(-SHAPE[0] // n_ranks)
    for rank in range(n_ranks) if n_ranks < 10 else (0, 33, 64, 69):
        mesh = as_rank(rank, n_ranks)
        mine = slice(rank * rows, min((rank + 1) * rows, SHAPE[0]))

        def cut(value: torch.Tensor, mine: slice = mine, mesh: Any = mesh) -> DTensor:
            return DTensor.from_local(
                value[mine].clone(), mesh, [Shard(0)], run_check=False, shape=SHAPE, stride=(SHAPE[1], 1)
            )

        param, optimizer = stepped(cut, mode)
        assert torch.equal(param.to_local(), whole[mine])
        state, expected = optimizer.state[param], whole_optimizer.state[whole]
        for name, value in expected.items():
            if name in ("step", "stream"):
                continue
            assert isinstance(state[name], DTensor)
            assert state[name].shape == value.shape
            assert state[name].placements == param.placements
            assert torch.equal(state[name].to_local(), value[mine])
        assert optimizer.state_formats() == whole_optimizer.state_formats()
        saved = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(saved.to_local(), whole_optimizer.state_dict()["state"][0]["exp_avg"][mine])
        # What was saved is loaded again without any other process.
        optimizer.load_state_dict(optimizer.state_dict())
        assert all(
            torch.equal(optimizer.state[param][name].to_local(), value[mine])
            for name, value in expected.items()
            if name not in ("step", "stream")
        )


@pytest.mark.parametrize("mode", ["split8, 8bit", "bf16 stochastic, bf16 states"])
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
@pytest.mark.parametrize("width", [33, 12])
def test_a_shard_may_begin_within_the_elements_that_share_random_words(
    width: int, mode: str, backend: str, as_rank: Any
) -> None:
    shape = (9, width)
    whole, whole_optimizer = stepped(lambda value: value, mode, shape=shape)
    for rank, mine in ((0, slice(0, 5)), (1, slice(5, 9))):
        mesh = as_rank(rank, 2)

        def cut(value: torch.Tensor, mine: slice = mine, mesh: Any = mesh) -> DTensor:
            shard = value[mine].clone()
            return DTensor.from_local(shard, mesh, [Shard(0)], run_check=False, shape=shape, stride=(width, 1))

        param, optimizer = stepped(cut, mode, backend, shape)
        assert torch.equal(param.to_local(), whole[mine])
        for name in whole_optimizer.state[whole].keys() - {"step", "stream"}:
            assert torch.equal(optimizer.state[param][name].to_local(), whole_optimizer.state[whole][name][mine])


@pytest.mark.parametrize("is_shard", [False, True])
@pytest.mark.parametrize("backend", ["eager", "native", "triton"])
def test_what_is_written_to_a_parameter_or_to_its_shard_is_stepped_from(
    backend: str, is_shard: bool, as_rank: Any
) -> None:
    mesh = as_rank(0, 2)
    dtype, options = MODES["fp32 masters of fp16"]
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(4, dtype=dtype), mesh, [Shard(0)], run_check=False))
    optimizer = AdamW([param], lr=0.0, backend=backend, **options)
    for value in (1.0, 5.0):
        with torch.no_grad():
            (param.to_local() if is_shard else param).fill_(value)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.to_local().tolist() == [value] * 4
