"""SAM, mixup and gradient projection memory in a plain loop: two tasks, one after the other."""

import torch
from torch import nn

from outlast.continual import GradientProjectionMemory
from outlast.data import load
from outlast.robust import SAM, MixUp

torch.manual_seed(0)
data = load("mnist", variant="small")
images = data.images.float().div(255).flatten(1)[:2000]
labels = data.labels[:2000]
model = nn.Sequential(nn.Linear(images.shape[1], 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
mixup = MixUp(alpha=0.4, num_classes=10, generator=torch.Generator().manual_seed(0))
memory = GradientProjectionMemory(model, threshold=0.97)
memory.attach(optimizer)


def accuracy(rows):
    with torch.no_grad():
        return (model(images[rows]).argmax(1) == labels[rows]).float().mean()


shuffled = images[:, torch.randperm(784)]  # the second task: the same digits, their pixels in another order
images, labels = torch.cat([images, shuffled]), torch.cat([labels, labels])
tasks = torch.arange(len(images)).chunk(2)
for number, rows in enumerate(tasks):
    for batch in rows[torch.randperm(len(rows))].split(64):
        mixed, targets = mixup(images[batch], labels[batch])  # once a step, outside of the closure

        def closure(mixed=mixed, targets=targets):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(mixed), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    print(memory.consolidate([images[rows]]))
    print(f"after task {number}: first task {accuracy(tasks[0]):.2f}, second {accuracy(tasks[1]):.2f}")
