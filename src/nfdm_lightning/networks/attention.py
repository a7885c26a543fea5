r"""Multi-head self-attention, of token sequences and over the positions of images.

.. math:: \text{softmax}\big(Q K^\top / \sqrt d\big)\, V, \qquad d \text{ the features of a head}

It is written on torch's ``scaled_dot_product_attention``, whose fused kernels serve training and sampling. None of them has
forward-mode autodiff: who takes a time derivative chooses the plain form (``sdpa_kernel(SDPBackend.MATH)``) around it.
"""

from torch import Tensor, nn
from torch.nn import functional

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks.embedding import zero_


class SelfAttention(nn.Module):
    """Multi-head self-attention of token sequences, with its input and output projections.

    Args:
        features: features of a token.
        heads: number of heads; each sees features / heads of them.

    Raises:
        ConfigError: the heads do not divide the features.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or features % heads:
            raise ConfigError(f"heads={heads} must divide the {features} features that attention works on")
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, h: Tensor) -> Tensor:
        """Returns the attended tokens, (B, N, features), of h (B, N, features)."""
        query, key, value = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class ImageAttention(nn.Module):
    """Residual self-attention over the H W positions of an image; it starts as the identity.

    Args:
        features: features of a position.
        heads: number of heads.
        norm: the norm before attention, of images.

    Raises:
        ConfigError: the heads do not divide the features.
    """

    def __init__(self, features: int, heads: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.attention = SelfAttention(features, heads)
        zero_(self.attention.out)

    def forward(self, h: Tensor) -> Tensor:
        """Returns h plus what attention adds, (B, features, H, W), at h of that shape."""
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        return h + self.attention(tokens).transpose(1, 2).unflatten(2, h.shape[2:])
