"""Is this installation sound? ``dragon-vm doctor`` or ``python -m dragon.vm.doctor``.

Every finding is a line. A backend that was not tested is named with the reason. The exit code is 1 if something is
wrong, 2 if a test that is possible here was not run, else 0.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from enum import Enum
from time import monotonic
from typing import NamedTuple

import torch

from dragon.vm._words import counted
from dragon.vm.measuring import machine
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._devices import has_float64
from dragon.vm.torch.optim._groups.eligibility import choose_backend, why_no_kernels, why_not

BACKENDS = ("triton", "native", "eager")
PACKAGES = ("dragon-vm-torch", "torch", "triton", "numpy", "hypothesis", "argcomplete", "rich", "matplotlib")

# Of each backend, in seconds; at least one step is taken.
SELF_TEST_SECONDS = 1.0
NUMELS = (1, 17, 1000, 4096)


class Verdict(Enum):
    """What a finding says; the value is what is printed."""

    FINE = "ok"
    PASSED = "passed"
    # No device here can run it, which says nothing against the installation.
    IMPOSSIBLE = "-"
    UNTESTED = "NOT TESTED"
    WRONG = "WRONG"


class Finding(NamedTuple):
    """One line of the examination."""

    topic: str
    text: str
    verdict: Verdict = Verdict.FINE  # what the line says of the installation


def versions() -> Iterator[Finding]:
    """Versions of Python and of all packages that are used if they are there."""
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    found = machine.versions(PACKAGES)
    for name in PACKAGES:
        is_missed = name not in found and name in ("dragon-vm-torch", "torch")
        yield Finding(name, found.get(name, "not installed"), Verdict.WRONG if is_missed else Verdict.FINE)


def present_devices() -> list[torch.device]:
    """The CPU, and every GPU that torch sees."""
    devices = [torch.device("cpu")]
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.mps)):
        if module.is_available():
            devices += [torch.device(kind, index) for index in range(module.device_count())]
    return devices


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "mps":
        return f"Apple's GPU, {torch.mps.recommended_max_memory() / 2**30:.0f} GiB"
    properties = torch.get_device_module(device).get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _failure(error: Exception) -> str:
    """What went wrong, in a line."""
    return f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def chosen_backend(device: torch.device) -> Finding:
    """The backend of fp32 parameters on a device, and why none before it."""
    try:
        param = torch.zeros(1, device=device)
        text = _describe(device)
    # A driver may fail in many ways, and other devices are still of interest.
    except Exception as error:
        return Finding(str(device), _failure(error), Verdict.WRONG)
    chosen = choose_backend(None, param, torch.float32, {torch.float32}, differentiable=False)
    passed = [(name, why_not(name, device)) for name in BACKENDS[: BACKENDS.index(chosen)]]
    reasons = [f"not {name}: {reason or 'only on request on this device'}" for name, reason in passed]
    text += f"; backend {chosen}" + "".join(f"; {reason}" for reason in reasons)
    # A GPU that kernels do not run on, though they could, is what nobody installs this library for.
    is_wrong = device.type in ("cuda", "xpu") and has_float64(device) and chosen != "triton"
    return Finding(str(device), text, Verdict.WRONG if is_wrong else Verdict.FINE)


def tuning_files() -> Iterator[Finding]:
    """Results of this user, and files that are ignored."""
    if reason := why_no_kernels():
        yield Finding("tuning", f"{reason}: nothing is tuned")
        return
    from dragon.vm.torch.optim._backends.configs import tuning_dir
    from dragon.vm.tuning.store import scan

    found = list(scan())
    yield Finding("tuning", f"{counted(len(found), 'file')} of this user in {tuning_dir()}")
    for path, result in found:
        if isinstance(result, str):
            yield Finding("tuning", f"{path} is ignored: {result}", Verdict.WRONG)
        else:
            yield Finding("tuning", f"in force on {result['device']}: {path}")


def self_test(backend: str, device: torch.device) -> Finding:
    """Take Adam steps for a second, each judged from its own start by the reference."""
    topic = f"{backend} on {device}"
    try:
        from dragon.vm.testing import AdamOptions, AdamState, ParityError, assert_adam_step
        from dragon.vm.testing.snapshots import adam_snapshot
    except ModuleNotFoundError as error:
        text = f'{error.name} is missing (pip install "dragon-vm-torch[testing]")'
        return Finding(topic, text, Verdict.UNTESTED)
    options = AdamOptions(lr=0.01, weight_decay=0.1, epsilon_hat=False)
    generator = torch.Generator().manual_seed(0)

    def states() -> list[AdamState]:
        return [adam_snapshot(param, adam.state.get(param, {}), options, param.dtype) for param in params]

    try:
        params = [torch.nn.Parameter(torch.randn(numel, generator=generator).to(device)) for numel in NUMELS]
        adam = Adam(params, options.lr, weight_decay=options.weight_decay, epsilon_hat=False, backend=backend)
        # The first optimizer takes seconds to import what it needs.
        end, n_steps = monotonic() + SELF_TEST_SECONDS, 0
        while not n_steps or monotonic() < end:
            for param in params:
                param.grad = torch.randn(param.numel(), generator=generator).to(device)
            starts = states()
            adam.step()
            n_steps += 1
            for param, start, after in zip(params, starts, states(), strict=True):
                assert param.grad is not None
                assert_adam_step(start, param.grad.cpu(), after, options, where=f"step {n_steps}")
    except ParityError as error:
        return Finding(topic, f"wrong: {error}", Verdict.WRONG)
    # Whatever stops a backend is what the user must know.
    except Exception as error:
        return Finding(topic, _failure(error), Verdict.WRONG)
    return Finding(topic, f"agrees with the reference in {counted(n_steps, 'step')}", Verdict.PASSED)


def self_tests() -> Iterator[Finding]:
    """A test of each backend on each device, or the reason why there is none."""
    for device in present_devices():
        for backend in BACKENDS:
            if reason := why_not(backend, device):
                yield Finding(f"{backend} on {device}", f"not tested: {reason}", Verdict.IMPOSSIBLE)
            else:
                yield self_test(backend, device)


def examine() -> Iterator[Finding]:
    """Everything, in the order of the report."""
    yield from versions()
    for device in present_devices():
        yield chosen_backend(device)
    yield from tuning_files()
    yield from self_tests()


def conclusion(findings: Sequence[Finding]) -> tuple[str, int]:
    """The last line, and the exit code: 1 if something is wrong, 2 if something could have been tested, else 0."""
    passed, wrong, untested, impossible = (
        [finding.topic for finding in findings if finding.verdict is verdict]
        for verdict in (Verdict.PASSED, Verdict.WRONG, Verdict.UNTESTED, Verdict.IMPOSSIBLE)
    )
    text = f"{len(wrong)} wrong: {', '.join(wrong)}" if wrong else "Nothing wrong was found"
    text += f"; passed: {', '.join(passed) or 'nothing'}"
    text += f"; not tested: {', '.join(untested + impossible) or 'nothing'}."
    return text, 1 if wrong else 2 if untested else 0


def main() -> int:
    """Print the findings as they come, and a conclusion; the exit code is that of `conclusion`."""
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.verdict.value:10}  {finding.topic:18}  {finding.text}", flush=True)
    text, status = conclusion(findings)
    print(text)
    return status
