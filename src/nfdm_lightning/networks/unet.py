"""A U-Net with time conditioning, for images from 8x8 up: small by default, and up to the size of the papers'."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks.blocks import ResBlock, check_images, evaluate, group_norm
from nfdm_lightning.networks.embedding import TimeEmbedding, zero_


class UNet(nn.Module):
    """Maps images (x, t) to images of the output shape, through resolutions halved per level; its output starts at zero.

    A learned embedding of the pixel position is added to the input features when ``positions`` is set: in centred data,
    such as digits, where a pixel stands says much about it.

    With ``attention`` (and ``residual_resampling``) it has the parts of the U-Nets of DDPM++ (arXiv 2011.13456) and ADM
    (arXiv 2105.05233), whose widths, depths and resolutions are set by the other arguments.

    Args:
        in_shape: (C, H, W) of the input.
        out_shape: (C, H, W) of the output, of the same H and W.
        channels: features at full resolution.
        multipliers: features of each level, as multiples of ``channels``.
        blocks: residual blocks per level.
        groups: groups of GroupNorm, reduced where they do not divide the features.
        dropout: dropout probability; 0 in any network of a forward process.
        positions: whether to add a learned embedding of the pixel position.
        attention: image heights at which self-attention follows each residual block. If there are any, the middle has two
            blocks with attention between them, else it is one block.
        head_channels: features per head of attention.
        residual_resampling: whether the resolution changes inside residual blocks rather than by one convolution.
        checkpointing: whether to compute the activations of the blocks again in the backward pass instead of keeping them;
            not in a network of a forward process.
        num_classes: number of classes whose labels it sees; filled in where the data have labels.

    Raises:
        ConfigError: the shapes are not images, H and W cannot be halved often enough, no level has a height of
            ``attention``, or ``head_channels`` does not divide the features there.
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
        attention: Sequence[int] = (),
        head_channels: int = 64,
        residual_resampling: bool = False,
        checkpointing: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_images("UNet", in_shape, out_shape)
        factor = 2 ** (len(multipliers) - 1)
        if in_shape[1] % factor or in_shape[2] % factor:
            raise ConfigError(
                f"UNet with {len(multipliers)} levels needs height and width divisible by {factor}, got "
                f"{in_shape[1]}x{in_shape[2]}: give fewer multipliers"
            )
        heights = [in_shape[1] // 2**level for level in range(len(multipliers))]
        if absent := [height for height in attention if height not in heights]:
            raise ConfigError(
                f"UNet has no level of height {absent[0]}, which attention={list(attention)} names: images of height "
                f"{in_shape[1]} and {len(multipliers)} multipliers give {heights}"
            )

        def heads(features: int) -> int:
            if head_channels < 1 or features % head_channels:
                raise ConfigError(
                    f"head_channels={head_channels} must divide the {features} features of a level with attention: change "
                    "it, channels or multipliers"
                )
            return features // head_channels

        self.checkpointing = checkpointing
        embedding = 4 * channels
        self.embed = TimeEmbedding(embedding, num_classes=num_classes)
        self.inp = nn.Conv2d(in_shape[0], channels, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(channels, *in_shape[1:])) if positions else None

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            inner = multiplier * channels
            attended = heads(inner) if heights[level] in attention else None
            for _ in range(blocks):
                self.down.append(ResBlock(width, inner, embedding, groups, dropout, attended))
                width = inner
                skips.append(width)
            if level + 1 < len(multipliers):
                self.down.append(
                    ResBlock(width, width, embedding, groups, dropout, resample=nn.AvgPool2d(2))
                    if residual_resampling
                    else nn.Conv2d(width, width, 3, stride=2, padding=1)
                )
                skips.append(width)
        self.mid = ResBlock(width, width, embedding, groups, dropout, heads(width) if attention else None)
        self.mid_out = ResBlock(width, width, embedding, groups, dropout) if attention else None
        for level, multiplier in reversed(list(enumerate(multipliers))):
            inner = multiplier * channels
            attended = heads(inner) if heights[level] in attention else None
            for _ in range(blocks + 1):
                self.up.append(ResBlock(width + skips.pop(), inner, embedding, groups, dropout, attended))
                width = inner
            if level > 0:
                self.up.append(
                    ResBlock(width, width, embedding, groups, dropout, resample=nn.Upsample(scale_factor=2))
                    if residual_resampling
                    else nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))
                )
        self.norm = group_norm(width, groups)
        self.out = nn.Conv2d(width, out_shape[0], 3, padding=1)
        zero_(self.out)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the output, (B, C', H, W), at x (B, C, H, W), t (B,) and, if there are classes, label (B,)."""
        embedding = self.embed(t, label)
        h = self.inp(x)
        if self.position is not None:
            h = h + self.position
        skips = [h]
        for layer in self.down:
            h = evaluate(layer, h, embedding, self.checkpointing) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        h = evaluate(self.mid, h, embedding, self.checkpointing)
        if self.mid_out is not None:
            h = evaluate(self.mid_out, h, embedding, self.checkpointing)
        for layer in self.up:
            if not isinstance(layer, ResBlock):
                h = layer(h)
                continue
            if layer.resample is None:
                h = torch.cat([h, skips.pop()], 1)
            h = evaluate(layer, h, embedding, self.checkpointing)
        return self.out(functional.silu(self.norm(h)))
