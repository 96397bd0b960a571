import json
import math
import re
from pathlib import Path
from statistics import mean

import pytest
import torch

from benchmarks.memory import measure, steps
from benchmarks.memory.histories import HISTORIES, largest_update
from benchmarks.memory.modes import BETAS, MODES, OURS, trained
from benchmarks.memory.page import PAGE, kept_bytes, read, section
from benchmarks.memory.peers import (
    Dynamic,
    Float8,
    LinearRoot,
    Moments,
    PeerAdam,
    Softsign,
    _dynamic_table,
)
from benchmarks.memory.training import TRAININGS, Outcome, train_digits, train_text
from dragon.vm.measuring.shapes import gpt2
from dragon.vm.torch.optim._formats.format import Format
from dragon.vm.torch.optim._formats.rounding import Plain

STEPS = Path(__file__).parents[2] / "benchmarks" / "results" / "memory" / "steps.jsonl"


def relative_error(form: Format, value: torch.Tensor) -> float:
    return float((form.decode(form.encode(value)) - value).norm() / value.norm())


@pytest.mark.parametrize(
    ("form", "signed", "largest"),
    [
        (Softsign(), True, 0.01),
        (LinearRoot(), False, 0.01),
        (Dynamic(True), True, 0.02),
        (Dynamic(False), False, 0.01),
        (Float8(), True, 0.04),
    ],
)
def test_the_models_of_peers_store_ordinary_moments_well(form: Format, signed: bool, largest: float) -> None:
    value = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert 0 < relative_error(form, value if signed else value.square()) < largest


def test_the_tables_have_256_entries_at_most() -> None:
    for signed in (True, False):
        assert 255 <= len(_dynamic_table(signed)) <= 256


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("history", HISTORIES)
def test_no_update_of_ours_is_larger_than_exact_adam_could_make_it(name: str, history: str) -> None:
    # A parameter in bf16 rounds its update by 1 in 128 at most.
    assert largest_update(MODES[name], history, 60) < 7.28 * (1 + 2**-7)


def test_a_peers_update_is() -> None:
    assert largest_update(MODES["FlashOptim's"], "one element in 64 x 1000", 60) > 1e3


def test_the_loop_of_peers_is_pytorchs_adam() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(64, 64))
    same = param.detach().clone()
    loop = PeerAdam([same], Moments(Plain(torch.float32), Plain(torch.float32)), BETAS)
    reference = torch.optim.Adam([param], lr=1e-3)
    for _ in range(20):
        param.grad = torch.randn(64, 64)
        same.grad = param.grad.clone()
        loop.step(1e-3)
        reference.step()
    assert torch.allclose(same, param, rtol=0, atol=1e-6)
    assert torch.allclose(loop.second_moment(), reference.state[param]["exp_avg_sq"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODES)
def test_a_network_sees_what_is_stored(name: str) -> None:
    torch.manual_seed(0)
    param = torch.randn(64, 64).bfloat16().float()
    start = param.clone()
    optimizer = trained([param], MODES[name])
    for _ in range(3):
        param.grad = torch.randn(64, 64)
        optimizer.step(0.1)
    assert param.grad is None
    assert 0.02 < float((param - start).abs().mean()) < 0.3
    if MODES[name].dtype == torch.bfloat16:
        assert torch.equal(param, param.bfloat16().float())


@pytest.mark.parametrize(
    ("name", "expected"), [("fp32", 12), ("8bit", 6.125), ("split8, 8bit", 5.125), ("e4m3", 6 + 8 / 128)]
)
def test_the_kept_bytes_are_those_that_are_allocated(name: str, expected: float) -> None:
    assert kept_bytes(name) == expected


@pytest.mark.parametrize("name", MODES)
def test_every_mode_learns(name: str) -> None:
    outcome = train_digits(MODES[name], 0, 40)
    assert outcome.losses[0] == pytest.approx(math.log(10), abs=0.2)
    # What a peer's format does to the loss is for the measurement to say.
    assert len(outcome.losses) == 40
    if name in OURS:
        assert outcome.final < 1.5


def test_the_transformer_learns() -> None:
    outcome = train_text(MODES["fp32"], 0, 10)
    assert outcome.losses[-1] < outcome.losses[0]


def test_every_mode_is_timed_beside_fp32() -> None:
    records = steps.measure(["split16", "split8, 8bit"], ((64, 64), (64,)), 1)
    assert [record["mode"] for record in records] == ["fp32", "split16", "split8, 8bit"]
    assert records[0]["ratio"] == 1
    assert all(record["numel"] == 64 * 65 and record["ratio"] > 0 for record in records)


def test_the_measured_losses_of_ours_are_those_of_fp32() -> None:
    lines = [line for line in read() if line["measure"] == "final_loss"]
    losses = {(line["mode"], line["of"], line["seed"]): line["value"] for line in lines}
    seeds = {seed for _, _, seed in losses}
    assert len(seeds) == 5

    def difference(mode: str, training: str) -> float:
        return mean(losses[mode, training, seed] - losses["fp32", training, seed] for seed in seeds)

    kept = [name for name in OURS if "to nearest" not in name]
    assert {name for name in kept if abs(difference(name, "text")) > 0.0005} == set()
    assert {name for name in kept if abs(difference(name, "digits")) > 0.0005} == set()
    worst = {
        name: max(losses[name, "digits", seed] / losses["fp32", "digits", seed] for seed in seeds) for name in kept
    }
    assert {name: ratio for name, ratio in worst.items() if ratio > 1.5} == {}
    assert difference("bf16 to nearest", "text") > 0.005, "nothing would be seen"


def test_the_page_has_the_table_that_the_lines_give() -> None:
    assert section(read()) in PAGE.read_text(encoding="utf-8")


def test_the_page_tells_the_measured_times() -> None:
    lines = [json.loads(line) for line in STEPS.read_text().splitlines()]
    ratios = {line["mode"]: line["ratio"] for line in lines}
    page = (STEPS.parents[3] / "docs" / "memory.md").read_text()
    (sentence,) = re.findall(r"One thread of an AMD EPYC was measured .*?\.memory\.steps .*?`", page, re.DOTALL)
    told = ["fp32 masters", "split16", "bf16 states", "8bit", "split8, 8bit"]
    assert [int(number) for number in re.findall(r"(\d+)\s+times", sentence)] == [
        round(ratios[mode]) for mode in told
    ]
    (shown,) = re.findall(r"steps --layers (\d+) --vocabulary (\d+) --threads (\d+)`", sentence)
    n_layers, vocabulary, n_threads = map(int, shown)
    numel = sum(map(math.prod, gpt2(n_layers, 768, vocabulary)))
    assert {(line["numel"], line["threads"]) for line in lines} == {(numel, n_threads)}


def test_the_parts_of_a_mode_are_together_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(measure, "largest_update", lambda *_: 1.0)
    monkeypatch.setattr(measure, "forgetting", lambda _: 1.0)
    for name in TRAININGS:
        monkeypatch.setitem(TRAININGS, name, lambda *_: Outcome([0.0], 0.0))
    names = ("measure", "of", "seed")
    found = [line for part in measure.PARTS for line in measure.measurements("8bit", part, 5)]
    committed = [line for line in read() if line["mode"] == "8bit"]
    rows = [sorted(str([line.get(name) for name in names]) for line in lines) for lines in (found, committed)]
    assert rows[0] == rows[1]
    assert {line["mode"] for line in found} == {"8bit"}


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_has_the_nearest_code_of_a_table(signed: bool) -> None:
    table, form = _dynamic_table(signed), Dynamic(signed)
    borders = (table[1:] + table[:-1]) / 2
    numbers = torch.cat([borders, borders.nextafter(borders + 1), borders.nextafter(borders - 1), torch.zeros(2)])
    # Each block of 256 has the scale 1.
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % 255)).view(-1, 255)
    value = torch.cat([torch.ones(len(blocks), 1), blocks], 1).view(-1)
    assert torch.equal(form.encode(value)[0].int(), torch.bucketize(value, borders, out_int32=True))
