r"""Neural Diffusion Models (arXiv 2310.08337): the data is transformed by a learned, time-dependent map first."""

from collections.abc import Callable

from torch import Tensor, nn

from nfdm_lightning.labels import build_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import AffineProcess, Shape, expand_as_event, matched_g2
from nfdm_lightning.processes.schedules import Schedule, VariancePreserving


class NDM(AffineProcess):
    r"""Neural Diffusion Model: :math:`z_t = \alpha(t)\,F(x, t) + \sigma(t)\,\varepsilon`, :math:`F(x, t) = x + t\,n(x, t)`.

    F(x, 0) = x whatever the network n; with the network's output at zero it is the Gaussian process of its schedule.
    Trains in continuous time, or in the paper's first formulation of T steps (``discrete_steps`` of the model).
    (NDM, arXiv 2310.08337, section 3.)

    Args:
        shape: event shape of x.
        network: builds n from (input shape, output shape); it is evaluated as n(x, t).
        schedule: the path (alpha, sigma).
        num_classes: number of classes whose labels the network sees; filled in where the data have labels.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        schedule: Callable[[], Schedule] = VariancePreserving,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        self.network = build_network(network, self.shape, self.shape, num_classes)
        self.schedule = schedule()

    def data_map(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns F(x, t) = x + t n(x, t), (B, *event)."""
        return x + expand_as_event(t, x) * self.call_network(self.network, x, t)

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
