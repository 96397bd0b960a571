from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from .training import STEPS, assert_same_training, batches, model, ours, theirs

# Lightning's own: what it calls in torch, where its batches come from, and that it would like more workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*train_dataloader.*:UserWarning:lightning"),
]


@cache
def imported() -> tuple[Any, Any, Any]:
    """Lightning and the modules to train, made by a test: to import it takes every test process seconds."""
    lightning = pytest.importorskip("lightning", reason="the clients extra is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]  # imported if it is there
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.model, self.make, self.losses = model(), make, []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4 * STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Manual(Module):
        """Optimized by hand, without the wrapper that gives each step a closure."""

        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.automatic_optimization = False

        def training_step(self, batch: Any, number: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(super().training_step(batch, number))
            optimizer.step()
            optimizer.zero_grad()

    return lightning, Module, Manual


def fit(
    make: Any,
    precision: str,
    folder: Path,
    epochs: int = 1,
    resume: str | None = None,
    *,
    by_hand: bool = False,
) -> Any:
    lightning, automatic, manual = imported()
    module = (manual if by_hand else automatic)(make)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        precision=precision,
        gradient_clip_val=None if by_hand else 1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=resume)
    return trainer, module


# On a CPU the trainer turns 16-mixed into bf16-mixed.
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trainer_loses_the_same_with_ours(precision: str, tmp_path: Path) -> None:
    _, mine = fit(ours, precision, tmp_path)
    _, their = fit(theirs, precision, tmp_path)
    # Where activations are rounded to 16 bits, an error of rounding in a weight can flip one of theirs.
    assert_same_training(mine.losses, their.losses, rtol=1e-4 if precision == "32-true" else 2e-2)


@pytest.mark.parametrize("make", [theirs, ours])
def test_clipping_with_mixed_precision_is_refused_for_fused_alone(make: Any, tmp_path: Path) -> None:
    """Lightning clips between unscaling and the step, and lets nobody unscale in the step."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(partial(make, fused=True), "bf16-mixed", tmp_path)


def test_gradients_are_released_by_hand_alone(tmp_path: Path) -> None:
    release = partial(ours, release_gradients=True)
    _, plain = fit(ours, "32-true", tmp_path, by_hand=True)
    _, released = fit(release, "32-true", tmp_path, by_hand=True)
    assert released.losses == plain.losses
    with pytest.raises(RuntimeError, match="takes no closure"):
        fit(release, "32-true", tmp_path)


def test_a_trainer_saves_and_resumes_ours(tmp_path: Path) -> None:
    _, full = fit(ours, "32-true", tmp_path, epochs=2)
    trainer, _ = fit(ours, "32-true", tmp_path)
    checkpoint = tmp_path / "half.ckpt"
    trainer.save_checkpoint(checkpoint)
    _, resumed = fit(ours, "32-true", tmp_path, epochs=2, resume=str(checkpoint))
    assert resumed.losses == full.losses[STEPS:]
    # A run that was begun with ours goes on with PyTorch's.
    _, foreign = fit(theirs, "32-true", tmp_path, epochs=2, resume=str(checkpoint))
    assert_same_training(foreign.losses, resumed.losses)
