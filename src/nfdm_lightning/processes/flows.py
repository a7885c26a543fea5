r"""Conditional normalising flows in the noise, pinned to the identity at both ends of time.

A flow is an invertible map :math:`u = G(\varepsilon; t, x)` with :math:`G = \text{id}` at t = 0 and t = 1: every parameter
that its networks put out is multiplied by t(1 - t).
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks import auto
from nfdm_lightning.processes.base import Shape, expand_as_event, sum_event


class ConditionalFlow(nn.Module, abc.ABC):
    """An invertible map of eps given (t, x), the identity at both ends of time.

    Args:
        shape: event shape of eps and x.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)

    @abc.abstractmethod
    def forward(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Returns u = G(eps; t, x), (B, *event)."""

    @abc.abstractmethod
    def inverse(self, u: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns eps, (B, *event), and log |det dG/deps| there, (B,)."""


class SplineCoupling(ConditionalFlow):
    r"""Coupling layers of monotone rational-quadratic splines (arXiv 1906.04032), by zuko; for vectors.

    Every layer transforms half of the dimensions, in turn the odd and the even ones, given the other half, x and t. Outside
    [-5, 5] the splines are the identity. A vector of one dimension is transformed given x and t alone.

    Args:
        shape: event shape, (D,).
        network: builds the networks of the layers from (input shape, output shape); each is evaluated as n((x, eps_a), t).
        layers: number of layers.
        bins: pieces of each spline.
        bound: limit of the parameters of the splines but for their factor t(1 - t), reached smoothly through tanh: steep
            splines lose their inverse in float32.

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
    ) -> None:
        super().__init__(shape)
        if len(shape) != 1:
            raise ConfigError(f"SplineCoupling is for vectors, but the data have shape {shape}: use AffineCoupling")
        if layers < 1 or bins < 2:
            raise ConfigError(f"layers={layers} must be at least 1, bins={bins} at least 2")
        if not bound > 0:
            raise ConfigError(f"bound={bound} must be positive: it limits the parameters of the splines")
        self.bins, self.bound = bins, bound
        self.masks = [self._mask(layer) for layer in range(layers)]
        size = shape[0]
        self.networks = nn.ModuleList(
            network((size + int(mask.sum()),), (int((~mask).sum()) * (3 * bins - 1),)) for mask in self.masks
        )

    def _mask(self, layer: int) -> Tensor:
        size = self.shape[0]
        return (torch.arange(size) + layer) % 2 == 0 if size > 1 else torch.zeros(1, dtype=torch.bool)

    def _layers(self, t: Tensor, x: Tensor) -> list[Any]:
        from zuko.transforms import CouplingTransform, DependentTransform, MonotonicRQSTransform

        time = t * (1 - t)

        def layer(network: nn.Module, mask: Tensor) -> CouplingTransform:
            def spline(given: Tensor) -> DependentTransform:
                raw = time[:, None] * self.bound * torch.tanh(network(torch.cat([x, given], 1), t) / self.bound)
                parts = raw.unflatten(1, (-1, 3 * self.bins - 1)).split([self.bins, self.bins, self.bins - 1], dim=-1)
                return DependentTransform(MonotonicRQSTransform(*parts), 1)

            return CouplingTransform(spline, mask.to(x.device))

        return [layer(network, mask) for network, mask in zip(self.networks, self.masks, strict=True)]

    def forward(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        for layer in self._layers(t, x):
            eps = layer(eps)
        return eps

    def inverse(self, u: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = u.new_zeros(len(u))
        for layer in reversed(self._layers(t, x)):
            u = layer.inv(u)
            log_det = log_det + layer.call_and_ladj(u)[1]
        return u, log_det


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


class AffineCoupling(ConditionalFlow):
    r"""Affine coupling layers with bounded scales on squeezed images (Real NVP, arXiv 1605.08803); for images and vectors.

    .. math:: u_b = \varepsilon_b \exp\big(t(1-t)\, c \tanh(r / c)\big) + t(1-t)\, h,
        \qquad (r, h) = n\big((x, \varepsilon_a), t\big)

    Images are squeezed, (C, H, W) to (4C, H/2, W/2). Layers take turns with the halves of the channels, split in two ways:
    by place within the 2x2 blocks (a checkerboard), and by rows.

    Args:
        shape: event shape, (C, H, W) with even H and W, or (D,).
        network: builds the networks of the layers from (input shape, output shape).
        layers: number of layers.
        scale_bound: c, the limit of a layer's log scale but for its factor t(1 - t).

    Raises:
        ConfigError: an image of odd height or width.
    """

    def __init__(
        self, shape: Shape, network: Callable[[Shape, Shape], nn.Module] = auto, layers: int = 4, scale_bound: float = 4.0
    ) -> None:
        super().__init__(shape)
        if len(shape) == 3 and (shape[1] % 2 or shape[2] % 2):
            raise ConfigError(f"AffineCoupling halves images, but these are {shape[1]}x{shape[2]}: use even sizes")
        if layers < 1 or not scale_bound > 0:
            raise ConfigError(f"layers={layers} must be at least 1 and scale_bound={scale_bound} positive")
        self.scale_bound = scale_bound
        self.squeezed = (4 * shape[0], shape[1] // 2, shape[2] // 2) if len(shape) == 3 else tuple(shape)
        size, rest = self.squeezed[0], self.squeezed[1:]
        halves = [_Halves(self._mask(layer)) for layer in range(layers)]
        self.halves = nn.ModuleList(halves)
        self.networks = nn.ModuleList(
            network((size + len(half.given), *rest), (2 * len(half.moved), *rest)) for half in halves
        )

    def _layers(self) -> list[tuple[nn.Module, _Halves]]:
        return list(zip(self.networks, cast(Iterable[_Halves], self.halves), strict=True))

    def _mask(self, layer: int) -> Tensor:
        size = self.squeezed[0]
        if size == 1:
            return torch.zeros(1, dtype=torch.bool)
        place = torch.arange(size)
        if len(self.squeezed) == 3:  # channels are (c, row, column): the two diagonals, or the two rows, of a block
            row, column = place // 2 % 2, place % 2
            place = row + column if layer % 4 < 2 else row
        return (place + layer) % 2 == 0

    def _squeeze(self, image: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(image, 2) if len(self.squeezed) == 3 else image

    def _unsqueeze(self, image: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(image, 2) if len(self.squeezed) == 3 else image

    def _scale_and_shift(self, network: nn.Module, given: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = network(torch.cat([x, given], 1), t).chunk(2, dim=1)
        time = expand_as_event(t * (1 - t), raw)
        return time * self.scale_bound * torch.tanh(raw / self.scale_bound), time * shift

    def forward(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        u, x = self._squeeze(eps), self._squeeze(x)
        for network, halves in self._layers():
            given, moved = u[:, halves.given], u[:, halves.moved]
            log_scale, shift = self._scale_and_shift(network, given, t, x)
            u = torch.cat([given, moved * log_scale.exp() + shift], 1)[:, halves.order]
        return self._unsqueeze(u)

    def inverse(self, u: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        u, x = self._squeeze(u), self._squeeze(x)
        log_det = u.new_zeros(len(u))
        for network, halves in reversed(self._layers()):
            given, moved = u[:, halves.given], u[:, halves.moved]
            log_scale, shift = self._scale_and_shift(network, given, t, x)
            u = torch.cat([given, (moved - shift) * (-log_scale).exp()], 1)[:, halves.order]
            log_det = log_det + sum_event(log_scale)
        return self._unsqueeze(u), log_det


def auto_flow(shape: Shape) -> ConditionalFlow:
    """Builds the default flow of a shape: AffineCoupling for images, SplineCoupling for vectors."""
    return AffineCoupling(shape) if len(shape) == 3 else SplineCoupling(shape)
