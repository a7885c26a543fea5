r"""The predictor :math:`\hat x(z, t)`: a network behind a preconditioning that makes it right for free at t -> 0.

With (alpha, sigma) the process's reference path, :math:`z \approx \alpha x + \sigma \varepsilon`, a predictor turns the
network's output n into data. The network sees the latents scaled to unit variance,
:math:`z / \sqrt{\alpha^2 d^2 + \sigma^2}` with d the standard deviation of the data.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import build_network, call_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import Shape, expand_as_event


@dataclass(frozen=True)
class DataSpec:
    """What a predictor must know of the data.

    Attributes:
        shape: event shape, (D,) or (C, H, W).
        levels: number of equally spaced levels in [-1, 1]; None for continuous data.
        std: standard deviation per dimension.
        source: whether there is a source sample of the same shape that the predictor sees too, as in a bridge.
        num_classes: number of classes whose labels the predictor sees; None for data without labels.
    """

    shape: Shape
    levels: int | None = None
    std: float = 1.0
    source: bool = False
    num_classes: int | None = None


class Predictor(nn.Module, abc.ABC):
    """Base of the predictors; a subclass writes :meth:`combine`.

    Args:
        data: shape, levels and scale of the data.
        network: builds n from (input shape, output shape); it is evaluated as n(scaled z, t), with the source of a bridge
            stacked to z along the first event dimension, or as n(scaled z, t, label) where there are classes.
    """

    def __init__(self, data: DataSpec, network: Callable[[Shape, Shape], nn.Module] = auto) -> None:
        super().__init__()
        self.data_std, self.num_classes = data.std, data.num_classes
        stacked = (2 * data.shape[0], *data.shape[1:]) if data.source else data.shape
        self.network = build_network(network, stacked, self.output_shape(data), data.num_classes)

    def output_shape(self, data: DataSpec) -> Shape:
        """Returns the event shape that the network must put out; that of the data unless overridden."""
        return data.shape

    @abc.abstractmethod
    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns x_hat, (B, *event), from latents, network output and the reference path (alpha, sigma broadcast)."""

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        source: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Returns x_hat(z, t), (B, *event).

        Args:
            z: latents, less what the source contributes to their mean, (B, *event).
            t: times, (B,).
            alpha: of the reference path at t, (B,).
            sigma: of the reference path at t, (B,).
            source: the source samples of a bridge, (B, *event).
            label: labels, (B,) or (1,), where there are classes; None is no label.
        """
        alpha, sigma = expand_as_event(alpha, z), expand_as_event(sigma, z)
        inputs = (alpha**2 * self.data_std**2 + sigma**2).rsqrt() * z
        if source is not None:
            inputs = torch.cat([inputs, source / self.data_std], 1)
        return self.combine(z, call_network(self.network, inputs, t, label, self.num_classes), alpha, sigma)


class XPrediction(Predictor):
    r"""Predicts x with the skip and scale of EDM (arXiv 2206.00364, table 1), for a general (alpha, sigma).

    .. math:: \hat x = \frac{\alpha d^2}{\alpha^2 d^2 + \sigma^2}\, z + \frac{\sigma d}{\sqrt{\alpha^2 d^2 + \sigma^2}}\, n

    With n = 0 it is the posterior mean for Gaussian data of standard deviation d.
    """

    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = alpha**2 * self.data_std**2 + sigma**2
        return alpha * self.data_std**2 / variance * z + sigma * self.data_std * variance.rsqrt() * output


class EpsPrediction(Predictor):
    r"""Predicts eps: :math:`\hat x = (z - \sigma n) / \max(\alpha, 0.02)`.

    The floor matters only to paths that end in alpha(1) = 0, where eps alone does not determine x.
    """

    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (z - sigma * output) / alpha.clamp_min(0.02)


class VPrediction(Predictor):
    r"""Predicts v (arXiv 2202.00512, section 4): :math:`\hat x = (\alpha z - \sigma v) / (\alpha^2 + \sigma^2)`,
    :math:`v = \alpha \varepsilon - \sigma x`.
    """

    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * z - sigma * output) / (alpha**2 + sigma**2)


class LevelPrediction(Predictor):
    r"""Predicts a distribution over the grey levels :math:`l_k` of each pixel; x_hat is its mean (ours).

    .. math:: \hat x = \sum_k p_k l_k, \qquad p = \text{softmax}_k\Big(n_k - \frac{(z - \alpha l_k)^2}{2 \sigma^2}\Big)

    The second term is the evidence of the pixel itself, so the network only supplies what its surroundings tell, and x_hat
    is exact at t -> 0. For discrete data of few levels: the network has one output per level, and memory grows with them.

    Raises:
        ConfigError: the data are continuous.
    """

    grid: Tensor

    def __init__(self, data: DataSpec, network: Callable[[Shape, Shape], nn.Module] = auto) -> None:
        super().__init__(data, network)
        assert data.levels is not None  # output_shape has seen to it
        self.register_buffer("grid", torch.linspace(-1, 1, data.levels), persistent=False)

    def output_shape(self, data: DataSpec) -> Shape:
        if data.levels is None:
            raise ConfigError("LevelPrediction is for discrete data, but these are continuous: use XPrediction")
        return (data.levels * data.shape[0], *data.shape[1:])

    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        logits = output.unflatten(1, (len(self.grid), -1))
        grid = self.grid.view(-1, *[1] * (z.ndim - 1))
        evidence = -0.5 * ((z[:, None] - alpha[:, None] * grid) / sigma[:, None]) ** 2
        return (torch.softmax(logits + evidence, dim=1) * grid).sum(1)
