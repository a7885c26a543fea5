"""A residual MLP with time conditioning, for vectors (and small images, flattened)."""

import math

from torch import Tensor, nn

from nfdm_lightning.networks.blocks import GroupNorm
from nfdm_lightning.networks.embedding import TimeEmbedding, zero_


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = GroupNorm(1, width)
        self.time = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.time(embedding).chunk(2, dim=1)
        update = self.layers(self.norm(h) * (1 + scale) + shift)
        if self.dropout is not None:
            update = self.dropout(update)
        return h + self.out(update)


class ResidualMLP(nn.Module):
    """Maps (x, t) to a tensor of the output shape; its output starts at zero.

    Args:
        in_shape: event shape of the input.
        out_shape: event shape of the output.
        width: hidden features.
        depth: number of residual blocks.
        dropout: dropout probability; 0 in any network of a forward process.
        num_classes: number of classes whose labels it sees; filled in where the data have labels.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.out_shape = tuple(out_shape)
        self.embed = TimeEmbedding(width, num_classes=num_classes)
        self.inp = nn.Linear(math.prod(in_shape), width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.act = nn.SiLU()
        self.out = nn.Linear(width, math.prod(out_shape))
        zero_(self.out)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the output, (B, *out_shape), at x (B, *in_shape), t (B,) and, if there are classes, label (B,)."""
        embedding = self.embed(t, label)
        h = self.inp(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.out(self.act(h)).unflatten(1, self.out_shape)
