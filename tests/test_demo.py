"""The demo's own claims: runs are comparable, they learn, and what differs is what it says."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples.digits import __main__ as demo
from examples.digits import report
from examples.digits.training import Digits, Run, load, n_steps, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load(CPU)


@pytest.fixture(scope="module")
def runs(digits: Digits) -> dict[str, Run]:
    return {
        name: train(digits, build, n_epochs=3, seed=0, on_step=lambda: None)
        for name, build in demo.CONTENDERS.items()
    }


def test_no_image_is_both_learnt_and_tested(digits: Digits) -> None:
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 1
    assert len(images.unique(dim=0)) == len(images)
    assert torch.cat([digits.train_labels, digits.test_labels]).bincount().min() > 170


def test_the_same_seed_gives_the_same_run_and_another_seed_another(digits: Digits) -> None:
    build = partial(torch.optim.Adam, lr=1e-3)
    first, again, other = (train(digits, build, n_epochs=1, seed=seed, on_step=lambda: None) for seed in (1, 1, 2))
    assert torch.equal(first.trajectory, again.trajectory)
    assert first.losses == again.losses
    assert first.distance_to(other)[0] > 1e-2


def test_every_step_is_reported_and_kept(digits: Digits) -> None:
    seen: list[None] = []
    run = train(digits, torch.optim.Adam, n_epochs=1, seed=0, on_step=lambda: seen.append(None))
    assert len(seen) == len(run.losses) == len(run.trajectory) == n_steps(digits, 1) == 23


def test_three_epochs_are_enough_to_read_most_digits(runs: dict[str, Run]) -> None:
    assert {name: run.test_accuracy > 0.6 for name, run in runs.items()} == dict.fromkeys(runs, True)


def test_ours_follows_torch_to_rounding_and_epsilon_hat_does_not(
    runs: dict[str, Run],
) -> None:
    reference = runs[demo.REFERENCE]
    # Torch's own fused and for-loop Adam part by less than 1e-7 in these 69 steps.
    assert runs["ours"].distance_to(reference).max() < 1e-6
    assert runs["ours, epsilon_hat=True"].distance_to(reference).max() > 1e-5


def test_the_command_prints_a_row_an_optimizer_and_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "made")])
    printed = capsys.readouterr().out
    for name in demo.CONTENDERS:
        assert re.search(rf"{re.escape(name)} +│ +\d+\.\d\d% │", printed), printed
    assert "no parameter was ever further than" in " ".join(printed.split())
    picture = (tmp_path / "made" / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_three_sentences_say_what_was_measured() -> None:
    def run(distance: float) -> Run:
        return Run([1.0, 1.0], torch.tensor([[0.0, distance], [0.0, 0.0]]), test_accuracy=1, step_ms=1)

    said = report.conclusion(run(0.0), run(-2e-7), run(3e-3))
    assert re.findall(r"2 batches|[\d.]+e-\d+", said) == ["2 batches", "2.0e-07", "3.0e-03"]
    assert len(re.findall(r"\.(?: |$)", said)) == 3


def test_the_table_measures_from_the_reference(digits: Digits) -> None:
    near = Run(losses=[2.0, 1.0], trajectory=torch.zeros(2, 3), test_accuracy=0.5, step_ms=0.25)
    far = Run(losses=[2.0, 1.5], trajectory=torch.tensor([[0.0, -4, 0], [0, 0, 0.5]]), test_accuracy=1, step_ms=2)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.table({"near": near, "far": far}, "near", "title"))
    assert re.search(r"near +│ +50\.00% │ +1\.000000 │ +- │ +0\.250", capture.get())
    assert re.search(r"far +│ +100\.00% │ +1\.500000 │ +4\.0e\+00 │ +2\.000", capture.get())


def test_a_wrong_argument_is_named_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["--device", "gpu"], "argument --device: no such device here: 'gpu'"),
    ):
        with pytest.raises(SystemExit):
            demo.main(arguments)
        assert said in capsys.readouterr().err
