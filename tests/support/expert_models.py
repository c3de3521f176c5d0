"""Small mixtures of experts in float64: as stacks of matrices, and as separate linear layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.layer_models import normal
from titan_shampoo.titan.experts import install_cpu_experts

# isort: split
from torchtitan.distributed.expert_parallel import ExpertParallel as ExpertParallel
from torchtitan.distributed.expert_parallel import TensorParallel as TensorParallel
from torchtitan.models.moe.moe import GroupedExperts  # after the CPU runtime

DIM, HIDDEN, EXPERTS, TOKENS = 8, 4, 4, 24
STACKS = ("w1", "w2", "w3")


class Stacked(nn.Module):
    """The weights of torchtitan's experts, for other ways to multiply by them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, DIM))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, DIM, HIDDEN))
        self.w3 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, DIM))


class ByLinear(Stacked):
    """One call of ``linear`` for each expert that is given rows, and operators."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        outputs = []
        for expert, some in enumerate(rows.split(counts.tolist())):
            if len(some):
                hidden = functional.silu(functional.linear(some, self.w1[expert]))
                hidden = hidden * (some @ self.w3.mT.clone()[expert])
                outputs.append(hidden @ self.w2[expert].contiguous().T)
        return torch.cat(outputs)


class ByBatch(Stacked):
    """Batched products of as many rows for each expert, padded by zeros."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        starts = counts.cumsum(0) - counts
        owners = torch.repeat_interleave(counts)
        places = owners, torch.arange(len(rows)) - starts[owners]
        padded = rows.new_zeros(EXPERTS, TOKENS, DIM).index_put(places, rows)
        hidden = functional.silu(padded.bmm(self.w1.mT)) * torch.matmul(padded, self.w3.mT)
        return hidden.bmm(self.w2.transpose(1, 2))[places]


class Grouped(Stacked):
    """Grouped products, which have no float64, with anything behind the rows of the last expert."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = torch.cat([rows, rows.new_full((3, DIM), torch.nan)])

        def times(some: Tensor, weights: Tensor) -> Tensor:
            return torch._grouped_mm(some.float(), weights.float().mT, offs=ends)

        hidden = functional.silu(times(rows, self.w1)) * times(rows, self.w3)
        return times(hidden, self.w2)[:-3].double()


class Separate(nn.Module):
    """The reference: a linear layer for each weight of each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.ModuleList(nn.Linear(DIM, HIDDEN, bias=False) for _ in range(EXPERTS))
        self.w2 = nn.ModuleList(nn.Linear(HIDDEN, DIM, bias=False) for _ in range(EXPERTS))
        self.w3 = nn.ModuleList(nn.Linear(DIM, HIDDEN, bias=False) for _ in range(EXPERTS))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        outputs = []
        for expert, some in enumerate(rows.split(counts.tolist())):
            hidden = functional.silu(self.w1[expert](some)) * self.w3[expert](some)
            outputs.append(self.w2[expert](hidden))
        return torch.cat(outputs)


def whole(output: Tensor) -> Tensor:
    """An output that is complete."""
    return output


class Mixture(nn.Module):
    """A linear layer, experts of which each token meets one, and a linear layer."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.experts = experts
        self.last = nn.Linear(DIM, 3)
        self.completed: Callable[[Tensor], Tensor] = whole
        """Makes the output of experts of what this rank has of it."""
        self.double()

    def forward(self, tokens: Tensor, choice: Tensor) -> Tensor:
        """Outputs for ``tokens``, ``(n, DIM)``, each sent to the expert of its ``choice``."""
        hidden = torch.tanh(self.first(tokens))
        order = choice.argsort(stable=True)
        counts = torch.bincount(choice, minlength=EXPERTS)
        found = self.completed(self.experts(hidden[order], counts))
        # FSDP2 loses its hook on an output that is a view.
        return 2 * self.last(hidden + torch.zeros_like(hidden).index_copy(0, order, found))


def torchtitans(dim: int = DIM, hidden: int = HIDDEN, *, is_grouped: bool = False) -> nn.Module:
    install_cpu_experts()
    return GroupedExperts(dim, hidden, EXPERTS, use_grouped_mm=is_grouped)


FORMS: dict[str, Any] = {
    "torchtitan's loop": torchtitans,
    "linear": ByLinear,
    "batched": ByBatch,
    "grouped": Grouped,
}


def mixture(make_experts: Any = torchtitans) -> Mixture:
    """A mixture whose weights are the same for all forms of experts."""
    torch.manual_seed(0)
    model = Mixture(make_experts())
    with torch.no_grad():
        for number, name in enumerate(STACKS):
            shape = (EXPERTS, DIM, HIDDEN) if name == "w2" else (EXPERTS, HIDDEN, DIM)
            weights = normal(number, *shape) / 2
            mine: Any = getattr(model.experts, name)
            if isinstance(mine, nn.ModuleList):
                for layer, weight in zip(mine, weights, strict=True):
                    layer.weight.copy_(weight)  # type: ignore[operator]
            else:
                mine.copy_(weights)
        for number, name in enumerate(("first", "last")):
            for param in getattr(model, name).parameters():
                param.copy_(normal(10 + number, *param.shape) / 2)
    return model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the expert of each, and targets; the last expert is given nothing in early steps."""
    chosen = EXPERTS if step >= 2 else EXPERTS - 1
    choice = (torch.arange(TOKENS) * 7 + torch.arange(TOKENS) // 5 + step) % chosen
    if step == 3:
        choice[choice == 1] = 0
    return normal(step, TOKENS, DIM), choice, normal(1000 + step, TOKENS, 3)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: stacks, and the rest."""
    named = list(model.named_parameters())
    stacks = [(name, param) for name, param in named if param.ndim == 3]
    others = [(name, param) for name, param in named if param.ndim != 3]
    return [{"params": others}, {"params": stacks, "batch_dims": 1}]
