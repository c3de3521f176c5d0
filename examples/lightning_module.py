"""K-FAC in a LightningModule: ``python examples/lightning_module.py``.

``configure_optimizers`` gives the module itself: its parameters have names, and K-FAC finds the
layers. The file is not called lightning.py, because Python would import it for the package.
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from titan_shampoo import KFAC


class Network(lightning.LightningModule):
    """A small regression."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The loss of a batch."""
        rows, wanted = batch
        loss = nn.functional.mse_loss(self.layers(rows), wanted)
        if number % 8 == 0:
            print(f"step {self.global_step + 1}  loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """K-FAC of all layers."""
        return KFAC(self, lr=0.1, precondition_frequency=5)


if __name__ == "__main__":
    lightning.seed_everything(0)
    inputs = torch.randn(512, 16)
    data = TensorDataset(inputs, inputs @ torch.randn(16, 4))
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(), DataLoader(data, batch_size=32, shuffle=True))
