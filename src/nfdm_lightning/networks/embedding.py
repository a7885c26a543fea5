"""What the networks share: the embedding of time, and a zero start."""

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    r"""Embeds t in [0, 1] by sines and cosines of :math:`\pi f_k t`, f_k geometric in [1/2, max_frequency], and an MLP.

    Smooth and of bounded slope, because a learned forward process is differentiated in t.

    Args:
        features: size of the embedding.
        frequencies: number of frequencies.
        max_frequency: the largest f_k.
        num_classes: number of classes, to each of which, and to "no label" after them, it adds a learned vector; None for an
            embedding of t alone.
    """

    frequencies: Tensor

    def __init__(
        self, features: int, frequencies: int = 16, max_frequency: float = 32.0, num_classes: int | None = None
    ) -> None:
        super().__init__()
        grid = 0.5 * (2 * max_frequency) ** torch.linspace(0, 1, frequencies)
        self.register_buffer("frequencies", math.pi * grid, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, features)

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the embedding of t (B,) and, if there are classes, of labels (B,), None for no label: (B, features)."""
        angles = t[:, None] * self.frequencies
        embedding: Tensor = self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.classes is None:
            return embedding
        label = t.new_full(t.shape, self.classes.num_embeddings - 1, dtype=torch.long) if label is None else label
        return embedding + self.classes(label)


def zero_(layer: nn.Module) -> None:
    """Sets the parameters of a layer to zero, so that what it feeds starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
