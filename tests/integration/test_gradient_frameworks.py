"""GPM and GradVac where users have them: Lightning, Fabric, Accelerate, transformers."""

from __future__ import annotations

import pytest
import torch
from helpers import batches, cross_entropy, farthest, mlp, same, snapshot
from torch import nn
from torch.utils.data import DataLoader

from outlast.continual import GradientProjectionMemory
from outlast.multitask import GradVac

AdamW = torch.optim.AdamW
TASKS = ["a", "b"]
OLD = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def vaccinated_by_hand(count):
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    memory = GradientProjectionMemory(model, threshold=1.0)
    memory.attach(optimizer)
    memory.consolidate([OLD])
    vaccine = GradVac(optimizer, TASKS, model=model)
    for batch in batches(count):
        optimizer.zero_grad()
        vaccine.backward(halves(model, batch))
        optimizer.step()
    return model


def halves(model, batch):
    parts = zip(TASKS, batch[0].chunk(2), batch[1].chunk(2), strict=True)
    return {task: cross_entropy(model, (x, y)) for task, x, y in parts}


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_automatic_optimisation():
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def configure_optimizers(self):
            optimizer = AdamW(self.net.parameters(), lr=0.02, weight_decay=0.1)
            self.memory = GradientProjectionMemory(self.net, threshold=1.0)
            self.memory.attach(optimizer)
            self.memory.consolidate([OLD])
            self.vaccine = GradVac(optimizer, TASKS, model=self.net)
            return optimizer

        def training_step(self, batch, _):
            return self.vaccine.combine(halves(self.net, batch))

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(4), batch_size=None))
    expected = vaccinated_by_hand(4)
    assert same(snapshot(module.net), snapshot(expected))
    start = mlp()
    assert float((module.net(OLD).detach() - start(OLD).detach()).abs().max()) < 1e-5
    assert farthest(module.net, start) > 1e-2


def test_fabric_and_accelerate_wrappers_are_looked_through():
    fabric = pytest.importorskip("lightning_fabric", reason="lightning-fabric (extra train) is not installed").Fabric(
        accelerator="cpu", devices=1
    )
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected = vaccinated_by_hand(3)
    for kind in ("fabric", "accelerate"):
        net = mlp()
        plain = AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
        if kind == "fabric":
            model, optimizer = fabric.setup(net, plain)
            backward = fabric.backward
        else:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(net, plain)
            backward = accelerator.backward
        memory = GradientProjectionMemory(model, threshold=1.0)
        memory.attach(optimizer)
        memory.consolidate([OLD])
        vaccine = GradVac(optimizer, TASKS, model=model)
        for batch in batches(3):
            optimizer.zero_grad()
            backward(vaccine.combine(halves(model, batch)))
            optimizer.step()
        assert same(snapshot(net), snapshot(expected)), kind


@pytest.fixture
def text_model():
    transformers = pytest.importorskip("transformers", reason="transformers (extra text) is not installed")
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def text_task(number, rows=32):
    """Does the sentence hold more of one word than of another? Each task has its own words."""
    stream = torch.Generator().manual_seed(number)
    words = torch.arange(10, 20) + 15 * number
    ids = words[torch.randint(0, 10, (rows, 8), generator=stream)]
    labels = ((ids < words[5]).sum(1) > 4).long()
    return {"input_ids": ids, "labels": labels}


def test_fine_tuning_a_transformer_on_three_tasks_with_adamw(text_model):
    accuracy = lambda model, task: float((model(input_ids=task["input_ids"]).logits.argmax(1) == task["labels"]).float().mean())  # noqa: E731
    memory = GradientProjectionMemory(text_model, threshold=0.99, exclude=["bert.pooler", "classifier"])
    assert "bert.embeddings.position_embeddings" in memory.ranks
    optimizer = AdamW(text_model.parameters(), lr=3e-3, weight_decay=0.01)
    memory.attach(optimizer)
    drift, tasks = [], [text_task(number) for number in range(3)]
    for number, task in enumerate(tasks):
        for _ in range(25):
            optimizer.zero_grad()
            text_model(**task).loss.backward()
            optimizer.step()
        assert accuracy(text_model.eval(), task) > 0.9
        hidden = text_model.bert(input_ids=tasks[0]["input_ids"]).last_hidden_state.detach()
        drift.append(hidden)
        memory.consolidate([task])
        text_model.train()
        assert number == 0 or all(rank <= dim for rank, dim in memory.ranks.values())
    size = float(drift[0].norm())
    assert float((drift[2] - drift[0]).norm()) < 0.2 * size


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_takes_the_memory(text_model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers (extra text) is not installed")
    memory = GradientProjectionMemory(text_model, threshold=1.0)
    old = {name: value[:2] for name, value in text_task(0).items()}
    memory.consolidate([old])
    text_model.eval()
    before = text_model(input_ids=old["input_ids"]).logits.detach()
    rows = text_task(1)
    data = [{name: value[n] for name, value in rows.items()} for n in range(32)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, report_to=[], use_cpu=True, learning_rate=1e-2, save_strategy="no", disable_tqdm=True
    )
    optimizer = AdamW(text_model.parameters(), lr=1e-2, weight_decay=0.1)
    memory.attach(optimizer)
    trainer = transformers.Trainer(text_model, arguments, train_dataset=data, optimizers=(optimizer, None))
    start = snapshot(text_model)
    trainer.train()
    assert not same(start, snapshot(text_model))
    text_model.eval()
    assert float((text_model(input_ids=old["input_ids"]).logits.detach() - before).abs().max()) < 1e-4


def test_hooks_stay_off_a_copied_optimizer():
    import copy

    model = nn.Linear(4, 2)
    optimizer = AdamW(model.parameters())
    GradientProjectionMemory(model).attach(optimizer)
    assert not copy.deepcopy(optimizer)._optimizer_step_post_hooks
