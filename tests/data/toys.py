"""Toy language models without attention: a position depends on its own token only."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, acts: torch.Tensor) -> torch.Tensor:
        return acts + self.inner(acts).tanh()


class Toy(nn.Module):
    """A language model without attention; subclasses say how its blocks run."""

    blocks: nn.Module

    def __init__(self, make: type[nn.Module] = Block, width: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3, vocab_size=50)
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.head = nn.Linear(width, 50)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def run(self, acts: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.children():
            acts = block(acts)
        return acts

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.run(self.embedding(input_ids))))


class LogitsOfTheLastTokenOnly(Toy):
    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_ids).logits[:, -1])
