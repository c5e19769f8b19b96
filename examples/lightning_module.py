"""SAM with mixup under Lightning's automatic optimisation (extra train and lightning)."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from outlast.data import load
from outlast.robust import SAM, MixUp


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        self.mixup = MixUp(alpha=0.4, num_classes=10, generator=torch.Generator().manual_seed(0))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.mixup(*batch) if self.training else batch  # once a step: both passes of SAM see one mixture

    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = nn.functional.cross_entropy(self.net(images), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return SAM(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9), rho=0.05)


lightning.seed_everything(0, verbose=False)
data = load("mnist", variant="small")
images = data.images[:1000].float().div(255)
loader = DataLoader(TensorDataset(images, data.labels[:1000]), batch_size=64, shuffle=True)
model = Classifier()
trainer = lightning.Trainer(
    max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
trainer.fit(model, loader)
print(f"loss of the last batch {trainer.callback_metrics['loss']:.2f}")
