r"""Neural Flow Diffusion Models (arXiv 2404.12940): mean and noise of the forward process are both learned."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nfdm_lightning.labels import build_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import AffineProcess, Shape, bounded, check_bound, check_delta, expand_as_event


class NFDM(AffineProcess):
    r"""Neural Flow Diffusion Model with a Gaussian conditional, pinned at both ends.

    .. math::
        \text{mean}(t, x) &= (1 - t)\,x + t(1 - t)\,m(x, t) \\
        \log \text{std}(t, x) &= (1 - t) \log\delta + t(1 - t)\,l(x, t), \qquad |l| < \text{bound}

    so that q(z_0 | x) = N(x, delta^2 I) and q(z_1 | x) = N(0, I) whatever the network: the prior term is exactly 0 and the
    reconstruction term does not depend on it. (NFDM, arXiv 2404.12940, section 4; the pinning is in log space, and the
    smooth bound on l is ours.)

    Args:
        shape: event shape of x.
        network: builds (m, l) from (input shape, output shape), the two stacked along the first event dimension.
        delta: standard deviation at t = 0, in data units.
        bound: limit of |l|, reached smoothly through tanh. Changes log std by bound / 4 at most.
        num_classes: number of classes whose labels the network sees; filled in where the data have labels.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        delta: float = 1e-2,
        bound: float = 8.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        self.network = build_network(network, self.shape, (2 * self.shape[0], *self.shape[1:]), num_classes)
        self.delta, self.bound = check_delta(delta), check_bound(bound)

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.call_network(self.network, x, t).chunk(2, dim=1)
        time = expand_as_event(t, x)
        change = time * (1 - time) * bounded(raw, self.bound)
        return (1 - time) * (x + time * shift), expand_as_event(self.fixed_std(t), x) * change.exp()

    def fixed_std(self, t: Tensor) -> Tensor:
        """Returns the part of std that is not learned, (B,): from delta to 1."""
        return torch.exp((1 - t) * math.log(self.delta))

    def reference(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self.fixed_std(t)

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        return x + self.delta * eps  # pinned: needs no network

    def prior_kl(self, eps: Tensor, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))  # pinned: q(z_1 | x) is the prior
