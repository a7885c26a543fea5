r"""The volatility g(t) of the forward and reverse SDE, always learned or fixed *around* a reference in log space.

Near t = 0 the score difference is multiplied by 1/std^2, so a g of order one there costs thousands of bits; g must start at
the scale that the process's reference path gives.
"""

import abc

import torch
from torch import Tensor, nn

from nfdm_lightning.networks.embedding import TimeEmbedding, zero_
from nfdm_lightning.processes.base import bounded, check_bound


class Volatility(nn.Module, abc.ABC):
    """Maps times and the process's reference to g^2(t) > 0."""

    @abc.abstractmethod
    def forward(self, t: Tensor, reference_g2: Tensor) -> Tensor:
        """Returns g^2(t), (B,), from t (B,) and the process's reference g^2 (B,)."""


class MatchedVolatility(Volatility):
    r"""g^2 is the reference, :math:`2\sigma^2(\sigma'/\sigma - \alpha'/\alpha)`: optimal for a fixed Gaussian process."""

    def forward(self, t: Tensor, reference_g2: Tensor) -> Tensor:
        return reference_g2


class LearnedVolatility(Volatility):
    r"""Learned around the reference: :math:`\log g^2(t) = \log \text{reference}(t) + b \tanh(n(t) / b)`.

    It starts at the reference, and stays within a factor exp(b) of it: unbounded, a learned g climbs near t = 1 until
    few-step samplers diverge.

    Args:
        width: hidden features of n.
        bound: b, the limit of the change of log g^2.
    """

    def __init__(self, width: int = 32, bound: float = 2.0) -> None:
        super().__init__()
        self.bound = check_bound(bound)
        self.embed = TimeEmbedding(width, frequencies=4, max_frequency=4.0)
        self.out = nn.Linear(width, 1)
        zero_(self.out)

    def forward(self, t: Tensor, reference_g2: Tensor) -> Tensor:
        change = self.out(self.embed(t))[:, 0]
        return reference_g2 * torch.exp(bounded(change, self.bound))
