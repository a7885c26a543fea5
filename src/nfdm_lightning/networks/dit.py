r"""A diffusion transformer (DiT, arXiv 2212.09748): patches as tokens, time as modulation of every block (adaLN-Zero).

.. math:: h \leftarrow h + \text{gate}_1\, \text{attention}\big((1 + \text{scale}_1)\, n(h) + \text{shift}_1\big), \qquad
    h \leftarrow h + \text{gate}_2\, \text{mlp}\big((1 + \text{scale}_2)\, n(h) + \text{shift}_2\big)

where the scales, shifts and gates are linear in the embedding of time and start at zero. The norm n is

.. math:: n(h) = h / \sqrt{\text{mean}(h^2) + 10^{-6}}

(RMSNorm, arXiv 1910.07467) in place of the paper's LayerNorm, because the gradient of LayerNorm's forward-mode derivative,
which the training of a learned forward process takes, is silently wrong in torch.
"""

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks.attention import SelfAttention
from nfdm_lightning.networks.blocks import check_images, evaluate
from nfdm_lightning.networks.embedding import TimeEmbedding, zero_


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.apply(_xavier)
        self.modulation = nn.Linear(width, 6 * width)
        zero_(self.modulation)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=2)
        h = h + gate1 * self.attention(_rms_norm(h) * (1 + scale1) + shift1)
        return h + gate2 * self.mlp(_rms_norm(h) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Maps images (x, t) to images of the output shape; its output starts at zero.

    The defaults are the paper's DiT-S/2. Its larger ones have (depth, width, heads) of B (12, 768, 12), L (24, 1024, 16) and
    XL (28, 1152, 16), with patches of 2, 4 or 8.

    Args:
        in_shape: (C, H, W) of the input.
        out_shape: (C, H, W) of the output, of the same H and W.
        patch: side of the square patches that become tokens.
        width: features of a token, divisible by 4.
        depth: number of blocks.
        heads: heads of attention.
        mlp_ratio: hidden features of a block's MLP, as a multiple of ``width``.
        checkpointing: whether to compute the activations of the blocks again in the backward pass instead of keeping them;
            not in a network of a forward process.
        num_classes: number of classes whose labels it sees; filled in where the data have labels.

    Raises:
        ConfigError: the shapes are not images, the patch does not divide H and W, the heads do not divide the width, or 4
            does not.
    """

    positions: Tensor

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        checkpointing: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_images("DiT", in_shape, out_shape)
        if patch < 1 or in_shape[1] % patch or in_shape[2] % patch:
            raise ConfigError(f"patch={patch} must divide height and width of DiT's images, {in_shape[1]}x{in_shape[2]}")
        if width % 4:
            raise ConfigError(f"width={width} of DiT must be divisible by 4: sine and cosine of row and column share it")
        self.checkpointing = checkpointing
        self.patch = patch
        self.rows, self.columns = in_shape[1] // patch, in_shape[2] // patch
        self.register_buffer("positions", sincos_positions(self.rows, self.columns, width), persistent=False)
        self.embed = TimeEmbedding(width, num_classes=num_classes)
        self.inp = nn.Linear(in_shape[0] * patch**2, width)
        self.inp.apply(_xavier)
        self.blocks = nn.ModuleList(_Block(width, heads, round(mlp_ratio * width)) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out_shape[0] * patch**2)
        zero_(self.modulation)
        zero_(self.out)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Returns the output, (B, C', H, W), at x (B, C, H, W), t (B,) and, if there are classes, label (B,)."""
        embedding = self.embed(t, label)
        h = self.inp(self.patches(x)) + self.positions
        for block in self.blocks:
            h = evaluate(block, h, embedding, self.checkpointing)
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=2)
        return self.image(self.out(_rms_norm(h) * (1 + scale) + shift))

    def patches(self, x: Tensor) -> Tensor:
        """Returns the patches, (B, N, C patch^2), of images (B, C, H, W), row by row."""
        parts = x.unflatten(3, (self.columns, self.patch)).unflatten(2, (self.rows, self.patch))
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def image(self, patches: Tensor) -> Tensor:
        """Returns the images that have these patches: the inverse of :meth:`patches`."""
        parts = patches.unflatten(2, (-1, self.patch, self.patch)).unflatten(1, (self.rows, self.columns))
        return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    r"""Returns the fixed embedding of the positions of a grid, (rows * columns, width), row by row.

    .. math:: \big(\sin(\omega_k r), \cos(\omega_k r), \sin(\omega_k c), \cos(\omega_k c)\big), \qquad
        \omega_k = 10^{-4 k / K}, \quad k = 0, \dots, K - 1, \quad K = \text{width} / 4

    Args:
        rows: rows r of the grid.
        columns: columns c of the grid.
        width: features, divisible by 4.
    """
    count = width // 4
    omega = 10.0 ** (-4 * torch.arange(count, dtype=torch.float64) / count)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [place.flatten()[:, None] * omega for place in (row, column)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).to(torch.get_default_dtype())


def _rms_norm(h: Tensor) -> Tensor:
    # written out: torch's own may be a fused kernel, and what forward mode makes of those is not to be relied on
    return h * torch.rsqrt(h.square().mean(2, keepdim=True) + 1e-6)


def _xavier(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
