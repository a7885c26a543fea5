r"""The fixed Gaussian forward process: :math:`z_t = \alpha(t)\,x + \sigma(t)\,\varepsilon`."""

from collections.abc import Callable

from torch import Tensor

from nfdm_lightning.processes.base import AffineProcess, Moments, Shape, expand_as_event, matched_g2
from nfdm_lightning.processes.schedules import Schedule, VariancePreserving


class Gaussian(AffineProcess):
    r"""The conventional forward process, :math:`q(z_t \mid x) = \mathcal N(\alpha(t)\, x, \sigma^2(t)\, I)`.

    Args:
        shape: event shape of x.
        schedule: the path (alpha, sigma): VariancePreserving (VDM), LearnedMonotone, LinearFlow or Cosine.
    """

    def __init__(self, shape: Shape, schedule: Callable[[], Schedule] = VariancePreserving) -> None:
        super().__init__(shape)
        self.schedule = schedule()

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        return expand_as_event(alpha, x) * x, expand_as_event(sigma, x)

    def moments_dt(self, t: Tensor, x: Tensor) -> Moments:
        alpha, sigma, alpha_dt, sigma_dt = (expand_as_event(value, x) for value in self.schedule.derivatives(t))
        return Moments(alpha * x, sigma, alpha_dt * x, sigma_dt)

    def reference(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(t)

    def reference_g2(self, t: Tensor) -> Tensor:
        return matched_g2(*self.schedule.derivatives(t))
