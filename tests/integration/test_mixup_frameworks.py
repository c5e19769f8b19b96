"""Mixup where others train: Lightning, transformers' Trainer, under autocast, with gradient accumulation, compiled models."""

from __future__ import annotations

import pytest
import torch
from helpers import rng
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from outlast.robust import MixUp, mixup_loss


def data(n=32):
    return TensorDataset(torch.randn(n, 6, generator=rng()), torch.randint(0, 3, (n,), generator=rng(1)))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # lightning's use of torch's trees
def test_lightning_after_the_transfer(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 3)
            self.mixup = MixUp(num_classes=3, labels="pair", generator=rng(0))

        def on_after_batch_transfer(self, batch, _dataloader_idx):
            return self.mixup(*batch) if self.training else batch

        def training_step(self, batch, _index):
            x, target = batch
            return mixup_loss(F.cross_entropy, self.net(x), target)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **options)
    trainer.fit(module, DataLoader(data(), 8))
    assert module.mixup.get_extra_state()["step"] == 8
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert state["mixup._extra_state"]["step"] == 8


def test_transformers_trainer_takes_it_in_the_collator(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    mixup = MixUp(num_classes=3, generator=rng(0))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 3)

        def forward(self, pixel_values, labels):
            logits = self.net(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def collate(samples):
        return mixup({"pixel_values": torch.stack([x for x, _ in samples]), "labels": torch.stack([y for _, y in samples])})

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=data(), data_collator=collate)
    assert trainer.train().global_step == 4
    assert mixup.get_extra_state()["step"] >= 4


def test_autocast_and_accumulation():
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    mixup = MixUp(num_classes=3, per_sample=True, generator=rng(0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        for x, y in DataLoader(data(), 8):
            mixed, target = mixup(x, y)  # one draw for each micro-batch
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(mixed), target)
            (loss / 4).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
    assert sum(losses[-4:]) < sum(losses[:4])


def test_compiled_models_are_not_compiled_again():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    net = torch.compile(nn.Linear(6, 3), backend=backend)
    mixup = MixUp(num_classes=3)
    for x, y in DataLoader(data(), 8):
        net(mixup(x, y)[0])
    assert len(graphs) == 1
