"""Steps in CUDA graphs."""

import copy
import weakref
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._backends import triton as triton_backend
from dragon.vm.torch.optim._table.table import DeviceTable

from ..judging import judged_step, make_params, params_of, same_bits, set_grads, snapshots

TEXTS = {
    "sums": "uses sums from before the capture",
    "sums of a copy": "uses sums from before the capture",
    "sums of a dict": "uses sums from before the capture",
    "capturable": "instance of Adam but param_groups' capturable is False",
    "rate": "lr is a tensor on the CPU",
    "betas": "betas is a tensor on the CPU",
    "no gradients": "without gradients cannot be captured",
    "native": "backend='native' cannot be captured",
    "eager": "backend='eager' cannot be captured",
    "cpu": "a step cannot be captured that decides on the host",
    "used sums": "a step cannot be captured that decides on the host",
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_a_replay_could_not_repeat_is_refused_with_a_reason(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = what if what in ("native", "eager") else None
    optimizer = Adam(make_params(), backend=backend, capturable=what != "capturable")
    set_grads(params_of(optimizer), 0)
    judged_step(optimizer)
    if what == "used sums":
        optimizer.sum_grad()
        optimizer.step()
        set_grads(params_of(optimizer), 1)
    before = snapshots(optimizer)
    if what.startswith("sums"):
        optimizer.sum_grad()
    if what == "sums of a copy":
        optimizer = copy.deepcopy(optimizer)
    if what == "sums of a dict":
        optimizer.load_state_dict(optimizer.state_dict())
    if what == "rate":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    if what == "betas":
        optimizer.param_groups[0]["betas"] = (torch.tensor(0.9), torch.tensor(0.99))
    if what == "no gradients":
        optimizer.zero_grad(set_to_none=True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=TEXTS[what]):
        optimizer.step()
    assert same_bits(snapshots(optimizer), before)


def test_an_xpu_graph_is_refused(monkeypatch: pytest.MonkeyPatch, interpreted: Any) -> None:
    optimizer = Adam(make_params(), backend="triton", capturable=True)
    set_grads(params_of(optimizer), 0)
    judged_step(optimizer)
    before = snapshots(optimizer)
    (context,) = optimizer._updater._devices.values()
    with monkeypatch.context() as patch:
        patch.setattr(context, "device", torch.device("xpu", 0))
        # PyTorch 2.10 has none.
        patch.setattr(torch.xpu, "is_current_stream_capturing", lambda: True, raising=False)
        with pytest.raises(RuntimeError, match="cannot be captured in an XPU graph"):
            optimizer.step()
    assert same_bits(snapshots(optimizer), before)
    judged_step(optimizer)


def test_addresses_that_replays_read_are_kept(monkeypatch: pytest.MonkeyPatch, interpreted: Any) -> None:
    optimizer = Adam(make_params(), backend="triton", capturable=True)
    set_grads(params_of(optimizer), 0)
    judged_step(optimizer)
    copies, plain = [], DeviceTable.captured_copy

    def captured_copy(table: DeviceTable, name: str, words: Any) -> torch.Tensor:
        made = plain(table, name, words)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(DeviceTable, "captured_copy", captured_copy)
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "is_capturing", lambda: True)
        for _ in range(2):
            optimizer.step()
    set_grads(params_of(optimizer), 1)
    judged_step(optimizer)
    assert [copy() is not None for copy in copies] == [True, True]


def capture(optimizer: Adam, inputs: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of backward and step, after two steps outside of it."""

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        sum((param * x).sum() for param, x in zip(params_of(optimizer), inputs, strict=True)).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            train()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    # The gradients of this loss are its inputs; until the first replay nothing has written them.
    for param, x in zip(params_of(optimizer), inputs, strict=True):
        param.grad.copy_(x)
    return graph


def make(**options: Any) -> tuple[Adam, list[torch.Tensor]]:
    optimizer = Adam(make_params(device="cuda"), epsilon_hat=False, capturable=True, **options)
    return optimizer, [torch.randn_like(param) for param in params_of(optimizer)]


@pytest.mark.gpu
def test_each_replay_is_one_step() -> None:
    optimizer, inputs = make(lr=0.1)
    graph = capture(optimizer, inputs)
    for _ in range(3):
        for x in inputs:
            x.normal_()
        for param, x in zip(params_of(optimizer), inputs, strict=True):
            param.grad.copy_(x)
        judged_step(optimizer, graph.replay)


# PyTorch does not see that a replay is a step.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.gpu
def test_a_scheduler_drives_a_captured_training_step() -> None:
    optimizer, inputs = make(lr=0.1)
    graph = capture(optimizer, inputs)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        judged_step(optimizer, graph.replay)
        scheduler.step()


@pytest.mark.gpu
def test_a_tensor_rate_is_live_in_a_graph() -> None:
    lr = torch.tensor(0.1, device="cuda")
    optimizer, inputs = make(lr=lr)
    graph = capture(optimizer, inputs)
    for value in (0.1, 0.01, 0.5):
        lr.fill_(value)
        judged_step(optimizer, graph.replay)


@pytest.mark.gpu
def test_uploads_keep_their_order_with_steps_on_another_stream() -> None:
    optimizer, inputs = make(lr=0.1)
    for param, x in zip(params_of(optimizer), inputs, strict=True):
        param.grad = x
    optimizer.step()
    stream = torch.cuda.Stream()

    def step() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            optimizer.step()
        # On this stream, and not to be seen by the step that waits on the other.
        optimizer.param_groups[0]["lr"] = 0.0
        torch.cuda.synchronize()

    judged_step(optimizer, step)
