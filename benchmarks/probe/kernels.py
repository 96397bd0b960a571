"""Single kernels: bandwidth of updates and norms over launch configurations, and the costs of small launches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from benchmarks.probe.harness import Probe
from dragon.kernels import norm, table
from dragon.kernels.archs import sum_dtype
from dragon.kernels.config import LaunchConfig
from dragon.kernels.inspect import UPDATES
from dragon.kernels.launch import advance_launcher, norm_launcher
from dragon.vm.measuring.shapes import gpt2
from dragon.vm.tuning.candidates import describe
from dragon.vm.tuning.check import check_candidate
from dragon.vm.tuning.scratch import Tables, allocate, chunk_pairs, group_table, nbytes_per_element

SHAPES = (LaunchConfig(1024, 4), LaunchConfig(2048, 4), LaunchConfig(1024, 2), LaunchConfig(2048, 8))
SWEEP = (
    *SHAPES,
    LaunchConfig(4096, 8),
    LaunchConfig(4096, 4),
    LaunchConfig(512, 2),
    LaunchConfig(1024, 4, eviction="evict_first"),
    LaunchConfig(2048, 4, eviction="evict_first"),
    LaunchConfig(1024, 4, programs_per_processor=7),
    LaunchConfig(2048, 4, programs_per_processor=4),
)

COMMON = ("adam fp32", "adam bf16", "adam bf16 fp32-state")
OTHERS = (
    *("adam fp32 amsgrad", "adam fp32 average", "adam fp32 zero_grad", "adam fp64"),
    *("sgd fp32 momentum", "accumulate fp32"),
)


def copy(probe: Probe) -> None:
    """The bandwidth of `copy_`, which the others are compared with."""
    nbytes = probe.sized(2**30, 2**16)
    source = torch.ones(nbytes, dtype=torch.uint8, device=probe.machine.device)
    target = torch.empty_like(source)
    (ms,) = probe.median_ms([lambda: target.copy_(source)])
    probe.copy_gb_per_s = 2 * nbytes / ms / 1e6
    probe.say("copy", gb_per_s=probe.copy_gb_per_s)


def sweep(probe: Probe, kernel: str, case: str, numels: Sequence[int], configs: Sequence[LaunchConfig]) -> None:
    """Check and time configurations of a kernel beside each other."""
    spec = UPDATES[kernel]
    tables = Tables(allocate(spec, numels, probe.machine.device), spec, probe.machine)
    right = []
    for config in configs:
        if (wrong := check_candidate(spec, config, probe.machine)) is None:
            right.append(config)
        else:
            probe.fail("update", kernel=kernel, config=describe(config), wrong=wrong[:300])
    nbytes = nbytes_per_element(spec) * sum(numels)
    for config, ms in zip(right, probe.median_ms([tables.launch(config) for config in right]), strict=True):
        probe.say("update", kernel=kernel, case=case, config=describe(config), **probe.rate(nbytes, ms))


def updates(probe: Probe) -> None:
    """One large tensor of each common kind, in many configurations."""
    for kernel in COMMON:
        sweep(probe, kernel, "large", (probe.sized(2**28, 2**12),), SWEEP[: probe.sized(len(SWEEP), 2)])


def other_updates(probe: Probe) -> None:
    """One large tensor of each other kind."""
    for kernel in OTHERS[: probe.sized(len(OTHERS), 2)]:
        sweep(probe, kernel, "large", (probe.sized(2**27, 2**12),), SHAPES[: probe.sized(3, 1)])


def small_updates(probe: Probe) -> None:
    """Many small tensors, and those of GPT-2."""
    sweep(probe, "adam fp32", "10000 x 1000", (1000,) * probe.sized(10_000, 4), SHAPES[: probe.sized(4, 1)])
    numels = (2000, 33) if probe.is_dry else tuple(map(math.prod, gpt2(12, 768)))
    sweep(probe, "adam fp32", "GPT-2 124M", numels, SHAPES[: probe.sized(4, 1)])


def launches(probe: Probe) -> None:
    """Host time of one launch of an update kernel."""
    spec = UPDATES["adam fp32"]
    rows = allocate(spec, (64,), probe.machine.device)
    run = Tables(rows, spec, probe.machine).launch(LaunchConfig())
    n_times = probe.sized(500, 2)
    for _ in range(probe.sized(20, 1)):
        run()
    probe.timer.synchronize()
    start = time.perf_counter()
    for _ in range(n_times):
        run()
    host_us = (time.perf_counter() - start) / n_times * 1e6
    probe.timer.synchronize()
    probe.say("launch", host_us=host_us)


def norms(probe: Probe) -> None:
    """Both norms of one large gradient and of many small ones."""
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for n, numel in ((1, probe.sized(2**28, 2**12)), (probe.sized(10_000, 3), 1000)):
            _norms(probe, dtype, name, n, numel)


def _norms(probe: Probe, dtype: torch.dtype, dtype_name: str, n: int, numel: int) -> None:
    device, pitch = probe.machine.device, numel + 16
    buffer = torch.randn(n * pitch, device=device).to(dtype)
    grads = [buffer[i * pitch : i * pitch + numel] for i in range(n)]
    n_spans = -(-numel // int(norm.SPAN))
    tensors = torch.zeros(n, int(table.TENSOR_COLUMNS), dtype=torch.int64)
    tensors[:, int(table.NUMEL)] = numel
    tensors[:, int(table.FIRST_PARTIAL)] = torch.arange(n) * n_spans
    tensors[:, int(table.END_PARTIAL)] = torch.arange(1, n + 1) * n_spans
    addresses = torch.tensor([grad.data_ptr() for grad in grads], device=device)
    spans = chunk_pairs([numel] * n, int(norm.SPAN))[1:].contiguous().to(device)
    partials = torch.zeros(n * n_spans, dtype=torch.float64, device=device)
    tables = (spans, tensors.to(device), addresses, group_table("accumulate", device), partials)

    def launch_of(kind: int) -> Callable[[], None]:
        sums = sum_dtype(probe.machine.arch)
        launch = norm_launcher(dtype_name, kind, n * n_spans, probe.machine.warp_size, sums)
        return lambda: launch(*tables)

    kinds = {"L2": int(norm.L2_NORM), "inf": int(norm.INF_NORM)}
    times = probe.median_ms([launch_of(kind) for kind in kinds.values()])
    for kind, ms in zip(kinds, times, strict=True):
        rate = probe.rate(n * numel * dtype.itemsize, ms)
        probe.say("norm", kind=kind, dtype=dtype_name, tensors=n, **rate)
    launch_of(kinds["L2"])()
    exact = sum(float(part.double().square().sum()) for part in buffer.view(n, pitch)[:, :numel].split(1))
    error = abs(float(partials.sum()) / exact - 1) / 2 / torch.finfo(torch.float32).eps
    if error <= 4:
        probe.say("norm accuracy", dtype=dtype_name, tensors=n, eps=error)
    else:
        probe.fail("norm accuracy", dtype=dtype_name, tensors=n, eps=error)


def advances(probe: Probe) -> None:
    """The launch that derives each tensor's scalars, without a norm and with one of many partial results."""
    sizes = ((1, 0), (148, 0), (10_000, 0), (1, 30_518), (10_000, 10_000))
    for n_tensors, n_partials in sizes if not probe.is_dry else ((3, 0), (1, 5)):
        _advance(probe, n_tensors, n_partials)


def _advance(probe: Probe, n_tensors: int, n_partials: int) -> None:
    device = probe.machine.device

    def zeros(length: int) -> torch.Tensor:
        return torch.zeros(length, dtype=torch.float64, device=device)

    steps = torch.zeros(n_tensors, device=device)
    tensors = torch.zeros(n_tensors, int(table.TENSOR_COLUMNS), dtype=torch.int64)
    tensors[:, int(table.STEP)] = steps.data_ptr() + 4 * torch.arange(n_tensors)
    ends = list(accumulate([n_partials // n_tensors] * n_tensors))
    tensors[:, int(table.END_PARTIAL)] = torch.tensor(ends)
    tables = (
        torch.tensor([n_tensors, n_partials], device=device),
        tensors.to(device),
        torch.zeros(n_tensors, dtype=torch.int64, device=device),
        group_table("adam", device),
        torch.zeros(int(table.SOURCE_COLUMNS), dtype=torch.int64, device=device),
        zeros(n_tensors * int(table.SCALAR_COLUMNS)),
        zeros(max(n_partials, 1)),
        torch.ones(1, device=device),
        torch.zeros(1, device=device),
        zeros(int(table.STATUS_COLUMNS)),
    )
    kind = int(norm.L2_NORM if n_partials else norm.NO_NORM)
    launch = advance_launcher("adam", kind, False, n_tensors, probe.machine.warp_size)
    (ms,) = probe.median_ms([lambda: launch(*tables)])
    probe.say("advance", tensors=n_tensors, partials=n_partials, us=1000 * ms)
