import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dragon.vm.torch.optim import AdamW

from .training import assert_same_training, ours, theirs

# Before the import, which reads them: nothing is downloaded, reported or looked up.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_DISABLED="1")
transformers = pytest.importorskip("transformers", reason="the clients extra is not installed")
STEPS = 24


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def data() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 32, (4 * STEPS, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(make: Any, folder: Path, resume: str | None = None) -> Any:
    """Train, with the optimizer of `make`, or the Trainer's own."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=STEPS // 2,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        dataloader_pin_memory=False,
    )
    model = gpt2()
    optimizers = (None if make is None else make(model.parameters()), None)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data(), optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_loses_the_same_with_ours_and_resumes(tmp_path: Path) -> None:
    mine = train(ours, tmp_path / "ours")
    their = train(theirs, tmp_path / "theirs")
    assert_same_training(losses(mine), losses(their))
    checkpoint = tmp_path / "ours" / f"checkpoint-{STEPS // 2}"
    resumed = train(ours, tmp_path / "resumed", str(checkpoint))
    assert losses(resumed) == losses(mine)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, mine.model.state_dict()[name]), name


def test_a_trainer_that_makes_its_own_optimizer_gets_ours_by_a_swap(tmp_path: Path) -> None:
    from dragon.vm.torch.optim import swap

    their = train(None, tmp_path / "theirs")
    with swap() as swapped:
        mine = train(None, tmp_path / "ours")
    assert isinstance(mine.optimizer.optimizer, AdamW)
    assert [entry.n_steps for entry in swapped.replaced] == [STEPS]
    assert_same_training(losses(mine), losses(their))
