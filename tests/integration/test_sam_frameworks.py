from __future__ import annotations

import copy

import pytest
import torch
from helpers import batches, closure_of, cross_entropy, farthest, mlp, same, snapshot, train_by_hand
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from outlast.errors import StateError
from outlast.robust import SAM, SAMTrainerMixin

SGD = torch.optim.SGD


def expected(data, *, norm=False, **options):
    model = mlp(norm=norm)
    optimizer = SAM(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, **options)
    for batch in data:
        optimizer.step(closure_of(optimizer, model, batch))
    return model


# ---- Lightning ----------------------------------------------------------------------------------------------------------


def fit(model, data, make=lambda parameters: SAM(SGD(parameters, lr=0.1, momentum=0.9), rho=0.3), **settings):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model
            self.losses = []

        def training_step(self, batch, _):
            loss = cross_entropy(self.net, batch)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return make(self.parameters())

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=settings.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module, trainer


lightning_warnings = pytest.mark.filterwarnings("ignore")


@lightning_warnings
def test_lightning_trains_as_the_bare_loop():
    model, data = mlp(norm=True), batches(4)
    module, trainer = fit(model, data)
    other = expected(data, norm=True)
    assert same(snapshot(model), snapshot(other))
    assert len(module.losses) == 8
    assert trainer.global_step == 4


@lightning_warnings
def test_lightning_in_bf16_mixed_trains():
    model, start = mlp(), mlp()
    module, _ = fit(model, batches(3), precision="bf16-mixed")
    assert len(module.losses) == 6
    assert farthest(model, start) > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


@lightning_warnings
def test_lightning_clips_the_sharpness_aware_gradient():
    model, data = mlp(), batches(2)
    fit(model, data, make=lambda p: SAM(SGD(p, lr=1.0), rho=0.3), gradient_clip_val=1e-3)
    start = mlp()
    assert 0 < farthest(model, start) < 2.1e-3


@lightning_warnings
def test_lightning_checkpoint_resumes(tmp_path):
    model, data = mlp(), batches(4)
    make = lambda p: SAM(SGD(p, lr=0.1, momentum=0.9), rho=0.3, every=2, reuse="looksam")  # noqa: E731
    _, trainer = fit(model, data[:3], make=make, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=False)["optimizer_states"][0]
    other = mlp(seed=5)
    other.load_state_dict(model.state_dict())
    resumed = make(other.parameters())
    resumed.load_state_dict(state)
    resumed.step(closure_of(resumed, other, data[3]))
    whole = mlp()
    fit(whole, data, make=make)
    assert same(snapshot(whole), snapshot(other))


@lightning_warnings
def test_lightning_accumulation_is_refused_and_not_half_done():
    with pytest.raises(StateError, match="accumulate"):
        fit(mlp(), batches(4), accumulate_grad_batches=2)


@lightning_warnings
def test_lightning_that_runs_the_closure_itself_is_told_what_to_do():
    plugins = pytest.importorskip("lightning.pytorch.plugins.precision", reason="lightning is not installed")

    class RunsTheClosure(plugins.Precision):
        def optimizer_step(self, optimizer, model, closure, **kwargs):
            closure()
            return optimizer.step(**kwargs)

    with pytest.raises(StateError, match="bf16-mixed"):
        fit(mlp(), batches(1), plugins=[RunsTheClosure()])


@lightning_warnings
def test_lightning_16_mixed_is_told_what_to_do():
    plugins = pytest.importorskip("lightning.pytorch.plugins.precision", reason="lightning is not installed")
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(StateError, match="bf16-mixed"):
        fit(mlp(), batches(1), plugins=[plugin])


# ---- Fabric -------------------------------------------------------------------------------------------------------------


def fabric_setup(model, **options):
    fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed").Fabric(accelerator="cpu", devices=1)
    optimizer = SAM(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3, **options)
    return fabric, *fabric.setup(model, optimizer), optimizer


def fabric_closure(fabric, wrapped, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(wrapped, batch)
        fabric.backward(loss)
        return loss

    return closure


@lightning_warnings
def test_fabric_trains_by_closures():
    model, data = mlp(norm=True), batches(4)
    fabric, wrapped, optimizer, _ = fabric_setup(model)
    for batch in data:
        loss = optimizer.step(fabric_closure(fabric, wrapped, optimizer, batch))
    assert same(snapshot(model), snapshot(expected(data, norm=True)))
    assert torch.equal(loss, optimizer.last.loss)


@lightning_warnings
@pytest.mark.parametrize("options", [{}, {"every": 2, "reuse": "looksam"}])
def test_fabric_trains_by_two_calls(options):
    model, data = mlp(norm=True), batches(4)
    fabric, wrapped, optimizer, bare = fabric_setup(model, **options)
    for batch in data:
        optimizer.zero_grad()
        with optimizer.first_pass():
            fabric.backward(cross_entropy(wrapped, batch))
        if optimizer.due:
            optimizer.ascend()
            with pytest.raises(StateError):
                optimizer.state_dict()
            fabric.backward(cross_entropy(wrapped, batch))
            optimizer.restore()
        optimizer.step()
    assert same(snapshot(model), snapshot(expected(data, norm=True, **options)))
    assert bare.last is optimizer.last is not None


@lightning_warnings
def test_fabric_checkpoint_goes_through_the_wrapper():
    model, data = mlp(), batches(5)
    options = {"every": 2, "reuse": "looksam"}
    fabric, wrapped, optimizer, _ = fabric_setup(model, **options)
    for batch in data[:3]:
        optimizer.step(fabric_closure(fabric, wrapped, optimizer, batch))
    state, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    assert state["outlast_sam"]["t"] == 3
    fabric, again, resumed, _ = fabric_setup(other, **options)
    resumed.load_state_dict(state)
    for batch in data[3:]:
        resumed.step(fabric_closure(fabric, again, resumed, batch))
    assert same(snapshot(other), snapshot(expected(data, **options)))


# ---- transformers -------------------------------------------------------------------------------------------------------


class ForTrainer(nn.Module):
    def __init__(self, *, norm=False, config=None):
        super().__init__()
        self.net = mlp(norm=norm)
        if config is not None:
            self.config = config

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


def trainer_of(model, data, folder, *, sam=None, **settings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class SAMTrainer(SAMTrainerMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=settings.pop("max_steps", 3),
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **settings,
    )

    class Ordered(SAMTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [{"x": x, "labels": y} for batch in data for x, y in zip(*batch, strict=True)]
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Ordered(model, arguments, train_dataset=rows, optimizers=(base, None), sam=sam or {"rho": 0.3})


trainer_warnings = pytest.mark.filterwarnings("ignore")


@trainer_warnings
def test_trainer_accumulates_sharpness_aware_gradients_of_micro_batches(tmp_path):
    model, data = ForTrainer(), batches(3)
    trainer = trainer_of(model, data, tmp_path, gradient_accumulation_steps=2)
    with torch.no_grad():
        first_loss = float(cross_entropy(model.net, data[0]))
    trainer.train()
    by_hand = mlp()
    parts = [list(zip(x.chunk(2), y.chunk(2), strict=True)) for x, y in data]
    train_by_hand(by_hand, parts, rho=0.3, lr=0.1, momentum=0.9)
    assert farthest(model.net, by_hand) < 1e-6
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(first_loss, abs=1e-3)


@trainer_warnings
def test_trainer_without_accumulation_equals_the_optimizer(tmp_path):
    model, data = ForTrainer(norm=True), batches(3, size=4)
    trainer_of(model, data, tmp_path).train()
    other = expected(data, norm=True)
    assert same(list(model.net.buffers()), list(other.buffers()))
    assert farthest(model.net, other) < 1e-6


@trainer_warnings
def test_trainer_clips_what_the_optimizer_sees(tmp_path):
    model, start = ForTrainer(), mlp()
    trainer = trainer_of(model, batches(1, size=4), tmp_path, max_steps=1)
    trainer.args.max_grad_norm = 1e-3
    trainer.train()
    assert 0 < farthest(model.net, start) <= 1e-4 * 1.01


@trainer_warnings
def test_trainer_with_label_smoothing_keeps_the_labels_for_the_second_pass(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, start = ForTrainer(config=transformers.PretrainedConfig()), mlp()
    trainer_of(model, batches(1, size=4), tmp_path, max_steps=1, label_smoothing_factor=0.1).train()
    assert farthest(model.net, start) > 0


@trainer_warnings
def test_trainer_trains_a_tiny_bert(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))
    weights = [p.detach().clone() for p in model.parameters()]

    class SAMTrainer(SAMTrainerMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_accumulation_steps=2,
    )
    rows = [{"input_ids": torch.randint(0, 20, (6,)), "labels": i % 3} for i in range(32)]
    trainer = SAMTrainer(model, arguments, train_dataset=rows, sam={"rho": 0.05, "adaptive": True})
    trainer.train()
    assert not same(weights, list(model.parameters()))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["every", "reuse", "inner_steps"])
def test_trainer_refuses_what_needs_whole_steps(name):
    with pytest.raises(ValueError, match=name):
        SAMTrainerMixin(sam={name: 2})


# ---- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", ["module", "in place"])
def test_compiled_model_trains_with_frozen_buffers_and_is_not_compiled_again(backend, form):
    torch._dynamo.reset()
    model, data = mlp(norm=True), batches(4)
    if form == "module":
        run = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        run = model
    torch._dynamo.utils.counters.clear()
    optimizer = SAM(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.3)
    graphs = []
    for batch in data:
        optimizer.step(closure_of(optimizer, run, batch))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    other = expected(data, norm=True)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert farthest(model, other) < 1e-6
    assert 1 <= graphs[0] <= 2  # with and without our hook at most
    assert graphs == graphs[:1] * 4
