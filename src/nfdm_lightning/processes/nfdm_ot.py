"""NFDM-OT (arXiv 2404.12940, section 5.2): NFDM whose generative trajectories are straightened while it learns."""

from collections.abc import Callable

from torch import Tensor, nn

from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import Shape
from nfdm_lightning.processes.nfdm import NFDM
from nfdm_lightning.processes.penalties import Curvature


class NFDMOT(NFDM):
    r"""NFDM that asks for the curvature penalty, :math:`\lambda\, \mathbb E |\tfrac{d}{dt} f(z_t, t, \hat x)|^2`.

    The noise that its learned part starts from is straight too, :math:`\log \text{std} = \log(t + (1 - t)\,\delta) +
    t(1 - t)\,l`: NFDM's geometric one bends by :math:`\log^2 \delta` whatever x is, more than the bounded l can mend near
    the data. The penalty acts in training alone. Sample it with the ODE in few steps. For another process restricted in this
    way, add :class:`~nfdm_lightning.processes.penalties.Curvature` to the model's penalties.

    Args:
        shape: event shape of x.
        network: builds (m, l) from (input shape, output shape), the two stacked along the first event dimension.
        delta: standard deviation at t = 0, in data units.
        bound: limit of |l|, reached smoothly through tanh.
        weight: lambda.
        warmup_steps: training steps over which the weight rises linearly from 0.
        fraction: share of each batch on which the penalty is evaluated: it costs more than the rest of a step.
        num_classes: number of classes whose labels the network sees; filled in where the data have labels.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        delta: float = 1e-2,
        bound: float = 8.0,
        weight: float = 1e-2,
        warmup_steps: int = 0,
        fraction: float = 1.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, network, delta, bound, num_classes)
        self.penalties = (Curvature(weight, warmup_steps, fraction),)

    def fixed_std(self, t: Tensor) -> Tensor:
        return t + (1 - t) * self.delta
