"""Shampoo in a plain training loop, on one device: ``python examples/plain_loop.py``."""

import torch
from torch import nn

from titan_shampoo import Shampoo

torch.manual_seed(0)
images = torch.randn(512, 64)
labels = (images @ torch.randn(64, 10)).argmax(dim=1)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = Shampoo(model, lr=1e-2, weight_decay=0.1, precondition_frequency=10)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)

for step in range(1, 51):
    batch = torch.randint(512, (64,))
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 10 == 0:
        print(f"step {step}  loss {loss.item():.3f}")
