"""Whole steps by the public optimizer: beside torch's fused Adam, and as replays of a CUDA graph."""

from __future__ import annotations

import torch

from benchmarks.cases import FP32, Case
from benchmarks.contenders import TORCH_FUSED, foreign, ours
from benchmarks.probe.harness import Probe
from benchmarks.timing import Entry, take_turns
from benchmarks.workload import Workload, make_origin
from dragon.vm.measuring.shapes import equal
from dragon.vm.measuring.timer import Spread
from dragon.vm.torch.optim import Adam

SIZES = ((10, 16), (1000, 16), (1000, 1000), (10_000, 1000), (148, 2**20), (1, 1))
GRAPH_SIZES = ((1000, 1000), (10_000, 1000), (148, 2**20), (1, 2**28))

BUILDERS = {"ours triton": ours(backend="triton"), TORCH_FUSED: foreign(torch.optim.Adam, fused=True)}


def steps(probe: Probe) -> None:
    """Cold, warm, host and device time of steps with fresh gradients and a new learning rate each."""
    for n, numel in SIZES[: probe.sized(len(SIZES), 2)]:
        n, numel = (min(n, 3), min(numel, 20)) if probe.is_dry else (n, numel)
        origin = make_origin(Case(f"{n} x {numel}", equal(n, numel)), FP32, probe.machine.device)
        entries = []
        for name, build in BUILDERS.items():
            workload = Workload(origin)
            entries.append(Entry(name, build(workload), workload.before_step))
        take_turns(entries, entries[0], probe.timer, probe.sized(9, 1), budget_s=1.0)
        for entry in entries:
            spreads = {
                clock.replace("_ms", "_us"): 1000 * Spread.of(samples).median
                for clock in ("cold_ms", "warm_ms", "host_ms", "device_ms")
                if (samples := entry.samples(clock))
            }
            probe.say("step", contender=entry.name, tensors=n, numel=numel, **spreads)


def graphs(probe: Probe) -> None:
    """A replay beside an eager step, and a second capture of the same optimizer."""
    if probe.is_dry:
        probe.say("graph", skipped="there are no graphs without a GPU")
        return
    for n, numel in GRAPH_SIZES:
        _graph(probe, n, numel)


def _graph(probe: Probe, n: int, numel: int) -> None:
    device = probe.machine.device
    params = [torch.nn.Parameter(torch.randn(numel, device=device)) for _ in range(n)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Adam(params, lr=1e-4, backend="triton", epsilon_hat=False, capturable=True)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream(device).wait_stream(stream)
    # The second capture meets a plan that the first one has taken.
    for capture in ("first", "second"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        before = [param.detach().clone() for param in params[:3]]
        graph.replay()
        probe.timer.synchronize()
        if any(torch.equal(old, new) for old, new in zip(before, params[:3], strict=True)):
            probe.fail("graph", tensors=n, numel=numel, capture=capture, wrong="a replay changes nothing")
            continue
        eager_ms, replay_ms = probe.median_ms([optimizer.step, graph.replay], host_ms=0.05 + 0.002 * n)
        probe.say(
            "graph", capture=capture, tensors=n, numel=numel, eager_us=1000 * eager_ms, replay_us=1000 * replay_ms
        )
