"""The commands, as a user gives them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import host, runner
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS

QUICK = ["--rounds", "2", "--turns", "0.05", "--device", "cpu"]


def test_a_run_writes_a_line_a_contender_and_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "lines.jsonl"
    arguments = ["--case", "10 x 16", "--dtype", "fp32", "--contender", "ours native", "--note", "a test"]
    assert benchmarks.main([*arguments, "--out", str(out), *QUICK]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {line["contender"] for line in lines} == {"copy_", "torch fused", "ours native"}
    for line in lines:
        assert line["note"] == "a test"
        assert set(line["environment"]) >= {"device", "driver", "n_threads", "versions", "commit", "date"}
        assert "torch" in line["environment"]["versions"]
    assert "ours native" in capsys.readouterr().out
    assert benchmarks.main(["report", "--results", str(out), "--page", str(tmp_path / "page.md")]) == 0
    assert "**a test**" in (tmp_path / "page.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("interpreted")
def test_host_work_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "N_TENSORS", (2, 3))
    out = tmp_path / "lines.jsonl"
    assert benchmarks.main(["host", "--rounds", "2", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    cases = {"host, 2 x 16", "host, 3 x 16"}
    assert {line["case"] for line in lines} == cases | {f"{name}, kept gradients" for name in cases}
    assert {line["contender"] for line in lines} == set(host.CONTENDERS)
    assert "host work" in capsys.readouterr().out


def test_a_run_in_which_one_of_ours_fails_says_so_by_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(workload: object) -> None:
        raise ModuleNotFoundError("No module named 'platformdirs'")

    monkeypatch.setitem(CONTENDERS, "ours native", replace(CONTENDERS["ours native"], build=fail))
    arguments = ["--case", "10 x 16", "--contender", "ours native", "--dtype", "fp32"]
    assert benchmarks.main([*arguments, "--out", str(tmp_path / "lines.jsonl"), *QUICK]) == 1
    assert "failed: 10 x 16, ours native: ModuleNotFoundError: No module named" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--rounds", "0"], "argument --rounds: expected a whole number of at least 1, got '0'"),
        (["run", "--turns", "-1"], "argument --turns: expected a number of seconds above 0, got '-1'"),
        (["run", "--turns", "nan"], "argument --turns: expected a number of seconds above 0, got 'nan'"),
        (["host", "--rounds", "many"], "argument --rounds: expected a whole number of at least 1, got 'many'"),
        (["run", "--threads", "-2"], "argument --threads: expected a whole number of at least 1, got '-2'"),
        (["run", "--device", "gpu"], "argument --device: no such device here: 'gpu'"),
        (["run", "--device", "vulkan"], "argument --device: no such device here: 'vulkan'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"case": "x", "other": 1}', "'other'"),
        ('{"case": x}', "Expecting value"),
        ('{"cold_ms": {"a": 1}}', "'a'"),
    ],
)
def test_a_line_that_is_no_record_is_named(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    results.write_text(f"\n{line}\n")
    with pytest.raises(SystemExit):
        benchmarks.main(["report", "--results", str(results), "--page", str(page)])
    error = capsys.readouterr().err
    assert f"{results}, line 2: " in error
    assert said in error
    assert not page.exists()


def test_a_page_stays_where_there_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("kept")
    assert benchmarks.main(["report", "--results", str(tmp_path), "--page", str(page)]) == 1
    assert f"--results {tmp_path}: there are no results" in capsys.readouterr().err
    assert page.read_text() == "kept"


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
    assert (
        benchmarks.main(
            [
                "--case",
                "10 x 16",
                "--case",
                "1000 x 1",
                "--dtype",
                "fp32",
                "--contender",
                "ours native",
                "--out",
                str(out),
                *QUICK,
            ]
        )
        == 1
    )
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {line["reason"] for line in lines if line["case"] == "1000 x 1"} == {"RuntimeError in this case"}
    assert {line["status"] for line in lines if line["case"] == "10 x 16"} == {"timed"}


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
