r"""Decoders: the likelihood :math:`p(x \mid z_0)` of the reconstruction term.

The latent at t = 0 is :math:`z_0 \approx \alpha_0 x + \sigma_0 \varepsilon`, with (alpha_0, sigma_0) the reference path of
the process at 0; any decoder gives a valid bound.
"""

import abc
import math

import torch
from torch import Tensor

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import sum_event


class Decoder(abc.ABC):
    """p(x | z_0) and its most likely x."""

    name: str
    """What a result says of it."""

    @abc.abstractmethod
    def log_prob(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns log p(x | z_0 = z) in nats, (B,); alpha and sigma are scalars."""

    @abc.abstractmethod
    def mode(self, z: Tensor, alpha: Tensor) -> Tensor:
        """Returns the most likely x given z_0 = z, (B, *event)."""


class GaussianDecoder(Decoder):
    r"""Continuous data: :math:`p(x \mid z_0) = \mathcal N(z_0 / \alpha_0, \text{std}^2 I)`.

    Args:
        std: standard deviation; None takes that of the process, sigma_0 / alpha_0.
    """

    def __init__(self, std: float | None = None) -> None:
        if std is not None and not std > 0:
            raise ConfigError(f"decoder std {std} must be positive")
        self.std = std
        self.name = f"Gaussian decoder of {'the std of the process' if std is None else f'std {std:g}'}"

    def log_prob(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        std = sigma / alpha if self.std is None else torch.as_tensor(self.std, dtype=z.dtype, device=z.device)
        return sum_event(-0.5 * ((x - z / alpha) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi))

    def mode(self, z: Tensor, alpha: Tensor) -> Tensor:
        return z / alpha


class DiscreteDecoder(Decoder):
    r"""Discrete data on equally spaced levels :math:`l_k` in [-1, 1] (VDM, arXiv 2107.00630, section 3.3).

    .. math:: p(x = l_k \mid z_0) = \text{softmax}_k\Big(-\frac{(z_0 / \alpha_0 - l_k)^2}{2 \sigma_0^2 / \alpha_0^2}\Big)

    independently per dimension: the log probability of a discrete value, so bits/dim need no dequantisation. Levels further
    than 12 standard deviations from the nearest one weigh less than exp(-72) and are left out of the sum, so that memory
    does not grow with the number of levels.

    Args:
        levels: number of levels, at least 2.
    """

    def __init__(self, levels: int) -> None:
        if levels < 2:
            raise ConfigError(f"discrete data need at least 2 levels, got {levels}")
        self.levels, self.name = levels, f"discrete decoder over {levels} levels"

    def log_prob(self, x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # in units of levels: place of z, its std, and place of x
        half = 0.5 * (self.levels - 1)
        place, std = (z / alpha + 1) * half, sigma / alpha * half
        index = ((x + 1) * half).round().clamp(0, self.levels - 1)
        reach = math.ceil(min(12 * float(std.detach().nan_to_num()), self.levels - 1))
        nearest = place.detach().round().clamp(0, self.levels - 1)
        near = nearest[..., None] + torch.arange(-reach, reach + 1, dtype=z.dtype, device=z.device)
        logits = -0.5 * ((place[..., None] - near) / std) ** 2
        logits = logits.masked_fill((near < 0) | (near > self.levels - 1), -torch.inf)
        return sum_event(-0.5 * ((place - index) / std) ** 2 - logits.logsumexp(-1))

    def mode(self, z: Tensor, alpha: Tensor) -> Tensor:
        top = self.levels - 1
        return ((z / alpha + 1) * 0.5 * top).round().clamp(0, top) * (2 / top) - 1
