r"""Bridges: the path runs from data to samples of a second data set instead of to noise."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import build_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import AffineProcess, Shape, bounded, check_bound, check_delta, expand_as_event, sum_event


class Bridge(AffineProcess):
    r"""A learned bridge from a source sample :math:`x_1` (t = 1) to the data :math:`x_0` (t = 0).

    .. math::
        \text{mean}(t, x) &= (1 - t)\,x_0 + t\,x_1 + t(1 - t)\,m(x_0, x_1, t) \\
        \log \text{std}(t, x) &= (1 - t) \log\delta + \tfrac12 \log\big(\delta^2 t + (1 - t)(1 - t + n^2 t)\big)
            + t(1 - t)\,l(x_0, x_1, t), \qquad |l| < \text{bound}

    Its std is delta at both ends: like NFDM's near the data, and like a Brownian bridge of scale n near the source, where
    the reverse SDE then starts with a volatility of n. The model is of :math:`p(x_0 \mid x_1)`: it starts from real source
    samples with noise delta, and its predictor sees them. Pairs may be matched, or independent draws from two data sets.
    (NFDM, arXiv 2404.12940, section 5.3, learns bridges in this way; the shape of std is ours.)

    Its data are pairs, x = (x_0, x_1) stacked to (B, 2, *event), as the DataModule ``Pairs`` gives them.

    Args:
        shape: event shape of x_0 and of x_1.
        network: builds (m, l) from (input shape, output shape); it sees x_0 and x_1 stacked along the first event dimension.
        delta: standard deviation at both ends, in data units.
        noise: n, the scale of the noise between the ends, in data units.
        bound: limit of |l|, reached smoothly through tanh.
        num_classes: number of classes whose labels the network sees; filled in where the data have labels.
    """

    takes_source: ClassVar[bool] = True

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        delta: float = 1e-2,
        noise: float = 1.0,
        bound: float = 8.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        if not noise > delta:
            raise ConfigError(f"noise={noise} must be above delta={delta}: it is the scale of the noise between the ends")
        doubled = (2 * self.shape[0], *self.shape[1:])
        self.network = build_network(network, doubled, doubled, num_classes)
        self.delta, self.noise, self.bound = check_delta(delta), noise, check_bound(bound)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x[:, 0], x[:, 1]

    def join(self, x_hat: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None, "a bridge is asked for its path without a source"
        return torch.stack([x_hat, source], 1)

    def prior(self, eps: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None, "a bridge starts from source samples"
        return source + self.delta * eps

    def prior_log_prob(self, z: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None, "a bridge starts from source samples"
        normalised = (z - source) / self.delta
        return -sum_event(0.5 * normalised**2 + math.log(self.delta) + 0.5 * math.log(2 * math.pi))

    def offset(self, t: Tensor, source: Tensor | None) -> Tensor | float:
        assert source is not None, "a bridge is asked for its path without a source"
        return expand_as_event(t, source) * source

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        target, source = x.unbind(1)
        shift, raw = self.call_network(self.network, x.flatten(1, 2), t).chunk(2, dim=1)
        time = expand_as_event(t, target)
        learned = bounded(raw, self.bound)
        mean = (1 - time) * (target + time * shift) + time * source
        return mean, expand_as_event(self._fixed_std(t), target) * torch.exp(time * (1 - time) * learned)

    def _brownian(self, t: Tensor) -> Tensor:
        return self.delta**2 * t + (1 - t) * (1 - t + self.noise**2 * t)

    def _fixed_std(self, t: Tensor) -> Tensor:
        return torch.exp((1 - t) * math.log(self.delta)) * self._brownian(t).sqrt()

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        return x[:, 0] + self.delta * eps  # pinned: needs no network

    def prior_kl(self, eps: Tensor, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))  # pinned: q(z_1 | x) is what the model starts from

    def reference(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self._fixed_std(t)

    def reference_log_ratio(self, t: Tensor) -> Tensor:
        r"""Returns the integral of :math:`|\log\delta| + \tfrac12 n^2 / B(t)`, B the polynomial in the square root of std.

        It is :math:`\log(\text{std} / (1 - t))` but for a slope of :math:`\tfrac12 \delta^2 (1 + t) / (B\,(1 - t))`, which
        diverges at the pin of the source. Without it g is positive everywhere, and n at the source.
        """
        # B = 1 + b t + a t^2, with b > -2 and the discriminant b^2 - 4 a
        b = self.delta**2 - 2 + self.noise**2
        discriminant = (self.noise**2 + self.delta**2) ** 2 - 4 * self.delta**2
        root = math.sqrt(abs(discriminant))
        if discriminant > 0:
            integral = ((2 + (b + root) * t) / (2 + (b - root) * t)).log() / root
        elif discriminant < 0:
            integral = 2 * torch.atan(root * t / (2 + b * t)) / root
        else:
            integral = 2 * t / (2 + b * t)
        return -math.log(self.delta) * t + 0.5 * self.noise**2 * integral

    def reference_g2(self, t: Tensor) -> Tensor:
        return self._fixed_std(t) ** 2 * (self.noise**2 / self._brownian(t) - 2 * math.log(self.delta))
