"""Every contender of a case ends as one record: timed, wrong, or skipped with a reason."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import environment, runner, timing
from benchmarks.cases import BF16, FP32, MIXED, PRECISIONS, Case
from benchmarks.contenders import CONTENDERS, TORCH_FUSED, Contender, foreign, is_flat
from benchmarks.records import FAILED, SKIPPED, TIMED, WRONG, Record
from benchmarks.runner import COPY, Run, measure
from benchmarks.timing import Turn
from benchmarks.workload import Workload, make_origin
from dragon.vm.measuring.shapes import equal

CPU = torch.device("cpu")
TINY = Case("tiny", equal(3, 40), n_groups=2)
FUSED = CONTENDERS[TORCH_FUSED]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are of no interest here."""
    monkeypatch.setattr(timing, "MOST_WARM", 1)


def records_of(*contenders: Contender, case: Case = TINY, precision=FP32, reason=None) -> dict[str, Record]:
    run = Run(CPU, n_rounds=2, budget_s=0.05, environment=environment.describe(CPU), note="a test")
    found = measure(run, case, precision, contenders, reason)
    assert len({record.contender for record in found}) == len(found)
    return {record.contender: record for record in found}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
@pytest.mark.parametrize("case", [TINY, replace(TINY, chain=True, n_groups=1)], ids=["plain", "chain"])
def test_every_contender_is_right_or_says_why_it_is_absent(case: Case, precision) -> None:
    # What is compiled takes a minute of tests, and is right wherever torch's foreach is.
    chosen = [contender for contender in CONTENDERS.values() if not contender.only]
    found = records_of(*chosen, case=case, precision=precision)
    assert set(found) == {COPY, *(contender.name for contender in chosen)}
    assert {name: r.reason for name, r in found.items() if r.is_defect} == {}
    assert all(r.reason for r in found.values() if r.status in (SKIPPED, FAILED))
    timed = {name for name, record in found.items() if record.status == TIMED}
    assert timed >= {COPY, TORCH_FUSED, "torch foreach", "torch for-loop", "ours eager"}
    assert ("ours native" in timed) == (precision != MIXED)
    assert ("ours triton" in timed) == (os.environ.get("TRITON_INTERPRET") == "1")
    for name in timed - {COPY}:
        record = found[name]
        assert record.note == "a test"
        assert record.cold_ms is not None
        assert record.cold_ms.median > 0
        assert record.ratio is not None
        assert record.share_of_copy is not None
        assert record.error is not None
        assert record.error <= CONTENDERS[name].tolerance_for(precision)


def test_a_wrong_contender_is_reported_and_not_timed() -> None:
    wrong = Contender("wrong", lambda workload: lambda: None)
    found = records_of(FUSED, wrong)
    assert found["wrong"].status == WRONG
    assert found["wrong"].cold_ms is None
    assert found["wrong"].is_defect
    assert "learning rates a step" in str(found["wrong"].reason)
    assert found[TORCH_FUSED].status == TIMED


def test_whatever_a_contender_raises_is_its_reason() -> None:
    build = foreign(torch.optim.Adam, fused=True, foreach=True)
    found = records_of(FUSED, Contender("refuses", build), Contender("ours refuses", build))
    for name in ("refuses", "ours refuses"):
        assert found[name].status == FAILED
        assert str(found[name].reason).startswith("RuntimeError: `fused` and `foreach`")
    assert [record.contender for record in found.values() if record.is_defect] == ["ours refuses"]


def test_a_contender_that_is_not_installed_says_so() -> None:
    found = records_of(FUSED, Contender("absent", FUSED.build, module="no_such_module_here"))
    assert found["absent"].reason == "no_such_module_here is not installed"


def test_an_option_without_effect_is_not_measured() -> None:
    idle = replace(CONTENDERS["ours eager"], name="ours idle", verify=lambda workload: "it had no effect")
    found = records_of(FUSED, idle)["ours idle"]
    assert (found.status, found.reason) == (FAILED, "it had no effect")


@pytest.mark.parametrize(("distance", "flat"), [(40, True), (48, True), (200, False)])
def test_parameters_are_flat_if_they_lie_next_to_each_other_in_each_group(distance: int, flat: bool) -> None:
    workload = Workload(make_origin(replace(TINY, shapes=equal(4, 40)), FP32, CPU))
    buffer = torch.zeros(5000)
    for i, param in enumerate(workload.params):
        start = i * distance + (2000 if i >= 2 else 0)
        param.data = buffer[start : start + 40]
    assert (is_flat(workload) is None) == flat


def test_a_case_that_does_not_fit_is_skipped_by_all() -> None:
    found = records_of(FUSED, case=Case("huge", equal(1, 10**13)))
    assert found[TORCH_FUSED].status == SKIPPED
    assert "10,000,000,000,000 parameters, but memory for" in str(found[TORCH_FUSED].reason)


def test_a_case_can_be_skipped_as_a_whole() -> None:
    assert records_of(FUSED, reason="late")[TORCH_FUSED].reason == "late"


def test_contenders_that_do_not_fit_beside_each_other_are_measured_one_after_another(monkeypatch) -> None:
    others = [replace(FUSED, name=f"other {i}") for i in range(3)]
    # Memory for the origin and two contenders of 20 bytes a parameter, not for three.
    monkeypatch.setattr(environment, "free_nbytes", lambda device: runner.MOST_COPIED + (8 + 50) * TINY.numel)
    batches: list[list[str]] = []
    monkeypatch.setattr(runner, "take_turns", lambda entries, *args, **kwargs: batches.append(_turn(entries)))
    found = records_of(FUSED, *others)
    assert batches == [[COPY, TORCH_FUSED, other.name] for other in others]
    assert set(found) == {COPY, TORCH_FUSED, *(other.name for other in others)}


def _turn(entries) -> list[str]:
    for entry in entries:
        entry.turns.append(Turn(1.0))
    return [entry.name for entry in entries]


@given(st.lists(st.floats(1, 10), max_size=10), st.floats(0, 30))
def test_batches_hold_everybody_once_and_fit(held: list[float], free: float) -> None:
    contenders = [replace(FUSED, name=str(i)) for i in range(len(held))]
    batches = runner._batches(contenders, {str(i): size for i, size in enumerate(held)}, free)
    assert [contender for batch in batches for contender in batch] == contenders
    for batch in batches:
        assert len(batch) <= 1 or sum(held[int(contender.name)] for contender in batch) <= free


@pytest.mark.parametrize(
    ("contender", "case", "precision", "nbytes"),
    [
        ("torch fused", TINY, FP32, 28),
        ("ours triton", TINY, FP32, 28),
        ("ours triton", replace(TINY, amsgrad=True), FP32, 36),
        ("ours triton", TINY, MIXED, 22),
        ("ours triton", TINY, BF16, 14),
        ("torch fused", TINY, BF16, 14),
        ("ours triton", replace(TINY, chain=True), FP32, 32),
        ("ours triton", replace(TINY, chain=True), MIXED, 24),
        ("torch fused", replace(TINY, chain=True), FP32, 48),
    ],
)
def test_bytes_are_those_of_the_formats_that_a_contender_keeps(contender, case, precision, nbytes) -> None:
    assert CONTENDERS[contender].nbytes_per_param(case, precision, torch.device("cuda")) == nbytes


def test_slow_contenders_are_measured_after_the_others_and_apart() -> None:
    slow = replace(FUSED, name="slow", slow=True)
    others = [replace(FUSED, name=name) for name in "ab"]
    held = dict.fromkeys(("slow", "a", "b"), 1.0)
    assert runner._batches([slow, *others], held, 10.0) == [others, [slow]]


def test_records_of_the_first_rounds_are_written_before_the_case_is_done() -> None:
    written: list[list[Record]] = []
    run = Run(CPU, timing.FEWEST_ROUNDS + 1, 5.0, environment.describe(CPU), on_records=written.append)
    absent = replace(FUSED, name="absent", module="no_such_module_here")
    final = measure(run, TINY, FP32, [FUSED, absent])
    assert [{record.contender for record in records} for records in written] == [
        {"absent"},
        {COPY, TORCH_FUSED},
        {COPY, TORCH_FUSED},
    ]
    counts = [record.cold_ms.n for records in written[1:] for record in records if record.contender == TORCH_FUSED]
    assert counts == [timing.FEWEST_ROUNDS, timing.FEWEST_ROUNDS + 1]
    assert {record.contender for record in final} == {COPY, TORCH_FUSED, "absent"}
