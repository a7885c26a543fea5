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
    """

    frequencies: Tensor

    def __init__(self, features: int, frequencies: int = 16, max_frequency: float = 32.0) -> None:
        super().__init__()
        grid = 0.5 * (2 * max_frequency) ** torch.linspace(0, 1, frequencies)
        self.register_buffer("frequencies", math.pi * grid, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """Returns the embedding of t (B,), shape (B, features)."""
        angles = t[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


def zero_(layer: nn.Module) -> None:
    """Sets the parameters of a layer to zero, so that what it feeds starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
