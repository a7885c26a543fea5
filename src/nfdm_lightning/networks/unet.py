"""A small U-Net with time conditioning, for images from 8x8 up."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks.embedding import TimeEmbedding, zero_


class _ResBlock(nn.Module):
    def __init__(self, inp: int, out: int, embedding: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inp, groups), _norm(out, groups)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * out)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.skip = nn.Conv2d(inp, out, 1) if inp != out else None
        zero_(self.conv2)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        update = self.conv1(functional.silu(self.norm1(h)))
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        update = functional.silu(self.norm2(update) * (1 + scale) + shift)
        if self.dropout is not None:
            update = self.dropout(update)
        return (h if self.skip is None else self.skip(h)) + self.conv2(update)


class UNet(nn.Module):
    """Maps images (x, t) to images of the output shape, through resolutions halved per level; its output starts at zero.

    A learned embedding of the pixel position is added to the input features when ``positions`` is set: in centred data,
    such as digits, where a pixel stands says much about it.

    Args:
        in_shape: (C, H, W) of the input.
        out_shape: (C, H, W) of the output, of the same H and W.
        channels: features at full resolution.
        multipliers: features of each level, as multiples of ``channels``.
        blocks: residual blocks per level.
        groups: groups of GroupNorm, reduced where they do not divide the features.
        dropout: dropout probability; 0 in any network of a forward process.
        positions: whether to add a learned embedding of the pixel position.

    Raises:
        ConfigError: the shapes are not images, or H and W cannot be halved often enough.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        groups: int = 8,
        dropout: float = 0.0,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if len(in_shape) != 3 or tuple(in_shape[1:]) != tuple(out_shape[1:]):
            raise ConfigError(f"UNet maps (C, H, W) to (C', H, W), got {tuple(in_shape)} to {tuple(out_shape)}")
        factor = 2 ** (len(multipliers) - 1)
        if in_shape[1] % factor or in_shape[2] % factor:
            raise ConfigError(
                f"UNet with {len(multipliers)} levels needs height and width divisible by {factor}, got "
                f"{in_shape[1]}x{in_shape[2]}: give fewer multipliers"
            )
        embedding = 4 * channels
        self.embed = TimeEmbedding(embedding)
        self.inp = nn.Conv2d(in_shape[0], channels, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(channels, *in_shape[1:])) if positions else None

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(_ResBlock(width, multiplier * channels, embedding, groups, dropout))
                width = multiplier * channels
                skips.append(width)
            if level + 1 < len(multipliers):
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.mid = _ResBlock(width, width, embedding, groups, dropout)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(_ResBlock(width + skips.pop(), multiplier * channels, embedding, groups, dropout))
                width = multiplier * channels
            if level > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.norm = _norm(width, groups)
        self.out = nn.Conv2d(width, out_shape[0], 3, padding=1)
        zero_(self.out)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the output, (B, C', H, W), at x (B, C, H, W) and t (B,)."""
        embedding = self.embed(t)
        h = self.inp(x)
        if self.position is not None:
            h = h + self.position
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, _ResBlock) else layer(h)
            skips.append(h)
        h = self.mid(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), embedding) if isinstance(layer, _ResBlock) else layer(h)
        return self.out(functional.silu(self.norm(h)))


def _norm(features: int, groups: int) -> nn.GroupNorm:
    while features % groups:
        groups -= 1
    return nn.GroupNorm(groups, features)
