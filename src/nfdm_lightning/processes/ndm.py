r"""Neural Diffusion Models (arXiv 2310.08337): the data is transformed by a learned, time-dependent map first."""

from collections.abc import Callable

from torch import Tensor, nn

from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import AffineProcess, Shape, expand_as_event, matched_g2, sum_event
from nfdm_lightning.processes.schedules import Schedule, VariancePreserving


class NDM(AffineProcess):
    r"""Neural Diffusion Model: :math:`z_t = \alpha(t)\,F(x, t) + \sigma(t)\,\varepsilon`, :math:`F(x, t) = x + t\,n(x, t)`.

    F(x, 0) = x whatever the network n; with the network's output at zero it is the Gaussian process of its schedule.
    (NDM, arXiv 2310.08337, section 3.)

    Args:
        shape: event shape of x.
        network: builds n from (input shape, output shape); it is evaluated as n(x, t).
        schedule: the path (alpha, sigma).
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        schedule: Callable[[], Schedule] = VariancePreserving,
    ) -> None:
        super().__init__(shape)
        self.network = network(self.shape, self.shape)
        self.schedule = schedule()

    def data_map(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns F(x, t) = x + t n(x, t), (B, *event)."""
        return x + expand_as_event(t, x) * self.network(x, t)

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        return expand_as_event(alpha, x) * self.data_map(x, t), expand_as_event(sigma, x)

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = self.schedule(x.new_zeros(len(x)))  # F(x, 0) = x needs no network
        return expand_as_event(alpha, x) * x + expand_as_event(sigma, x) * eps

    def reference(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(t)

    def reference_g2(self, t: Tensor) -> Tensor:
        return matched_g2(*self.schedule.derivatives(t))

    def posterior(self, z: Tensor, s: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns mean (B, *event) and variance (B,) of the discrete-time posterior :math:`q(z_s \mid z_t, x)`, s < t.

        .. math::
            \alpha_s F(x, s) + \tfrac{\sqrt{\sigma_s^2 - v}}{\sigma_t} (z_t - \alpha_t F(x, t)), \qquad
            v = \tfrac{\sigma_s^2}{\sigma_t^2} \Big(\sigma_t^2 - \tfrac{\alpha_t^2}{\alpha_s^2} \sigma_s^2\Big)

        (NDM, arXiv 2310.08337, section 3, with DDPM's choice of the variance v.)
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.schedule(s), self.schedule(t)
        variance = (sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        carry = expand_as_event((sigma_s**2 - variance).sqrt() / sigma_t, z)
        mean_s, mean_t = (expand_as_event(alpha, z) * self.data_map(x, time) for alpha, time in ((alpha_s, s), (alpha_t, t)))
        return mean_s + carry * (z - mean_t), variance

    def posterior_kl(self, z: Tensor, s: Tensor, t: Tensor, x: Tensor, x_hat: Tensor) -> Tensor:
        r"""Returns :math:`KL(q(z_s \mid z_t, x) \,\|\, q(z_s \mid z_t, \hat x))` in nats, (B,).

        Summed over T steps it is the diffusion term in discrete time; T times one step tends to the continuous loss with
        :math:`g^2 = \sigma^2 \gamma'`.
        """
        (mean, variance), (mean_hat, _) = self.posterior(z, s, t, x), self.posterior(z, s, t, x_hat)
        return sum_event((mean - mean_hat) ** 2) / (2 * variance)
