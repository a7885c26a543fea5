r"""NFDM with a conditional that is not Gaussian: the noise passes through a normalising flow first."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nfdm_lightning.labels import build_part
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import ForwardProcess, Shape, sum_event
from nfdm_lightning.processes.flows import ConditionalFlow, auto_flow
from nfdm_lightning.processes.nfdm import NFDM


class FlowNFDM(ForwardProcess):
    r"""Neural Flow Diffusion Model in its full generality: F is a normalising flow in eps given (x, t).

    .. math:: z_t = \text{mean}(t, x) + \text{std}(t, x)\, G(\varepsilon; t, x), \qquad
        G = \text{id at } t = 0 \text{ and } t = 1

    mean and std are NFDM's. With q(z_0 | x) = N(x, delta^2 I) and q(z_1 | x) = N(0, I) it is pinned at both ends as NFDM is,
    while q(z_t | x) between them may have several modes. (NFDM, arXiv 2404.12940, section 3; the flow is our choice.)

    Args:
        shape: event shape of x.
        network: builds NFDM's (m, l) from (input shape, output shape).
        flow: builds G from the shape: SplineCoupling (vectors) or AffineCoupling (images), or a ConditionalFlow of yours.
        delta: standard deviation at t = 0, in data units.
        bound: limit of |l|, reached smoothly through tanh.
        num_classes: number of classes whose labels mean, std and flow see; filled in where the data have labels.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        flow: Callable[[Shape], ConditionalFlow] = auto_flow,
        delta: float = 1e-2,
        bound: float = 8.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        self.affine = NFDM(shape, network, delta, bound, num_classes)
        self.flow = build_part(flow, self.shape, num_classes)
        self.delta = delta

    def transform(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        mean, std = self.affine.moments(t, x)
        return mean + std * self.flow(eps, t, x)

    def inverse(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return self.flow.inverse(self.affine.inverse(z, t, x), t, x)[0]

    def log_prob(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        mean, std = self.affine.moments(t, x)
        eps, log_det = self.flow.inverse((z - mean) / std, t, x)
        log_std = torch.log(std).expand_as(z)
        return sum_event(-0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - log_std) - log_det

    def typical_std(self, t: Tensor, x: Tensor) -> Tensor:
        return self.affine.moments(t, x)[1]

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        return self.affine.start(eps, x)

    def prior_kl(self, eps: Tensor, x: Tensor) -> Tensor:
        return self.affine.prior_kl(eps, x)
