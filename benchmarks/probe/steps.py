"""Whole steps by the public optimizer: beside others, in memory modes, profiled, and as replays of CUDA graphs."""

from __future__ import annotations

import cProfile
import math
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

from benchmarks.cases import BF16, FP32, Case, Precision
from benchmarks.contenders import TORCH_FUSED, Step, foreign, imported, ours
from benchmarks.probe.harness import Probe
from benchmarks.timing import Entry, take_turns
from benchmarks.workload import Origin, Workload, make_origin
from dragon.kernels.config import LaunchConfig
from dragon.vm.measuring.shapes import Shapes, equal, gpt2
from dragon.vm.measuring.timer import Spread
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._backends import launches
from dragon.vm.tuning.candidates import describe

SIZES = ((10, 16), (1000, 16), (1000, 1000), (10_000, 1000), (148, 2**20), (1, 1))
GRAPH_SIZES = ((1000, 1000), (10_000, 1000), (148, 2**20), (1, 2**28))

BUILDERS = {"ours triton": ours(backend="triton"), TORCH_FUSED: foreign(torch.optim.Adam, fused=True)}

# fp32 first, then bf16 parameters with less and less memory.
MODES = {
    **BUILDERS,
    "fp32 master": ours(backend="triton", master_weights=torch.float32),
    "split16": ours(backend="triton", master_weights="split16"),
    "bf16 states": ours(backend="triton", stochastic_rounding=True, state_dtype=torch.bfloat16),
    "split8, 8-bit states": ours(backend="triton", master_weights="split8", state_dtype="8bit"),
}
# One of each kind of code, over launch configurations.
CONFIGURED = {
    "bf16 states": MODES["bf16 states"],
    "split16, 8-bit states": ours(backend="triton", master_weights="split16", state_dtype="8bit"),
    "split8, 8-bit states": MODES["split8, 8-bit states"],
    "split8, 8-bit states to nearest": ours(
        backend="triton", master_weights="split8", state_dtype="8bit", stochastic_rounding=False
    ),
}
CONFIGS = (
    *(LaunchConfig(256, 1), LaunchConfig(512, 2), LaunchConfig(1024, 4), LaunchConfig(2048, 8)),
    *(LaunchConfig(512, 4), LaunchConfig(1024, 8), LaunchConfig(2048, 4), LaunchConfig(2048, 16)),
    LaunchConfig(1024, 4, eviction="evict_first"),
    LaunchConfig(1024, 4, programs_per_processor=7),
)
MODE_CASES = (((8192, 16384),), gpt2(12, 768), equal(1000, 1000))
DRY_SHAPES = ((64, 64), (5,))


def steps(probe: Probe) -> None:
    """Cold, warm, host and device time of steps with fresh gradients and a new learning rate each."""
    for n, numel in SIZES[: probe.sized(len(SIZES), 2)]:
        n, numel = (min(n, 3), min(numel, 20)) if probe.is_dry else (n, numel)
        _steps(probe, "step", equal(n, numel), dict.fromkeys(BUILDERS, FP32), BUILDERS)


def modes(probe: Probe) -> None:
    """Steps of memory modes beside those of fp32, and beside FlashOptim's 8-bit states with a 24-bit master."""
    # FlashOptim has no code for a CPU.
    has_flashoptim = find_spec("flashoptim") is not None and not probe.is_dry
    builders = MODES | ({"flashoptim": imported("flashoptim.FlashAdam")} if has_flashoptim else {})
    precisions = {name: FP32 if name in BUILDERS else BF16 for name in builders}
    for case in MODE_CASES[: probe.sized(len(MODE_CASES), 1)]:
        _steps(probe, "mode", DRY_SHAPES if probe.is_dry else case, precisions, builders)


def mode_configs(probe: Probe) -> None:
    """Steps of one large tensor in memory modes, over launch configurations."""
    shapes = DRY_SHAPES if probe.is_dry else MODE_CASES[0]
    origin = make_origin(Case("probe", shapes), BF16, probe.machine.device)
    for name, build in CONFIGURED.items():
        # Few large programs are the quickest to interpret.
        for config in CONFIGS[3:4] if probe.is_dry else CONFIGS:
            workload = Workload(origin)
            with mock.patch.object(launches, "config_for", return_value=config), warnings.catch_warnings():
                # That moments to nearest cannot decay.
                warnings.simplefilter("ignore", UserWarning)
                step = build(workload)
                workload.before_step()
                (ms,) = probe.median_ms([step], host_ms=1.0)
            probe.say("mode config", mode=name, config=describe(config), us=1000 * ms)


def _steps(
    probe: Probe,
    part: str,
    shapes: Shapes,
    precisions: Mapping[str, Precision],
    builders: Mapping[str, Callable[[Workload], Step]],
) -> None:
    origins: dict[Precision, Origin] = {}
    entries = []
    for name, build in builders.items():
        precision = precisions[name]
        if precision not in origins:
            origins[precision] = make_origin(Case("probe", shapes), precision, probe.machine.device)
        workload = Workload(origins[precision])
        entries.append(Entry(name, build(workload), workload.before_step))
    take_turns(entries, entries[0], probe.timer, probe.sized(9, 1), budget_s=1.0)
    numel = sum(map(math.prod, shapes))
    for entry in entries:
        spreads = {
            clock.replace("_ms", "_us"): 1000 * Spread.of(samples).median
            for clock in ("cold_ms", "warm_ms", "host_ms", "device_ms")
            if (samples := entry.samples(clock))
        }
        probe.say(part, contender=entry.name, tensors=len(shapes), numel=numel, **spreads)


def profile(probe: Probe) -> None:
    """Where the host's time of a step goes: the functions that take most of it."""
    for n in (1, probe.sized(1000, 3)):
        workload = Workload(make_origin(Case("probe", equal(n, 16)), FP32, probe.machine.device))
        step = BUILDERS["ours triton"](workload)
        profiler = cProfile.Profile()
        for index in range(probe.sized(60, 4)):
            workload.before_step()
            probe.timer.synchronize()
            if index > 2:
                profiler.enable()
            step()
            profiler.disable()
        for found in sorted(profiler.getstats(), key=lambda each: -each.inlinetime)[:25]:
            code = found.code
            name = code if isinstance(code, str) else f"{Path(code.co_filename).name}:{code.co_name}"
            us = 1e6 * found.inlinetime / (index - 2)
            probe.say("profile", tensors=n, function=name, calls=found.callcount, us=us)


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
