r"""Separable NFDM: mean and log std are polynomials in t whose coefficients a network makes of x."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import build_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import (
    AffineProcess,
    Ends,
    Moments,
    Shape,
    bounded,
    check_bound,
    check_delta,
    expand_as_event,
)


class SeparableNFDM(AffineProcess):
    r"""NFDM with separated variables (ours): any time derivative is exact and costs no more than the process itself.

    .. math::
        \text{mean}(t, x) &= (1 - t)\,x + \textstyle\sum_k b_k(t)\,h_k(x) \\
        \log \text{std}(t, x) &= (1 - t) \log\delta + \textstyle\sum_k b_k(t)\,l_k(x), \qquad |l_k| < \text{bound} / K \\
        b_k(t) &= t(1 - t)\,T_k(2t - 1), \qquad k = 0, \dots, K - 1

    with T_k the Chebyshev polynomials. Pinned at both ends as NFDM is. The network is evaluated once, at x alone, and is
    never differentiated in t: there is no forward-mode autodiff but for penalties.

    Args:
        shape: event shape of x.
        network: builds all h_k and l_k from (input shape, output shape), stacked along the first event dimension; it is
            evaluated as n(x, 0).
        terms: K, the number of basis functions.
        delta: standard deviation at t = 0, in data units.
        bound: limit of the learned sum in log std, but for its factor t(1 - t).
        num_classes: number of classes whose labels the network sees; filled in where the data have labels.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        terms: int = 4,
        delta: float = 1e-2,
        bound: float = 8.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        if terms < 1:
            raise ConfigError(f"terms={terms} must be at least 1: the number of basis functions")
        self.network = build_network(network, self.shape, (2 * terms * self.shape[0], *self.shape[1:]), num_classes)
        self.terms, self.delta, self.bound = terms, check_delta(delta), check_bound(bound)

    def basis(self, t: Tensor, order: int = 0) -> Tensor:
        """Returns every b_k and its derivatives up to the order at t (B,), shape (B, order + 1, K)."""
        # by recurrence, T_(k+1) = 2 u T_k - T_(k-1): powers of t cancel in float32
        u, window = 2 * t - 1, t * (1 - t)
        before = [torch.zeros_like(t) for _ in range(order + 1)]
        now = [torch.ones_like(t), *before[1:]]
        columns = []
        for k in range(self.terms):
            # Leibniz with t (1 - t), whose third derivative is 0; a derivative in t is twice that in u
            scaled = [2**n * value for n, value in enumerate(now)]
            for n in range(order + 1):
                column = window * scaled[n]
                if n > 0:
                    column = column - n * u * scaled[n - 1]
                if n > 1:
                    column = column - n * (n - 1) * scaled[n - 2]
                columns.append(column)
            factor = 1 if k == 0 else 2
            after = [factor * (u * now[n] + (n * now[n - 1] if n else 0)) - before[n] for n in range(order + 1)]
            before, now = now, after
        return torch.stack(columns, 1).unflatten(1, (self.terms, order + 1)).transpose(1, 2)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns h and l, each (B, K, *event): the one evaluation of the network."""
        shift, raw = (
            self.call_network(self.network, x, x.new_zeros(len(x))).unflatten(1, (2, self.terms, self.shape[0])).unbind(1)
        )
        return shift, bounded(raw, self.bound / self.terms)

    def _series(
        self, t: Tensor, x: Tensor, shift: Tensor, log_noise: Tensor, order: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns mean and log std with their time derivatives up to the order."""
        basis = self.basis(t, order)
        basis = basis.reshape(*basis.shape, *[1] * (x.ndim - 1))
        # no matrix product: autocast would take it in bfloat16
        means, logs = (list((basis * values[:, None]).sum(2).unbind(1)) for values in (shift, log_noise))
        line = expand_as_event(1 - t, x)
        means[0], logs[0] = means[0] + line * x, logs[0] + line * math.log(self.delta)
        if order > 0:
            means[1], logs[1] = means[1] - x, logs[1] - math.log(self.delta)
        return means, logs

    def derivatives(self, eps: Tensor, t: Tensor, x: Tensor, order: int) -> list[Tensor]:
        r"""Returns :math:`F, \partial_t F, \dots, \partial_t^n F` at fixed eps, each (B, *event), from one evaluation.

        The derivatives of :math:`\text{std} = \exp L` follow from those of L:
        :math:`\text{std}^{(n)} = \sum_{k=1}^{n} \binom{n-1}{k-1} L^{(k)}\, \text{std}^{(n-k)}`.
        """
        shift, log_noise = self.coefficients(x)
        means, logs = self._series(t, x, shift, log_noise, order)
        stds = [logs[0].exp()]
        for n in range(1, order + 1):
            stds.append(sum((math.comb(n - 1, k - 1) * logs[k] * stds[n - k] for k in range(1, n + 1)), torch.zeros_like(x)))
        return [mean + std * eps for mean, std in zip(means, stds, strict=True)]

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        (mean,), (log_std,) = self._series(t, x, *self.coefficients(x), 0)
        return mean, log_std.exp()

    def step_moments(self, t: Tensor, s: Tensor, x: Tensor) -> Ends:
        coefficients = self.coefficients(x)
        ((mean_t,), (log_t,)), ((mean_s,), (log_s,)) = (self._series(time, x, *coefficients, 0) for time in (t, s))
        return Ends(mean_t, log_t.exp(), mean_s, log_s.exp())

    def moments_dt(self, t: Tensor, x: Tensor) -> Moments:
        (mean, mean_dt), (log_std, log_std_dt) = self._series(t, x, *self.coefficients(x), 1)
        std = log_std.exp()
        return Moments(mean, std, mean_dt, std * log_std_dt)

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        return x + self.delta * eps  # pinned: needs no network

    def prior_kl(self, eps: Tensor, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))  # pinned: q(z_1 | x) is the prior
