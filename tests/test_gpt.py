"""The GPT example: modes are comparable, bytes are those that are allocated, and a missing mode is named."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from dragon.vm.torch.optim import AdamW
from examples.gpt import __main__ as example
from examples.gpt import report
from examples.gpt.model import CONTEXT, GPT, N_CHARACTERS, loss_of, text, windows_of
from examples.gpt.modes import MODES, REFERENCE, Mode, why_not
from examples.gpt.training import Run, train

CPU = torch.device("cpu")
BYTES = {  # a parameter; of the 8-bit modes with their scales and the small tensors that stay in fp32
    "torch": 12,
    "ours": 12,
    "bf16-states": 8,
    "8bit-states": pytest.approx(6.2, abs=0.2),
    "split16": 8,
    "split8-8bit": pytest.approx(5.2, abs=0.2),
    "stochastic": 6,
    "torch-bf16": 6,
}
PRESENT = [name for name, mode in MODES.items() if why_not(mode) is None]


def run(name: str, n_steps: int = 3) -> Run:
    return train(MODES[name], n_steps, seed=0, device=CPU, on_step=lambda: None)


def test_the_text_is_python_documentation_and_its_end_is_held_out() -> None:
    learnt, held_out = text()
    assert len(learnt) == 9 * (len(learnt) + len(held_out)) // 10 > 300_000
    assert 0 < learnt.min() <= learnt.max() < N_CHARACTERS
    assert "assignment statement" in bytes(learnt.tolist()).decode()


def test_a_window_is_a_piece_of_the_text() -> None:
    data = torch.arange(CONTEXT + 3)
    windows = windows_of(data, 50, torch.Generator().manual_seed(0))
    assert windows.shape == (50, CONTEXT + 1)
    assert (windows.diff() == 1).all()
    assert set(windows[:, 0].tolist()) == {0, 1, 2}


def test_a_prediction_knows_nothing_of_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = GPT()
    tokens = torch.randint(N_CHARACTERS, (1, CONTEXT))
    changed = tokens.clone()
    changed[0, 20:] = 0
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_ours_follows_torch_and_both_learn() -> None:
    torch_run, our_run = run(REFERENCE, 30), run("ours", 30)
    assert our_run.losses == pytest.approx(torch_run.losses, rel=1e-4)
    assert our_run.losses[-1] < our_run.losses[0] - 1


@pytest.mark.parametrize("name", MODES)
def test_a_mode_trains_in_the_bytes_that_it_is_for(name: str) -> None:
    if name not in PRESENT:
        pytest.skip(f"not in this version: {why_not(MODES[name])}")
    trained = run(name)
    assert trained.bytes_per_param == BYTES[name]
    assert trained.losses == sorted(trained.losses, reverse=True)
    assert trained.losses[0] == pytest.approx(run(REFERENCE).losses[0], rel=1e-2)
    assert trained.held_out_loss < trained.losses[0]


def test_a_mode_is_left_out_only_if_the_installed_version_lacks_an_option() -> None:
    known = inspect.signature(AdamW).parameters
    if {"master_weights", "stochastic_rounding"} <= set(known):
        assert list(MODES) == PRESENT
    lacking = {name for name, mode in MODES.items() if not set(mode.options) <= set(known)}
    assert lacking.isdisjoint(PRESENT)
    assert {REFERENCE, "ours", "bf16-states", "torch-bf16"} <= set(PRESENT)
    assert "no_such_option" in str(why_not(Mode(AdamW, options={"no_such_option": True})))


def test_the_command_prints_a_row_a_mode_and_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODES, "missing", Mode(AdamW, options={"no_such_option": True}))
    out = tmp_path / "made"
    example.main(["--steps", "3", "--modes", "torch", "ours", "missing", "--device", "cpu", "--out", str(out)])
    printed = capsys.readouterr().out
    for name in ("torch", "ours"):
        assert re.search(rf"│ {name} +│ +\d\.\d+ │ +965,632 │ +12\.0 │ +\d+\.\d+ │", printed), printed
    assert "missing is left out" in printed
    picture = (out / "gpt.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_an_impossible_number_of_steps_and_an_unknown_mode_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text_of_error in ((["--steps", "0"], "at least 1"), (["--modes", "other"], "invalid choice")):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert text_of_error in capsys.readouterr().err


def test_a_curve_is_smoothed_over_the_steps_before() -> None:
    assert report.smoothed([4.0, 2.0, 0.0]).tolist() == [4.0, 3.0, 2.0]
    assert report.smoothed([float(step) for step in range(100)])[-1] == 87.0


def test_the_loss_of_a_fresh_network_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    loss = loss_of(GPT(), torch.randint(N_CHARACTERS, (8, CONTEXT + 1)))
    assert loss.item() == pytest.approx(math.log(N_CHARACTERS), abs=0.3)
