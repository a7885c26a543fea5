r"""Conditional normalising flows in the noise, pinned to the identity at both ends of time.

A flow is an invertible map :math:`u = G(\varepsilon; t, x)` with :math:`G = \text{id}` at t = 0 and t = 1: every parameter
that its networks put out is multiplied by t(1 - t).
"""

import abc
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform, Transform

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import Conditioned, build_network
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import Shape, bounded, check_bound, expand_as_event, sum_event


class ConditionalFlow(Conditioned, abc.ABC):
    """An invertible map of eps given (t, x), the identity at both ends of time.

    Args:
        shape: event shape of eps and x.
        num_classes: number of classes whose labels its networks see; None for a flow without labels.
    """

    def __init__(self, shape: Shape, num_classes: int | None = None) -> None:
        super().__init__(num_classes)
        self.shape = tuple(shape)

    @abc.abstractmethod
    def forward(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Returns u = G(eps; t, x), (B, *event)."""

    @abc.abstractmethod
    def inverse(self, u: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns eps, (B, *event), and log |det dG/deps| there, (B,)."""


class _Halves(nn.Module):
    """The places along dimension 1 that a layer is given and those that it moves, and how to put both back."""

    given: Tensor
    moved: Tensor
    order: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        given, moved = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        for name, places in {"given": given, "moved": moved, "order": torch.cat([given, moved]).argsort()}.items():
            self.register_buffer(name, places, persistent=False)

    def join(self, given: Tensor, moved: Tensor) -> Tensor:
        """Puts the two parts back in their places."""
        return torch.cat([given, moved], 1)[:, self.order]


class Coupling(ConditionalFlow):
    r"""Layers that each move one half of the dimensions, element by element, given the other half, x and t.

    .. math:: u_b = T_\theta(\varepsilon_b), \qquad \theta = n\big((x, \varepsilon_a), t\big)

    A subclass writes :meth:`elementwise`. Layers take turns with the halves. Images are squeezed, (C, H, W) to
    (4C, H/2, W/2), and halved in two ways: by place within the 2x2 blocks (a checkerboard), and by rows. A vector of one
    dimension is moved given x and t alone.

    Args:
        shape: event shape, (C, H, W) with even H and W, or (D,).
        network: builds the networks of the layers from (input shape, output shape); each is evaluated as n((x, eps_a), t).
        layers: number of layers.
        parameters: number of parameters of T for each dimension.
        num_classes: number of classes whose labels the networks see; filled in where the data have labels.

    Raises:
        ConfigError: an image of odd height or width.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module],
        layers: int,
        parameters: int,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, num_classes)
        if len(shape) == 3 and (shape[1] % 2 or shape[2] % 2):
            raise ConfigError(f"{type(self).__name__} halves images, but these are {shape[1]}x{shape[2]}: use even sizes")
        if layers < 1:
            raise ConfigError(f"layers={layers} must be at least 1")
        self.squeezed = (4 * shape[0], shape[1] // 2, shape[2] // 2) if len(shape) == 3 else tuple(shape)
        size, rest = self.squeezed[0], self.squeezed[1:]
        halves = [_Halves(self._mask(layer)) for layer in range(layers)]
        self.halves = nn.ModuleList(halves)
        self.networks = nn.ModuleList(
            build_network(network, (size + len(half.given), *rest), (parameters * len(half.moved), *rest), num_classes)
            for half in halves
        )

    @abc.abstractmethod
    def elementwise(self, raw: Tensor, time: Tensor) -> Transform:
        """Returns T from a network's output, (B, parameters * moved, ...), and t(1 - t), broadcastable to it."""

    def _mask(self, layer: int) -> Tensor:
        size = self.squeezed[0]
        if size == 1:
            return torch.zeros(1, dtype=torch.bool, device="cpu")
        place = torch.arange(size, device="cpu")  # its values are needed, whatever the default device
        if len(self.squeezed) == 3:  # channels are (c, row, column): the two diagonals, or the two rows, of a block
            row, column = place // 2 % 2, place % 2
            place = row + column if layer % 4 < 2 else row
        return (place + layer) % 2 == 0

    def _squeeze(self, image: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(image, 2) if len(self.squeezed) == 3 else image

    def _unsqueeze(self, image: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(image, 2) if len(self.squeezed) == 3 else image

    def _layers(self) -> list[tuple[nn.Module, _Halves]]:
        return list(zip(self.networks, cast(Iterable[_Halves], self.halves), strict=True))

    def forward(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        u, x = self._squeeze(eps), self._squeeze(x)
        time = expand_as_event(t * (1 - t), u)
        for network, halves in self._layers():
            given, moved = u[:, halves.given], u[:, halves.moved]
            transform = self.elementwise(self.call_network(network, torch.cat([x, given], 1), t), time)
            u = halves.join(given, transform(moved))
        return self._unsqueeze(u)

    def inverse(self, u: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        u, x = self._squeeze(u), self._squeeze(x)
        time = expand_as_event(t * (1 - t), u)
        log_det = u.new_zeros(len(u))
        for network, halves in reversed(self._layers()):
            given, moved = u[:, halves.given], u[:, halves.moved]
            transform = self.elementwise(self.call_network(network, torch.cat([x, given], 1), t), time)
            back = transform.inv(moved)
            log_det = log_det + sum_event(transform.log_abs_det_jacobian(back, moved))
            u = halves.join(given, back)
        return self._unsqueeze(u), log_det


class SplineCoupling(Coupling):
    r"""Coupling layers of monotone rational-quadratic splines (arXiv 1906.04032), by zuko; for vectors.

    Outside [-5, 5] the splines are the identity.

    Args:
        shape: event shape, (D,).
        network: builds the networks of the layers from (input shape, output shape).
        layers: number of layers.
        bins: pieces of each spline.
        bound: limit of the parameters of the splines but for their factor t(1 - t), reached smoothly through tanh: steep
            splines lose their inverse in float32.
        num_classes: number of classes whose labels the networks see; filled in where the data have labels.

    Raises:
        ConfigError: the data are images.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        layers: int = 4,
        bins: int = 8,
        bound: float = 4.0,
        num_classes: int | None = None,
    ) -> None:
        if len(shape) != 1:
            raise ConfigError(f"SplineCoupling is for vectors, but the data have shape {shape}: use AffineCoupling")
        if bins < 2:
            raise ConfigError(f"bins={bins} must be at least 2")
        super().__init__(shape, network, layers, 3 * bins - 1, num_classes)
        self.bins, self.bound = bins, check_bound(bound)

    def elementwise(self, raw: Tensor, time: Tensor) -> Transform:
        from zuko.transforms import MonotonicRQSTransform  # slow to import: not at start-up

        parameters = (time * bounded(raw, self.bound)).unflatten(1, (-1, 3 * self.bins - 1))
        return MonotonicRQSTransform(*parameters.split([self.bins, self.bins, self.bins - 1], dim=-1))


class AffineCoupling(Coupling):
    r"""Affine coupling layers with bounded scales (Real NVP, arXiv 1605.08803); for images and vectors.

    .. math:: u_b = \varepsilon_b \exp\big(t(1-t)\, c \tanh(r / c)\big) + t(1-t)\, h,
        \qquad (r, h) = n\big((x, \varepsilon_a), t\big)

    Args:
        shape: event shape, (C, H, W) with even H and W, or (D,).
        network: builds the networks of the layers from (input shape, output shape).
        layers: number of layers.
        bound: c, the limit of a layer's log scale but for its factor t(1 - t).
        num_classes: number of classes whose labels the networks see; filled in where the data have labels.

    Raises:
        ConfigError: an image of odd height or width.
    """

    def __init__(
        self,
        shape: Shape,
        network: Callable[[Shape, Shape], nn.Module] = auto,
        layers: int = 4,
        bound: float = 4.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(shape, network, layers, 2, num_classes)
        self.bound = check_bound(bound)

    def elementwise(self, raw: Tensor, time: Tensor) -> Transform:
        log_scale, shift = raw.chunk(2, dim=1)
        return AffineTransform(time * shift, (time * bounded(log_scale, self.bound)).exp())


def auto_flow(shape: Shape, num_classes: int | None = None) -> ConditionalFlow:
    """Builds the default flow of a shape: AffineCoupling for images, SplineCoupling for vectors."""
    kind = AffineCoupling if len(shape) == 3 else SplineCoupling
    return kind(shape, num_classes=num_classes)
