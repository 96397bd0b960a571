"""The commands, as a user gives them."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import runner, sanitize
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS

SCRIPT = Path(benchmarks.__file__).parent / "gpu.sh"
QUICK = ["--rounds", "2", "--turns", "0.05", "--device", "cpu"]


def test_a_run_writes_a_line_a_contender_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "lines.jsonl"
    arguments = ["--case", "10 x 16", "--note", "a test", "--out", str(out), *QUICK]
    assert benchmarks.main(arguments) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {line["contender"] for line in lines} == {
        "copy_",
        "torch fused-host",
        "ours triton-host",
        "bound addresses",
    }
    for line in lines:
        assert line["note"] == "a test"
        assert set(line["environment"]) >= {"device", "driver", "n_threads", "versions", "commit", "date"}
        assert "torch" in line["environment"]["versions"]
    printed = capsys.readouterr().out
    assert "ours triton-host" in printed
    assert benchmarks.main(["report", "--results", str(out), "--page", str(tmp_path / "page.md")]) == 0
    assert "**a test**" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    assert benchmarks.main(["--case", "10 x 16", "--budget", "-1", "--out", str(out), *QUICK]) == 0
    reasons = {json.loads(line)["reason"] for line in out.read_text(encoding="utf-8").splitlines()}
    assert reasons == {"the run's -1 s were used up"}


def test_a_case_that_fails_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(*arguments: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "make_origin", fail_once)
    out = tmp_path / "lines.jsonl"
    assert benchmarks.main(["--case", "10 x 16", "--case", "100 x 16", "--out", str(out), *QUICK]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {line["reason"] for line in lines if line["case"] == "10 x 16"} == {"RuntimeError in this case"}
    assert {line["status"] for line in lines if line["case"] == "100 x 16"} == {"timed"}


@pytest.mark.parametrize("arguments", [["--case", "nothing"], ["--contender", "nobody"]])
def test_an_unknown_name_ends_before_anything_is_measured(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(arguments)
    assert stopped.value.code == 2
    assert "is called 'no" in capsys.readouterr().err


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["list"]) == 0
    printed = capsys.readouterr().out.split("\n  ")
    assert {name.partition("\n")[0] for name in printed} >= {*CASES, *CONTENDERS}


def test_the_kernels_that_are_sanitized_do_what_the_eager_backend_does(
    interpreted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitize.main(["--dry", "--variant", "momentum"]) == 0
    assert capsys.readouterr().out.count(" as eager") == 2


def test_a_kernel_that_does_something_else_is_reported(
    interpreted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "difference", lambda *arguments: 0.5)
    assert sanitize.main(["--dry", "--variant", "SGD fp32"]) == 1
    assert "NOT as eager" in capsys.readouterr().out


def test_the_script_for_gpus_is_executable_bash() -> None:
    assert SCRIPT.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", SCRIPT], check=True)
