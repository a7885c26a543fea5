"""What the convolutional networks share: the residual block, its norm, activation checkpointing and the check of shapes."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks.attention import ImageAttention
from nfdm_lightning.networks.embedding import zero_


class ResBlock(nn.Module):
    """Two convolutions with GroupNorm, time as scale and shift of the second norm, and a skip; it adds zero at first.

    Args:
        inp: features of the input.
        out: features of the output.
        embedding: features of the embedding of time.
        groups: groups of GroupNorm, reduced where they do not divide the features.
        dropout: dropout probability before the second convolution.
        heads: heads of self-attention after the block; None for no attention.
        resample: a layer without parameters that changes the resolution, applied in both branches before any convolution
            (as in BigGAN, arXiv 1809.11096).

    Raises:
        ConfigError: the heads do not divide the features.
    """

    def __init__(
        self,
        inp: int,
        out: int,
        embedding: int,
        groups: int,
        dropout: float,
        heads: int | None = None,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(inp, groups), group_norm(out, groups)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * out)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.skip = nn.Conv2d(inp, out, 1) if inp != out else None
        self.resample = resample
        self.attention = None if heads is None else ImageAttention(out, heads, group_norm(out, groups))
        zero_(self.conv2)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Returns the features, (B, out, H', W'), at h (B, inp, H, W) and the embedding of time (B, embedding)."""
        update = functional.silu(self.norm1(h))
        if self.resample is not None:
            update, h = self.resample(update), self.resample(h)
        update = self.conv1(update)
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)
        update = functional.silu(self.norm2(update) * (1 + scale) + shift)
        if self.dropout is not None:
            update = self.dropout(update)
        h = (h if self.skip is None else self.skip(h)) + self.conv2(update)
        return h if self.attention is None else self.attention(h)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the precision of its parameters, whatever autocast made of the input.

    On the CPU torch would take the input as it comes, and under forward mode give a value in bfloat16 a derivative in
    float32, which the next convolution refuses.
    """

    def forward(self, h: Tensor) -> Tensor:
        """Returns the normalised features, of the shape of h (B, C, *)."""
        return super().forward(h.to(self.weight.dtype))


def group_norm(features: int, groups: int) -> GroupNorm:
    """Returns a GroupNorm of the largest number of groups, at most ``groups``, that divides the features."""
    while features % groups:
        groups -= 1
    return GroupNorm(groups, features)


def evaluate(block: nn.Module, h: Tensor, embedding: Tensor, checkpointing: bool) -> Tensor:
    """Returns block(h, embedding); with checkpointing its activations are not kept for the gradient but computed again."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, h, embedding, use_reentrant=False, preserve_rng_state=True)
    return block(h, embedding)


def check_images(owner: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    """Refuses shapes that are not images of one height and width.

    Raises:
        ConfigError: names the network and the shapes.
    """
    if len(in_shape) != 3 or len(out_shape) != 3 or tuple(in_shape[1:]) != tuple(out_shape[1:]):
        raise ConfigError(f"{owner} maps (C, H, W) to (C', H, W), got {tuple(in_shape)} to {tuple(out_shape)}")
