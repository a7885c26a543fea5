r"""A noise schedule per dimension that depends on the data (MuLAN, arXiv 2312.13236)."""

from collections.abc import Callable

from torch import Tensor, nn

from nfdm_lightning.labels import build_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import (
    AffineProcess,
    Ends,
    Moments,
    Shape,
    bounded,
    check_bound,
    expand_as_event,
)
from nfdm_lightning.processes.schedules import VariancePreserving


class MuLAN(AffineProcess):
    r"""Variance preserving with its own learned log-SNR for every dimension of every sample.

    .. math::
        z_t &= \sqrt{\text{sigmoid}(-\gamma)}\, x + \sqrt{\text{sigmoid}(\gamma)}\, \varepsilon, \qquad
        \gamma(t, x) = \gamma_0 + (\gamma_1 - \gamma_0)\, p(t, x) / p(1, x) \\
        \partial_t p(t, x) &= (a t^2 + b t + d)^2 + 10^{-3}, \qquad (a, b, d - 1) = c \tanh(n(x) / c), \quad p(0, x) = 0

    the monotone polynomial of the fifth degree of MuLAN (arXiv 2312.13236, section 3.5), so the time derivative is closed
    form and the network is evaluated at x alone. All ends are those of the fixed schedule, which is also where it starts.
    MuLAN conditions gamma on an auxiliary latent that is inferred from x; here it is conditioned on x itself, and the
    reverse process puts x_hat in its place, as NFDM does. One g(t) serves all dimensions, so the bound is not tight for a
    gamma that differs between them.

    Args:
        shape: event shape of x.
        network: builds n from (input shape, output shape), three outputs per dimension; it is evaluated as n(x, 0).
        gamma_min: gamma(0), minus the log-SNR at the data.
        gamma_max: gamma(1).
        bound: c, the limit of the coefficients: at 0.3 the std at x and at x_hat differ by a factor of 37 at most, at 1 by
            400, and the objective gets heavy tails.
        num_classes: number of classes whose labels the network sees; filled in where the data have labels.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        bound: float = 0.3,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        self.schedule = VariancePreserving(gamma_min, gamma_max)
        self.bound = check_bound(bound)
        self.network = build_network(network, self.shape, (3 * self.shape[0], *self.shape[1:]), num_classes)

    def coefficients(self, x: Tensor) -> Tensor:
        """Returns a, b and d - 1, stacked along the first event dimension: the one evaluation of the network."""
        return bounded(self.call_network(self.network, x, x.new_zeros(len(x))), self.bound)

    def gamma(self, t: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gamma and its time derivative, each (B, *event)."""
        a, b, offset = coefficients.chunk(3, dim=1)
        d, floor, time = 1 + offset, 1e-3, expand_as_event(t, a)
        powers = (d**2 + floor, b * d, (b**2 + 2 * a * d) / 3, a * b / 2, a**2 / 5)
        total = sum(powers, a.new_zeros(()))
        value = a.new_zeros(())
        for power in reversed(powers):
            value = (value + power) * time
        span = (self.schedule.gamma_max - self.schedule.gamma_min) / total
        return self.schedule.gamma_min + span * value, span * ((a * time**2 + b * time + d) ** 2 + floor)

    def _moments(self, t: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        gamma, _ = self.gamma(t, coefficients)
        return (-gamma).sigmoid().sqrt() * x, gamma.sigmoid().sqrt()

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._moments(t, x, self.coefficients(x))

    def step_moments(self, t: Tensor, s: Tensor, x: Tensor) -> Ends:
        coefficients = self.coefficients(x)
        return Ends(*self._moments(t, x, coefficients), *self._moments(s, x, coefficients))

    def moments_dt(self, t: Tensor, x: Tensor) -> Moments:
        gamma, gamma_dt = self.gamma(t, self.coefficients(x))
        alpha, sigma = (-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt()
        return Moments(alpha * x, sigma, -0.5 * alpha * sigma**2 * gamma_dt * x, 0.5 * sigma * alpha**2 * gamma_dt)

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = self.schedule(x.new_zeros(len(x)))  # the ends are fixed: needs no network
        return expand_as_event(alpha, x) * x + expand_as_event(sigma, x) * eps

    def reference(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(t)
