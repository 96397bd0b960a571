"""The doctor finds what is wrong, and nothing where nothing is."""

from pathlib import Path

import pytest
import torch

from dragon.vm import doctor
from dragon.vm.torch.optim import Adam
from dragon.vm.torch.optim._backend import why_not


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


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_every_backend_agrees_with_the_reference(backend: str) -> None:
    finding = doctor.self_test(backend, CPU, Clock())
    assert not finding.is_wrong
    assert finding.text == "3 steps agree with the reference"


def test_a_step_is_taken_however_slow_the_machine_is() -> None:
    assert doctor.self_test("eager", CPU, Clock(step=100.0)).text.startswith("1 steps")


def test_a_wrong_step_is_found_and_named() -> None:
    finding = doctor.self_test("eager", CPU, Clock(), Wrong)
    assert finding.is_wrong
    assert "wrong: step 1: param[" in finding.text


def test_a_backend_that_fails_is_a_finding_and_no_crash() -> None:
    finding = doctor.self_test("eager", CPU, Clock(), Failing)
    assert finding == ("eager on cpu", "fails: RuntimeError: no kernel image is available", True)


def test_a_missing_parity_kit_is_said_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dragon.vm.testing", None)
    finding = doctor.self_test("eager", CPU, Clock())
    assert not finding.is_wrong
    assert finding.text.startswith("not tested")


def test_the_chosen_backend_is_told_with_why_no_other_is() -> None:
    finding = doctor.chosen_backend(CPU)
    assert not finding.is_wrong
    assert "backend native; not triton: " in finding.text


def test_an_ignored_tuning_file_is_wrong(tuning_folder: Path) -> None:
    assert not any(finding.is_wrong for finding in doctor.tuning_files())
    (tuning_folder / "sm_90" / "gpu").mkdir(parents=True)
    (tuning_folder / "sm_90" / "gpu" / "x.json").write_text("{")
    wrong = [finding for finding in doctor.tuning_files() if finding.is_wrong]
    assert len(wrong) == 1
    assert str(tuning_folder / "sm_90" / "gpu" / "x.json") in wrong[0].text


def test_versions_are_told_and_absent_packages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    texts = {finding.topic: finding for finding in doctor.versions()}
    assert torch.__version__.startswith(texts["torch"].text)
    assert texts["no-such-package"] == ("no-such-package", "not installed", False)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_exit_status_says_if_something_is_wrong(
    is_wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("topic", "text", is_wrong)]))
    assert doctor.main() == is_wrong
    assert ("WRONG" in capsys.readouterr().out) == is_wrong


def test_the_whole_examination_finds_this_installation_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.0)
    findings = list(doctor.examine())
    assert [finding for finding in findings if finding.is_wrong] == []
    assert {f"{backend} on cpu" for backend in BACKENDS_HERE} <= {finding.topic for finding in findings}


def test_it_says_how_steps_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    for maps, texts in (
        ((), ("compare all tensors at once", "compare the counts")),
        (None, ("ask each tensor", "compare all states")),
    ):
        for name in ("header_map", "container_map"):
            monkeypatch.setattr(doctor, name, lambda maps=maps: maps)
        for finding, topic, text in zip(doctor.step_comparison(), ("headers", "dicts"), texts, strict=True):
            assert finding.topic == topic
            assert text in finding.text
            assert not finding.is_wrong
