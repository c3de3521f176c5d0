"""One table of parameter groups: ``python examples/parameter_groups.py``.

Each row has a regular expression and the options of the parameters whose names it matches; a
parameter belongs to the first row that matches. Options that a row leaves out are the optimizer's.
"""

import re

import torch
from torch import nn

from titan_shampoo import Shampoo

GROUPS = [
    (r"embed", {"lr": 1e-2, "precondition": False}),  # by AdamW
    (r"bias$", {"weight_decay": 0.0}),
    (r"experts", {"batch_dims": 1}),  # a stack of matrices, each preconditioned by itself
    (r"wide", {"block_size": 256, "precondition_frequency": 20}),
    (r"", {}),
]


class Network(nn.Module):
    """An embedding, a wide layer, two experts and a bias for each row of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 48)
        self.wide = nn.Linear(48, 512)
        self.narrow = nn.Linear(512, 16)
        self.experts = nn.Parameter(torch.randn(2, 16, 32) / 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, ``(rows, 32)``, as the mean of the experts."""
        hidden = torch.relu(self.narrow(torch.relu(self.wide(self.embed(tokens)))))
        return (hidden @ self.experts).mean(dim=0)


torch.manual_seed(0)
model = Network()
groups = [{"params": [], **options} for _, options in GROUPS]
for name, parameter in model.named_parameters():
    row = next(i for i, (pattern, _) in enumerate(GROUPS) if re.search(pattern, name))
    groups[row]["params"].append((name, parameter))
optimizer = Shampoo([group for group in groups if group["params"]], lr=3e-3, weight_decay=0.1)

for step in range(1, 41):
    tokens = torch.randint(32, (128,))
    loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}  loss {loss.item():.3f}")
