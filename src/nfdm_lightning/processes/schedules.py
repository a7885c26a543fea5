r"""Noise schedules: the scalar path :math:`\alpha(t), \sigma(t)` of a Gaussian forward process.

The log-SNR is :math:`-\gamma(t)` with :math:`\gamma = \log(\sigma^2 / \alpha^2)` (VDM, arXiv 2107.00630, section 3.1).
"""

import abc
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import check_delta, time_derivative


class ScheduleDerivatives(NamedTuple):
    """alpha and sigma with their time derivatives, each (B,)."""

    alpha: Tensor
    sigma: Tensor
    alpha_dt: Tensor
    sigma_dt: Tensor


class Schedule(nn.Module, abc.ABC):
    """A path (alpha(t), sigma(t)), alpha falling and sigma rising over t in [0, 1]."""

    @abc.abstractmethod
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (alpha, sigma), each of the shape of t."""

    def derivatives(self, t: Tensor) -> ScheduleDerivatives:
        """Returns alpha and sigma with their time derivatives; forward-mode autodiff unless a closed form overrides it."""
        (alpha, sigma), (alpha_dt, sigma_dt) = time_derivative(self.forward, t)
        return ScheduleDerivatives(alpha, sigma, alpha_dt, sigma_dt)


class VariancePreserving(Schedule):
    r"""Variance preserving with linear log-SNR.

    .. math:: \alpha^2 = \text{sigmoid}(-\gamma), \qquad \sigma^2 = \text{sigmoid}(\gamma),
        \qquad \gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0)\,t

    Args:
        gamma_min: gamma(0); VDM's -13.3 by default (sigma = 0.0013). exp(gamma_min / 2) is the noise left at t = 0.
        gamma_max: gamma(1); VDM's 5.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise ConfigError(f"gamma_min={gamma_min} must be below gamma_max={gamma_max}: noise grows with t")
        self.gamma_min, self.gamma_max = gamma_min, gamma_max

    def gamma(self, t: Tensor) -> Tensor:
        """Returns minus the log-SNR at t, of the shape of t."""
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        gamma = self.gamma(t)
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()

    def derivatives(self, t: Tensor) -> ScheduleDerivatives:
        r"""Closed form: :math:`\alpha' = -\tfrac12 \alpha \sigma^2 \gamma',\ \sigma' = \tfrac12 \sigma \alpha^2 \gamma'`."""
        alpha, sigma = self(t)
        gamma_dt = self.gamma_max - self.gamma_min
        return ScheduleDerivatives(alpha, sigma, -0.5 * alpha * sigma**2 * gamma_dt, 0.5 * sigma * alpha**2 * gamma_dt)


class LearnedMonotone(Schedule):
    r"""Variance preserving with a learned monotone gamma (VDM, arXiv 2107.00630, appendix H).

    .. math:: \gamma(t) = \gamma_0 + (\gamma_1 - \gamma_0)\,\frac{n(t) - n(0)}{n(1) - n(0)},
        \qquad n(t) = w_0 t + \textstyle\sum_k w_k\, \text{sigmoid}(a_k t + b_k), \quad w, a > 0

    Both ends are learned. It starts as the linear schedule, up to the small initial weights of the bumps.

    Args:
        gamma_min: gamma(0) at the start of training.
        gamma_max: gamma(1) at the start of training.
        width: number of bumps.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, width: int = 32) -> None:
        super().__init__()
        VariancePreserving(gamma_min, gamma_max)  # the same check of the two ends
        # one number each, but no scalars: those cannot be shared out over processes
        self.gamma_0 = nn.Parameter(torch.tensor([gamma_min]))
        self.log_gap = nn.Parameter(torch.tensor([gamma_max - gamma_min]).log())
        self.linear = nn.Parameter(torch.tensor([math.log(math.e - 1)]))  # softplus of it is 1
        self.bump = nn.Parameter(torch.full((width,), -6.0))
        self.slope = nn.Parameter(torch.full((width,), 10.0))
        self.offset = nn.Parameter(-10.0 * torch.linspace(0, 1, width))

    def _raw(self, t: Tensor) -> Tensor:
        bumps = torch.sigmoid(functional.softplus(self.slope) * t[..., None] + self.offset)
        return functional.softplus(self.linear[0]) * t + (functional.softplus(self.bump) * bumps).sum(-1)

    def gamma(self, t: Tensor) -> Tensor:
        """Returns minus the log-SNR at t, of the shape of t; strictly increasing in t."""
        low, high = self._raw(torch.zeros_like(t)), self._raw(torch.ones_like(t))
        return self.gamma_0[0] + self.log_gap[0].exp() * (self._raw(t) - low) / (high - low)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        gamma = self.gamma(t)
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


class LinearFlow(Schedule):
    r"""The conditional optimal-transport path of flow matching: :math:`\alpha = 1 - t,\ \sigma = t + (1 - t)\,\delta`.

    Args:
        delta: standard deviation left at t = 0, in data units.
    """

    def __init__(self, delta: float = 1e-2) -> None:
        super().__init__()
        self.delta = check_delta(delta)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t + (1 - t) * self.delta

    def derivatives(self, t: Tensor) -> ScheduleDerivatives:
        alpha, sigma = self(t)
        return ScheduleDerivatives(alpha, sigma, -torch.ones_like(t), torch.full_like(t, 1 - self.delta))


class Cosine(Schedule):
    r"""The cosine path, cut off at the data end: :math:`\alpha = \cos\phi,\ \sigma = \sin\phi`,
    :math:`\phi = \phi_0 + (\pi/2 - \phi_0)\,t`, :math:`\sin\phi_0 = \delta`.

    Args:
        delta: standard deviation left at t = 0.
    """

    def __init__(self, delta: float = 1e-2) -> None:
        super().__init__()
        self.start = math.asin(check_delta(delta))
        self.rate = math.pi / 2 - self.start

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # cos as a sine of the remaining angle, so that alpha(1) is 0 and not the rounding error of pi / 2
        return torch.sin(self.rate * (1 - t)), torch.sin(self.start + self.rate * t)

    def derivatives(self, t: Tensor) -> ScheduleDerivatives:
        alpha, sigma = self(t)
        return ScheduleDerivatives(alpha, sigma, -self.rate * sigma, self.rate * alpha)
