"""The doctor says what is wrong, what passed, and what was not tested and why."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dragon.vm import doctor
from dragon.vm.doctor import Verdict
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._devices import has_float64
from dragon.vm.torch.optim._groups.eligibility import why_not
from dragon.vm.tuning import store

from .forking import Forking
from .tuning.support import result


class Clock:
    """Seconds that pass with every look at them."""

    def __init__(self, step: float = 0.4) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Wrong(Adam):
    """An optimizer that is off by a hair."""

    def step(self, *arguments: object, **options: object) -> None:
        super().step(*arguments, **options)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(1 + 1e-5)


class Failing(Adam):
    """An optimizer whose driver is gone."""

    def step(self, *arguments: object, **options: object) -> None:
        raise RuntimeError("no kernel image is available")


@pytest.fixture(autouse=True)
def tuning_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAGON_VM_TUNING_DIR", str(tmp_path))
    return tmp_path


CPU = torch.device("cpu")
BACKENDS_HERE = [name for name in doctor.BACKENDS if why_not(name, CPU) is None]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(doctor, "monotonic", clock)
    return clock


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_every_backend_agrees_with_the_reference(backend: str) -> None:
    finding = doctor.self_test(backend, CPU)
    assert finding.verdict is Verdict.PASSED
    assert finding.text == "agrees with the reference in 3 steps"


def test_a_step_is_taken_however_slow_the_machine_is(clock: Clock) -> None:
    clock.step = 100.0
    assert doctor.self_test("eager", CPU).text == "agrees with the reference in 1 step"


def test_a_wrong_step_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "Adam", Wrong)
    finding = doctor.self_test("eager", CPU)
    assert finding.verdict is Verdict.WRONG
    assert "wrong: step 1: param[" in finding.text


def test_a_backend_that_fails_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "Adam", Failing)
    finding = doctor.self_test("eager", CPU)
    assert finding == ("eager on cpu", "fails: RuntimeError: no kernel image is available", Verdict.WRONG)


def test_a_device_that_fails_is_a_finding_in_a_line_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(doctor, "present_devices", lambda: [CPU])
    monkeypatch.setattr(torch.Tensor, "to", fail)
    monkeypatch.setattr(torch, "zeros", fail)
    text = "fails: RuntimeError: CUDA error: out of memory"
    assert doctor.chosen_backend(CPU) == ("cpu", text, Verdict.WRONG)
    assert doctor.self_test("eager", CPU) == ("eager on cpu", text, Verdict.WRONG)


def test_a_missing_parity_kit_is_said_and_makes_the_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "dragon.vm.testing", None)
    finding = doctor.self_test("eager", CPU)
    assert finding.verdict is Verdict.UNTESTED
    assert "dragon.vm.testing is missing" in finding.text
    assert doctor.main() == 2
    out = capsys.readouterr().out
    assert "NOT TESTED  eager on cpu" in out
    assert "passed: nothing; not tested: " in out.splitlines()[-1]
    assert "eager on cpu" in out.splitlines()[-1]


def test_a_backend_that_is_impossible_here_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.0)
    monkeypatch.setattr(doctor, "why_not", lambda backend, _: "no GPU is here" if backend == "triton" else None)
    findings = list(doctor.self_tests())
    assert findings[0] == ("triton on cpu", "not tested: no GPU is here", Verdict.IMPOSSIBLE)
    text, status = doctor.conclusion(findings)
    assert text.endswith("passed: native on cpu, eager on cpu; not tested: triton on cpu.")
    assert status == 0


def test_the_chosen_backend_is_told_with_why_no_other_is() -> None:
    finding = doctor.chosen_backend(CPU)
    assert finding.verdict is Verdict.FINE
    assert "backend native; not triton: " in finding.text
    assert "not native" not in finding.text


def test_every_gpu_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, count in (("cuda", 2), ("xpu", 0), ("mps", 1)):
        monkeypatch.setattr(torch.get_device_module(kind), "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda count=count: count or 1)
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("mps", 0)]
    assert doctor.present_devices() == [CPU, *gpus]


def test_the_eager_backend_is_right_for_a_gpu_of_apples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(1, device="meta"))
    finding = doctor.chosen_backend(torch.device("mps", 0))
    assert finding.verdict is Verdict.FINE
    assert finding.text.startswith("Apple's GPU, 16 GiB; backend eager; not triton: ")


@pytest.mark.parametrize("has_fp64", [False, True])
def test_the_eager_backend_is_wrong_for_a_gpu_of_intels_only_if_it_has_float64(
    has_fp64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="Arc", total_memory=2**34, has_fp64=has_fp64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(1, device="meta"))
    has_float64.cache_clear()
    try:
        finding = doctor.chosen_backend(torch.device("xpu", 0))
    finally:
        has_float64.cache_clear()
    assert finding.text.startswith("Arc, 16 GiB; backend eager; not triton: ")
    assert finding.verdict is (Verdict.WRONG if has_fp64 else Verdict.FINE)


def test_without_triton_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_no_kernels", lambda: "triton is not installed")
    (finding,) = doctor.tuning_files()
    assert finding == ("tuning", "triton is not installed: nothing is tuned", Verdict.FINE)


def test_an_ignored_tuning_file_is_wrong(tuning_folder: Path) -> None:
    assert all(finding.verdict is Verdict.FINE for finding in doctor.tuning_files())
    (tuning_folder / "sm_90" / "gpu").mkdir(parents=True)
    (tuning_folder / "sm_90" / "gpu" / "x.json").write_text("{")
    wrong = [finding for finding in doctor.tuning_files() if finding.verdict is Verdict.WRONG]
    assert len(wrong) == 1
    assert str(tuning_folder / "sm_90" / "gpu" / "x.json") in wrong[0].text


def test_a_stored_result_is_said_to_be_in_force() -> None:
    path = store.save(result())
    assert doctor.Finding("tuning", f"in force on Planted GPU: {path}") in doctor.tuning_files()


def test_versions_are_told_and_absent_packages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    texts = {finding.topic: finding for finding in doctor.versions()}
    assert torch.__version__.startswith(texts["torch"].text)
    assert texts["no-such-package"] == ("no-such-package", "not installed", Verdict.FINE)


def test_only_what_cannot_be_missing_is_wrong_if_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.machine, "versions", lambda names: {})
    wrong = [finding.topic for finding in doctor.versions() if finding.verdict is Verdict.WRONG]
    assert wrong == ["dragon-vm-torch", "torch"]


@pytest.mark.parametrize(
    ("verdicts", "status", "last"),
    [
        ([Verdict.FINE, Verdict.PASSED], 0, "Nothing wrong was found; passed: topic 1; not tested: nothing."),
        ([Verdict.PASSED, Verdict.UNTESTED], 2, "Nothing wrong was found; passed: topic 0; not tested: topic 1."),
        ([Verdict.WRONG, Verdict.UNTESTED], 1, "1 wrong: topic 0; passed: nothing; not tested: topic 1."),
    ],
)
def test_the_last_line_and_the_exit_code_say_what_was_tested_and_what_not(
    verdicts: list[Verdict],
    status: int,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    findings = [doctor.Finding(f"topic {n}", "text", verdict) for n, verdict in enumerate(verdicts)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert doctor.main() == status
    *lines, conclusion = capsys.readouterr().out.splitlines()
    assert conclusion == last
    assert [line.split("  ")[0] for line in lines] == [verdict.value for verdict in verdicts]


def test_the_whole_examination_finds_this_installation_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.0)
    findings = list(doctor.examine())
    assert [finding for finding in findings if finding.verdict is Verdict.WRONG] == []
    assert {f"{backend} on cpu" for backend in BACKENDS_HERE} <= {finding.topic for finding in findings}


def test_help_is_printed_and_nothing_is_examined(forking: Forking, tmp_path: Path) -> None:
    code, out, _ = forking.run("-m", "dragon.vm.doctor", "--help", cwd=tmp_path)
    assert code == 0
    assert out.startswith("usage: dragon-vm doctor")
    assert "python   " not in out


def test_an_unknown_argument_is_refused(forking: Forking, tmp_path: Path) -> None:
    code, _, err = forking.run("-m", "dragon.vm.doctor", "--verbose", cwd=tmp_path)
    assert code == 2
    assert "unrecognized arguments: --verbose" in err


def test_a_reader_that_leaves_ends_it_quietly(forking: Forking, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = forking.run("-m", "dragon.vm.doctor", cwd=tmp_path, printing_to=writer)
    os.close(writer)
    assert (ended.code, ended.err) == (1, "")
