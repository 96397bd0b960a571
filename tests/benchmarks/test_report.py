"""The page says what the lines say, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import records, report
from benchmarks.host import REFERENCE
from benchmarks.plots import Plot, draw, speeds
from benchmarks.probe.report import config_rows, kernel_rows, mode_tables, read
from benchmarks.records import FAILED, SKIPPED, TIMED, WRONG, Record
from benchmarks.tables import figure, host_rows, rival_rows, rows_of
from dragon.vm.measuring.timer import Spread

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

ABOUT = {"run": "1", "date": "2026-01-01T00:00:00Z", "commit": "abc", "device": "A CPU", "device_type": "cpu",
         "driver": None, "n_threads": 2, "versions": {"torch": "2.11"}}  # fmt: skip


def record(case: str = "1 x 20M", contender: str = "ours native", ms: float = 2.0, **fields) -> Record:
    fields = {"status": TIMED, "cold_ms": Spread(ms, ms, ms, 3), "reference": "torch fused", **fields}
    return Record(case, "fp32", contender, environment=fields.pop("environment", ABOUT), **fields)


def test_the_committed_page_is_what_the_committed_lines_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == report.render(records.read(RESULTS), read(RESULTS / "probe"))


def test_the_committed_pictures_show_the_committed_lines() -> None:
    plots = {f"{plot.name}.svg": plot for plot in report.plots_of(records.read(RESULTS))}
    shown = set(re.findall(r"\(images/([^)]+)\)", PAGE.read_text(encoding="utf-8")))
    assert shown == set(plots)
    for name, plot in plots.items():
        picture = (PAGE.parent / "images" / name).read_text(encoding="utf-8")
        assert plot.digest in picture, f"{name}: python -m benchmarks report"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_pages_show_a_picture_of_the_committed_lines(page: str) -> None:
    (shown,) = re.findall(r"images/([\w-]+)\.svg", (ROOT / page).read_text(encoding="utf-8"))
    assert shown in {plot.name for plot in report.plots_of(records.read(RESULTS))}


# Rows of the README's table of speed, and columns: text in the name of the device, and our backend there.
ROWS = {
    "1000 tensors of 1000 elements": "1000 x 1000",
    "1000 tensors of one element": "1000 x 1",
    "465 parameter groups": "465 groups",
    "GPT-2, 124M parameters": "GPT-2 124M",
    "GPT-2, chain: unscale, clip, check for infinities, update": "chain, GPT-2 124M",
    "one tensor of 1B parameters": "1 x 1B",
    "one tensor of 20M parameters": "1 x 20M",
    "300 tensors, of which each step trains another half": "300 x 1000, changing",
}
COLUMNS = {
    "H100": ("NVIDIA H100", "ours triton"),
    "2 cores of an Intel Xeon": ("Xeon(R) Processor, 2 cores, 2 threads", "ours native"),
    "2 cores of an AMD EPYC": ("EPYC, 2 cores, 2 threads", "ours native"),
}


def test_the_readme_tells_the_measured_speed() -> None:
    columns = []
    for device, contender in COLUMNS.values():
        found = [each for name, each in report.by_device(records.read(RESULTS)).items() if device in name]
        columns.append(
            {
                each.case: f"{each.ratio.median:.2f}"
                for each in report.latest(*found)
                if (each.precision, each.contender) == ("fp32", contender) and each.ratio is not None
            }
        )
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    first = table.index(["a step of", *COLUMNS])
    expected = [[label, *(ratios.get(case, "") for ratios in columns)] for label, case in ROWS.items()]
    assert table[first + 2 : first + 2 + len(ROWS)] == expected


def test_bars_show_the_ratio_of_every_contender() -> None:
    found = [record(case, name, ratio=Spread(r, 0, 9, 3)) for case, name, r in (("b", "x", 1.0), ("a", "y", 2.0))]
    plot = speeds([*found, record("c", "copy_")], "p")
    assert plot.categories == ("b", "a")
    assert plot.series == {"x": [(0, 1.0)], "y": [(1, 2.0)]}


spreads = st.none() | st.builds(Spread, *[st.floats(1e-6, 1e6)] * 3, st.integers(1, 99))


@given(st.builds(Record, *[st.text()] * 4, st.just(ABOUT), ratio=spreads, cold_ms=spreads, numel=st.integers(0)))
def test_a_record_is_one_line_that_reads_back(original: Record) -> None:
    line = original.as_line()
    assert "\n" not in line
    again = records.from_line(line)
    assert again.as_line() == line
    assert (again.case, again.reason, again.numel) == (original.case, original.reason, original.numel)
    for found, spread in ((again.ratio, original.ratio), (again.cold_ms, original.cold_ms)):
        assert (found is None) == (spread is None)
        assert spread is None or found.median == pytest.approx(spread.median, rel=1e-4)


def test_lines_are_appended_and_read_in_order(tmp_path: Path) -> None:
    records.append(tmp_path / "new" / "b.jsonl", [record("1 x 20M")])
    records.append(tmp_path / "new" / "b.jsonl", [record("1000 x 1")])
    records.append(tmp_path / "new" / "a.jsonl", [record("ViT-B")])
    assert [found.case for found in records.read(tmp_path / "new")] == ["ViT-B", "1 x 20M", "1000 x 1"]


def test_a_contenders_last_line_in_a_run_counts_and_a_cut_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records.append(path, [record(ms=1.0), record(contender="other"), record(ms=2.0)])
    with path.open("a") as file:
        file.write(record(ms=3.0).as_line()[:-20])
    found = records.read(path)
    assert [(r.contender, r.cold_ms.median) for r in found] == [("ours native", 2.0), ("other", 2.0)]


@pytest.mark.parametrize("n_cut", [1, 5, 100, 1000])
def test_lines_behind_a_cut_one_are_read(n_cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records.append(path, [record(ms=1.0), record(contender="other", reason="x" * 1000)])
    # A killed process had written only so much.
    path.write_bytes(path.read_bytes()[:-n_cut])
    records.append(path, [record("ViT-B"), record("ViT-L")])
    n_whole = 1 if n_cut == 1 else 0
    assert [found.case for found in records.read(path)] == ["1 x 20M", *["1 x 20M"] * n_whole, "ViT-B", "ViT-L"]


def test_a_case_is_shown_as_last_measured_and_ours_never_mixed_from_commits() -> None:
    def run(number: str, commit: str = "b", torch: str = "2.11") -> dict[str, Any]:
        return {**ABOUT, "run": number, "commit": commit, "versions": {"torch": torch}}

    found = report.latest(
        [
            record(contender="ours eager", environment=run("1", "a")),
            record(contender="torch foreach", environment=run("1", "a")),
            record(contender="torch compiled", environment=run("1", "a", "2.10")),
            record(contender="of less layers", numel=1, environment=run("1", "a")),
            record(contender="wrong since", environment=run("1", "a")),
            record(environment=run("1", "a")),
            record(contender="wrong since", status=WRONG, cold_ms=None, environment=run("2")),
            record(contender="torch fused", environment=run("2")),
            record(contender="optimi", environment=run("2")),
            record(contender="torch fused", environment=run("3")),
            record(ms=1.0, environment=run("3")),
            record(status=SKIPPED, cold_ms=None, environment=run("4")),
            record("1000 x 1"),
        ]
    )
    shown = [(r.case, r.contender, r.environment["run"], r.status) for r in found]
    assert shown == [
        ("1000 x 1", "ours native", "1", TIMED),
        ("1 x 20M", "torch foreach", "1", TIMED),
        ("1 x 20M", "wrong since", "2", WRONG),
        ("1 x 20M", "ours native", "3", TIMED),
        ("1 x 20M", "torch fused", "3", TIMED),
        ("1 x 20M", "optimi", "2", TIMED),
    ]


def test_a_row_shows_the_time_and_a_wrong_contender_is_named() -> None:
    wrong = record(contender="quick but wrong", status=WRONG, cold_ms=None, reason="off by 1")
    content = rows_of([record(ratio=Spread(1.5, 1, 2, 3), share_of_copy=0.25), wrong])
    assert content.rows == [("ours native", "2.00", "2.00-2.00", "", "", "", "1.50", "", "", "25.0%")]
    assert content.absent == [("quick but wrong", "WRONG: off by 1")]


def test_a_model_that_lost_layers_says_so() -> None:
    assert "3 of 32 layers" in rows_of([record(n_layers=3, n_layers_of_model=32)]).title
    assert "layers" not in rows_of([record(n_layers=32, n_layers_of_model=32)]).title


def test_the_rival_is_the_fastest_other_with_states_of_equal_size() -> None:
    def as_fast(contender: str, ratio: float, reference: str | None = "torch fused", nbytes: float = 8) -> Record:
        spread = Spread(ratio, 0, 9, 3)
        return record(contender=contender, ratio=spread, reference=reference, state_nbytes=nbytes)

    others = [
        as_fast("a", 0.5),
        as_fast("b", 1.5),
        as_fast("16-bit states", 5.0, nbytes=4),
        as_fast("ours eager", 9.0),
        as_fast("copy_", 9.0, None),
    ]
    (row,) = rival_rows([as_fast("ours native", 3.0), *others])
    assert row == ("1 x 20M, fp32", "ours native", "2.00", "b", "2.00", "2.00")


def test_host_work_is_shown_for_few_and_many_tensors() -> None:
    found = [
        record(
            f"host, {n} x 16{end}",
            "ours triton-host",
            cold_ms=None,
            host_ms=Spread((20 + each * n) / 1000, 0, 9, 3),
            ratio=Spread(ratio, 0, 9, 3),
            n_tensors=n,
            reference=REFERENCE,
        )
        for end, each in (("", 0.5), (", kept gradients", 0.25))
        for n, ratio in ((10, 1.5), (1000, 2.5))
    ]
    assert host_rows(found) == [
        ("ours triton-host", "25.0", "1.50", "520", "2.50", "0.500"),
        ("ours triton-host, kept gradients", "22.5", "1.50", "270", "2.50", "0.250"),
    ]
    page = report.render(found)
    assert "### Host work" in page
    assert "ms a step | 20th" not in page


@pytest.mark.parametrize(
    ("contender", "status", "is_defect"),
    [
        ("ours native", FAILED, True),
        ("optimi", FAILED, False),
        ("optimi", WRONG, True),
        ("ours native", SKIPPED, False),
        ("ours native", TIMED, False),
    ],
)
def test_a_run_fails_by_a_wrong_result_or_by_one_of_ours(contender: str, status: str, is_defect: bool) -> None:
    assert record(contender=contender, status=status).is_defect is is_defect


def test_a_picture_holds_the_digest_of_its_data(tmp_path: Path) -> None:
    plot = Plot("p", "title", "x", "y", {"ours": [(1.0, 2.0), (3.0, 4.0)]})
    other = plot._replace(series={"ours": [(1.0, 2.0), (3.0, 4.1)]})
    assert plot.digest != other.digest
    assert plot.digest in draw(plot, tmp_path).read_text(encoding="utf-8")


def test_the_page_begins_with_what_compares_and_ends_with_details() -> None:
    fast, slow = (
        record(contender=name, ratio=Spread(2, 1, 3, 3), state_nbytes=8) for name in ("ours native", "optimi")
    )
    page = report.render([fast, slow])
    order = ["# Performance", "## A CPU", "### Against the fastest other", "abc", "## Method", "## Details: A CPU"]
    places = [page.index(f"{heading}") for heading in order]
    assert places == sorted(places)
    # The row of a case stands below.
    assert page.index("\n| ours native |") > places[-1]


def test_without_lines_the_page_says_so() -> None:
    assert report.ABSENT in report.render([])


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.012345, "0.0123"), (1.0, "1.00"), (123.4, "123"), (12345.6, "12,346")]
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_a_probe_that_was_killed_or_failed_in_part_has_tables_of_the_rest(tmp_path: Path) -> None:
    lines = [
        {"part": "device", "name": "A CPU"},
        {"part": "graph", "failed": True, "capture": "first", "tensors": 1, "numel": 2, "wrong": "no change"},
        {"part": "norm", "kind": "L2", "dtype": "float32", "tensors": 3, "ms": 0.5, "of_copy": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"part": "la')
    assert kernel_rows(read(tmp_path)["A CPU"]) == [("L2 norm, float32, 3 tensors", "500.0", "")]
    (tmp_path / "a.jsonl").write_text('{"part": "device"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: KeyError: 'name'"):
        read(tmp_path)


def test_a_probes_lines_are_tables_of_its_device(tmp_path: Path) -> None:
    mode = {"part": "mode", "cold_us": 3.0, "host_us": 1.0, "tensors": 1}
    lines = [
        {"part": "device", "name": "A CPU"},
        {**mode, "contender": "ours triton", "numel": 9, "device_us": 2000.0},
        {**mode, "contender": "split16", "numel": 9, "device_us": 1.0},
        {**mode, "contender": "split16", "numel": 9, "device_us": 1000.0},
        {**mode, "contender": "ours triton", "tensors": 2, "numel": 8, "device_us": 7.0},
        {**mode, "contender": "split16", "numel": 7, "device_us": 7.0},
        {"part": "mode config", "mode": "split16", "config": "1024/4", "us": 30.4},
        {"part": "mode config", "mode": "split16", "config": "512/2", "us": 29.0},
        {"part": "norm", "kind": "L2", "dtype": "float32", "tensors": 3, "ms": 0.5, "of_copy": 0.25},
        {"part": "advance", "tensors": 2, "partials": 5, "us": 4.0},
        {"part": "launch", "host_us": 30.0},
        {"part": "launch", "host_us": 9.0},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.render([record()], read(tmp_path))
    assert ("Memory modes: one tensor of 9 parameters" in page) == ("## A CPU\n" in page)
    (title, rows), (of_two, _) = mode_tables(read(tmp_path)["A CPU"])
    assert (title, of_two) == (
        "Memory modes: one tensor of 9 parameters",
        "Memory modes: 2 tensors, 8 parameters",
    )
    assert rows == [
        ("ours, fp32", "2.000", "1.00", "0.003", "0.001"),
        ("ours, split16", "1.000", "2.00", "0.003", "0.001"),
    ]
    assert config_rows(read(tmp_path)["A CPU"]) == [("split16", "512/2: 29, 1024/4: 30")]
    assert kernel_rows(read(tmp_path)["A CPU"]) == [
        ("L2 norm, float32, 3 tensors", "500.0", "25.0%"),
        ("counters and scalars of 2 tensors, 5 partial norms", "4.0", ""),
        ("host time of a launch", "9.0", ""),
    ]
