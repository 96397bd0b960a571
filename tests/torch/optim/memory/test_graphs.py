"""A captured step in every memory mode: each replay is a step, with random words of its own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import AdamW

from .modes import MODES, bits, give_gradients, make

SHAPES = ((64, 64), (37,))
STOCHASTIC = ["split8, 8bit, amsgrad, average", "bf16 stochastic, bf16 states", "8bit"]
MASTERS = ["split16", "split8, 8bit", "fp32 masters, 8bit", "fp32 masters of fp16"]
pytestmark = pytest.mark.filterwarnings("ignore:exp_avg_sq is rounded to nearest")


def placed(mode: str, where: torch.device, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Parameters after a first step, and their optimizer."""
    params, _ = make(mode, SHAPES)
    moved: list[torch.Tensor] = [torch.nn.Parameter(param.detach().to(where)) for param in params]
    optimizer = AdamW(moved, **{"lr": 1e-2, "backend": "triton", **MODES[mode][1], **options})
    give(moved, 0)
    optimizer.step()
    return moved, optimizer


def give(params: Sequence[torch.Tensor], step: int) -> None:
    """Gradients of a step, in the memory of the earlier ones if there are any."""
    hosts = [torch.nn.Parameter(param.detach().cpu()) for param in params]
    give_gradients(hosts, step)
    for param, host in zip(params, hosts, strict=True):
        if param.grad is None:
            param.grad = host.grad.to(param.device)
        else:
            param.grad.copy_(host.grad)


def stored(params: Sequence[torch.Tensor], optimizer: Any) -> list[bytes]:
    """As `bits`, wherever the tensors are."""
    hosts = [param.detach().cpu() for param in params]
    held = AdamW([torch.nn.Parameter(torch.zeros(1))])
    for param, host in zip(params, hosts, strict=True):
        held.state[host] = {
            key: value.cpu() if isinstance(value, torch.Tensor) else value
            for key, value in optimizer.state[param].items()
        }
    return bits(hosts, held)


@pytest.mark.parametrize("mode", MODES)
def test_each_replay_is_a_step(mode: str, graphed: Any) -> None:
    where, capture = graphed
    params, ours = placed(mode, where, capturable=True)
    twins, theirs = placed(mode, where)
    replay = capture(ours.step)
    for step in range(1, 4):
        give(params, step)
        give(twins, step)
        replay()
        theirs.step()
        assert stored(params, ours) == stored(twins, theirs)


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_replays_of_equal_gradients_have_words_of_their_own(mode: str, graphed: Any) -> None:
    where, capture = graphed
    params, optimizer = placed(mode, where, capturable=True)
    replay = capture(optimizer.step)
    found = []
    for _ in range(3):
        replay()
        found.append(stored(params, optimizer)[:1])
    assert len({str(each) for each in found}) == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_skipped_replay_changes_no_bit(mode: str, graphed: Any) -> None:
    where, capture = graphed
    params, optimizer = placed(mode, where, capturable=True, skip_nonfinite=True)
    replay = capture(optimizer.step)
    before = stored(params, optimizer)
    params[0].grad.view(-1)[5] = torch.nan
    replay()
    assert stored(params, optimizer) == before
    assert optimizer.n_skipped_steps == 1
    give(params, 7)
    replay()
    assert stored(params, optimizer) != before


@pytest.mark.parametrize("mode", MASTERS)
def test_a_write_between_replays_needs_a_call(mode: str, graphed: Any) -> None:
    """A replay runs no line of this library: only the caller knows of the write."""
    where, capture = graphed
    params, optimizer = placed(mode, where, capturable=True)
    replay = capture(optimizer.step)
    with torch.no_grad():
        for param in params:
            param.fill_(0.5)
            param.grad.zero_()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    optimizer.resync_master()
    replay()
    for param, (_, master) in zip(params, optimizer.master_weights(), strict=True):
        assert (param == 0.5).all()
        assert (master == 0.5).all()


@pytest.mark.parametrize("mode", MASTERS)
def test_a_write_before_a_capture_needs_a_call(mode: str, graphed: Any) -> None:
    """As where a script warms a model up, puts its weights back and captures a step."""
    where, capture = graphed
    params, optimizer = placed(mode, where, capturable=True)
    with torch.no_grad():
        params[0].fill_(0.5)
        params[0].grad.zero_()
    before = stored(params, optimizer)
    with pytest.raises(RuntimeError, match="call resync_master"):
        capture(optimizer.step)
    assert stored(params, optimizer) == before
    optimizer.resync_master()
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    capture(optimizer.step)()
    assert (params[0] == 0.5).all()
    assert (next(optimizer.master_weights())[1] == 0.5).all()
