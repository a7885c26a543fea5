r"""The U-Net of variational diffusion models (arXiv 2107.00630, appendix): made for likelihood, it never down-samples.

Its input is extended by Fourier features of itself, which tell apart pixel values that differ by one grey level:

.. math:: \sin(2^n \pi x), \quad \cos(2^n \pi x)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfdm_lightning.networks.blocks import ResBlock, check_images, evaluate, group_norm
from nfdm_lightning.networks.embedding import TimeEmbedding, zero_


class VDMUNet(nn.Module):
    """Maps images (x, t) to images of the output shape, all at full resolution; its output starts at zero.

    ``blocks`` residual blocks, then block, attention, block, then ``blocks`` + 1 blocks, each of which also sees the output
    of its partner before the middle. The defaults are those of the authors' CIFAR-10 model, but for dropout, which is 0.1
    there. Their embedding of time is another, and it enters the blocks as a shift alone; here it scales, too.

    Args:
        in_shape: (C, H, W) of the input.
        out_shape: (C, H, W) of the output, of the same H and W.
        channels: features.
        blocks: residual blocks before the middle.
        fourier: the n of the Fourier features of the input as the network gets it; () for none. The default is meant for
            256 grey levels in [-1, 1].
        heads: heads of the attention in the middle.
        groups: groups of GroupNorm, reduced where they do not divide the features.
        dropout: dropout probability; 0 in any network of a forward process.
        checkpointing: whether to compute the activations of the blocks again in the backward pass instead of keeping them;
            not in a network of a forward process.
        num_classes: number of classes whose labels it sees; filled in where the data have labels.

    Raises:
        ConfigError: the shapes are not images, or the heads do not divide the features.
    """

    frequencies: Tensor

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        channels: int = 128,
        blocks: int = 32,
        fourier: Sequence[int] = (7, 8),
        heads: int = 1,
        groups: int = 32,
        dropout: float = 0.0,
        checkpointing: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_images("VDMUNet", in_shape, out_shape)
        self.checkpointing = checkpointing
        embedding = 4 * channels
        self.register_buffer("frequencies", torch.tensor([math.pi * 2.0**n for n in fourier]), persistent=False)
        self.embed = TimeEmbedding(embedding, num_classes=num_classes)
        self.inp = nn.Conv2d((1 + 2 * len(fourier)) * in_shape[0], channels, 3, padding=1)
        self.down = nn.ModuleList(ResBlock(channels, channels, embedding, groups, dropout) for _ in range(blocks))
        self.mid = ResBlock(channels, channels, embedding, groups, dropout, heads)
        self.mid_out = ResBlock(channels, channels, embedding, groups, dropout)
        self.up = nn.ModuleList(ResBlock(2 * channels, channels, embedding, groups, dropout) for _ in range(blocks + 1))
        self.norm = group_norm(channels, groups)
        self.out = nn.Conv2d(channels, out_shape[0], 3, padding=1)
        zero_(self.out)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the output, (B, C', H, W), at x (B, C, H, W), t (B,) and, if there are classes, label (B,)."""
        embedding = self.embed(t, label)
        h = self.inp(self.features(x))
        skips = [h]
        for block in self.down:
            h = evaluate(block, h, embedding, self.checkpointing)
            skips.append(h)
        h = evaluate(self.mid, h, embedding, self.checkpointing)
        h = evaluate(self.mid_out, h, embedding, self.checkpointing)
        for block in self.up:
            h = evaluate(block, torch.cat([h, skips.pop()], 1), embedding, self.checkpointing)
        return self.out(functional.silu(self.norm(h)))

    def features(self, x: Tensor) -> Tensor:
        """Returns x, sines and cosines, (B, (1 + 2 F) C, H, W), of x (B, C, H, W) at F frequencies."""
        if not len(self.frequencies):
            return x
        # frequencies of hundreds need more digits than half precision has
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        angles = (wide[:, None] * self.frequencies[:, None, None, None].to(wide.dtype)).flatten(1, 2)
        return torch.cat([wide, angles.sin(), angles.cos()], 1).to(x.dtype)
