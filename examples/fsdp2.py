"""FSDP2 with everything that spans processes: clipping, accumulation, averages and a checkpoint that is resumed.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dragon.vm.torch.optim import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_STEPS = 20
N_PARTS = 2


def build() -> tuple[nn.Module, AdamW]:
    """Make a sharded model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, AdamW(model.parameters(), lr=1e-2, epsilon_hat=False, max_grad_norm=1.0, ema_decay=0.9)


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Make this process's share of a batch."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + dist.get_rank())
    x = torch.randn(16, 8, generator=generator).to(DEVICE)
    return x, x.sin().sum(1, keepdim=True)


def train(model: nn.Module, optimizer: AdamW, steps: range) -> float:
    """Train, and return the last loss."""
    loss = torch.zeros(())
    for step in steps:
        for part in range(N_PARTS):
            # FSDP2 reduces the gradients of all parts together, in the last backward pass.
            model.set_requires_gradient_sync(part == N_PARTS - 1)  # type: ignore[operator]  # fully_shard adds it
            x, y = batch(step, part)
            loss = (model(x) - y).square().mean()
            (loss / N_PARTS).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def state_of(model: nn.Module, optimizer: AdamW) -> dict[str, object]:
    """The state that is saved, in PyTorch's format."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state}


def main() -> None:
    """Train half of the steps, save, resume in a fresh model, and compare."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    checkpoint = Path(folder[0], "half")

    model, optimizer = build()
    train(model, optimizer, range(N_STEPS // 2))
    save(state_of(model, optimizer), checkpoint_id=checkpoint)
    loss = train(model, optimizer, range(N_STEPS // 2, N_STEPS))

    resumed_model, resumed = build()
    state = state_of(resumed_model, resumed)
    load(state, checkpoint_id=checkpoint)
    set_state_dict(
        resumed_model,
        resumed,
        model_state_dict=state["model"],  # type: ignore[arg-type]  # the stub knows flat ones only
        optim_state_dict=state["optim"],  # type: ignore[arg-type]  # the stub knows flat ones only
    )
    same = loss == train(resumed_model, resumed, range(N_STEPS // 2, N_STEPS))

    with resumed.swap_ema(), torch.no_grad():
        x, y = batch(0, 0)
        averaged = (resumed_model(x) - y).square().mean().item()
    norm = resumed.grad_norm
    if dist.get_rank() == 0 and norm is not None:
        print(f"gradient norm {float(norm):.4f}, loss {loss:.4f}, of the averages {averaged:.4f}")
        print("resumed bit by bit" if same else "the resumed run differs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
