"""SAM and gradient projection memory in transformers' Trainer (extra text)."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from outlast.continual import GradientProjectionMemory
from outlast.robust import SAMTrainerMixin


class SharpnessAwareTrainer(SAMTrainerMixin, Trainer):
    """That trainer passes no closure, so the mixin makes both passes."""


torch.manual_seed(0)
config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = BertForSequenceClassification(config)
memory = GradientProjectionMemory(model, threshold=0.97, exclude=["bert.pooler", "classifier"])


def task(words):
    ids = words[torch.randint(0, len(words), (256, 8))]
    labels = ((ids < words[len(words) // 2]).sum(1) > 4).long()
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


for number in range(2):
    data = task(torch.arange(10) + 15 * number)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handle = memory.attach(optimizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=32, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
        )
        trainer = SharpnessAwareTrainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None), sam={"rho": 0.05})
        result = trainer.train()
    handle.remove()
    memory.consolidate([{"input_ids": torch.stack([row["input_ids"] for row in data])}])
    print(f"task {number}: loss {result.training_loss:.2f}, memory {memory.capacity:.0%} full")
