r"""Dequantisation: what connects the density of the latents at t = 0 with the likelihood of data.

A model of latents :math:`p_0(z_0)`, such as the ODE's, gives data a likelihood through a variational distribution
:math:`q(z_0 \mid x)`:

.. math::
    \log p(x) \ge \mathbb E_q \log \frac1K \sum_k p_0(z_0^{(k)})\, w_k, \qquad w = \frac{p(x \mid z_0)}{q(z_0 \mid x)}

For K = 1 it is the usual bound, which K draws tighten (importance weighting, arXiv 1509.00519). The classes differ in q and
in p(x | z_0). Each :meth:`Dequantisation.draw` gives :math:`z_0` and :math:`\log w`. Bits/dim under different ones
are different numbers: every result carries the name.
"""

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nfdm_lightning.decoder import Decoder, DiscreteDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import sum_event
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.seeding import standard_normal


class Dequantisation(abc.ABC):
    """Base of the dequantisations; a subclass writes :meth:`draw` and says its :attr:`name`."""

    name: str
    """What it is called."""

    def described(self, decoder: Decoder) -> str:
        """Returns what a result says of it."""
        return self.name

    @abc.abstractmethod
    def draw(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Returns latents z_0 ~ q(z_0 | x), (B, *event), and log w = log p(x | z_0) - log q(z_0 | x) in nats, (B,).

        Args:
            reverse: the generative model.
            decoder: p(x | z_0) of the model.
            x: data, (B, *event), or pairs of data and source for a bridge.
            generators: one CPU generator for each sample.

        Raises:
            ConfigError: the dequantisation is not for such data.
        """


class WithDecoder(Dequantisation):
    r"""The model's own start: q(z_0 | x) of the forward process and p(x | z_0) of the decoder.

    The latents are then those that the model was trained on, and a discrete likelihood needs no noise of its own.
    """

    name = "none"

    def described(self, decoder: Decoder) -> str:
        return f"{self.name}: {decoder.name}"

    def draw(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        process, (target, _) = reverse.process, reverse.process.split(x)
        eps = standard_normal(tuple(target.shape), x.dtype, generators).to(x.device)
        z = process.start(eps, x)
        log_q = process.log_prob(z, x.new_zeros(len(x)), x)
        return z, decoder.log_prob(target, z, *process.reference_at_data(x)) - log_q


class Density(Dequantisation):
    r"""Continuous data as they are: :math:`z_0 = \alpha_0 x`, the density of the model's samples :math:`z_0 / \alpha_0`."""

    name = "none: density of z_0 / alpha_0"

    def draw(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        if isinstance(decoder, DiscreteDecoder):
            raise ConfigError(
                f"Density is for continuous data, but these have {decoder.levels} levels: choose WithDecoder, Uniform or "
                "TruncatedNormal"
            )
        target = reverse.process.split(x)[0]
        alpha, _ = reverse.process.reference_at_data(x)
        return alpha * target, (target[0].numel() * alpha.log()).expand(len(x))


class _InBin(Dequantisation):
    """Noise inside the bin of a level, of width 2 / (L - 1): p(x | z_0) is 1 there."""

    def draw(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(decoder, DiscreteDecoder):
            raise ConfigError(f"{type(self).__name__} is for discrete data, but these are continuous: choose Density")
        target = reverse.process.split(x)[0]
        alpha, sigma = reverse.process.reference_at_data(x)
        shape = target.shape[1:]
        # in float64: the inverse of a distribution function near its ends
        quantiles = torch.stack([torch.rand(shape, generator=own, dtype=torch.float64) for own in generators])
        offset, log_density = self.noise(quantiles, 1 / (decoder.levels - 1), float(sigma / alpha))
        log_w = target[0].numel() * alpha.log() - sum_event(log_density).to(x)
        return alpha * (target + offset.to(x)), log_w

    @abc.abstractmethod
    def noise(self, quantiles: Tensor, half: float, std: float) -> tuple[Tensor, Tensor]:
        """Returns noise in (-half, half) at quantiles of its distribution, and its log density, each (B, *event).

        Args:
            quantiles: uniform in (0, 1), float64.
            half: half of the width of a bin, in data units.
            std: of q(z_0 | x) along the reference path, in data units.
        """


class Uniform(_InBin):
    r"""Uniform noise over the bin: :math:`-\log w = -D \log(\alpha_0 \cdot 2 / (L - 1))`.

    The usual one, for models trained on data with that noise. One trained on the levels themselves, as here, has seen no
    latents between them and gives them little density.
    """

    name = "uniform"

    def noise(self, quantiles: Tensor, half: float, std: float) -> tuple[Tensor, Tensor]:
        return (2 * quantiles - 1) * half, torch.full_like(quantiles, -math.log(2 * half))


class TruncatedNormal(_InBin):
    r"""Normal noise cut off at the ends of the bin, by default as wide as that of the forward process at t = 0.

    Its latents are those of training, but for the cut. (arXiv 2305.03935 introduces it, for diffusion ODEs.)

    Args:
        std: standard deviation before the cut, in data units; None takes the process's, sigma_0 / alpha_0.
    """

    name = "truncated normal"

    def __init__(self, std: float | None = None) -> None:
        if std is not None and not std > 0:
            raise ConfigError(f"TruncatedNormal.std={std} must be positive")
        self.std = std

    def noise(self, quantiles: Tensor, half: float, std: float) -> tuple[Tensor, Tensor]:
        std = std if self.std is None else self.std
        mass = math.erf(half / std / math.sqrt(2))
        # the quantile function of the normal, between those of the two ends
        u = torch.special.ndtri(0.5 * (1 - mass) + mass * quantiles).clamp(-half / std, half / std)
        return std * u, -0.5 * u**2 - math.log(std * math.sqrt(2 * math.pi) * mass)


def log_mean_exp(values: Tensor) -> Tensor:
    """Returns log (1/K) sum exp over the first dimension: (K, B) to (B,)."""
    return values.logsumexp(0) - math.log(len(values))
