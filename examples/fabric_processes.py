"""Gradient vaccine and SAM on several processes with Lightning Fabric: DDP, or FSDP2 with ``--fsdp`` (extra train)."""

import sys

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from outlast.multitask import GradVac
from outlast.robust import SAM


def shard(model, mesh):
    """FSDP2 over all processes: what ModelParallelStrategy asks for."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh["data_parallel"])


def main(fabric):
    fabric.seed_everything(0, verbose=False)
    model = fabric.setup_module(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)))
    optimizer = fabric.setup_optimizers(SAM(torch.optim.SGD(model.parameters(), lr=0.2), rho=0.05, sync="global"))
    stream = torch.Generator().manual_seed(fabric.global_rank)  # each process has rows of its own
    truth = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        images = torch.randn(32, 16, generator=stream)
        labels = (images @ truth).argmax(1)

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            fabric.backward(loss)
            return loss

        loss = optimizer.step(closure)
    plain = torch.optim.Adam(model.parameters(), lr=1e-3)
    vaccine = GradVac(plain, tasks=["even", "odd"], model=model)  # combines the tasks' gradients over all processes
    losses = {name: nn.functional.cross_entropy(model(images[k::2]), labels[k::2]) for k, name in enumerate(vaccine.tasks)}
    vaccine.backward(losses)
    plain.step()
    fabric.print(f"{fabric.world_size} processes, loss {float(loss):.2f}")


if __name__ == "__main__":
    strategy = (
        ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
        if "--fsdp" in sys.argv
        else DDPStrategy(process_group_backend="gloo")
    )
    Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(main)
