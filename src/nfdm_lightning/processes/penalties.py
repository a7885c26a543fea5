r"""Penalties: costs on the paths of a model, added to the objective in training. Any process accepts any of them.

.. math:: \text{loss} = \text{bound} + \sum_k w_k(\text{step})\; \mathbb E_{t,\, z_t}\, c_k(z_t, t)

The bound itself, and what evaluation reports, stays what it is. (NFDM, arXiv 2404.12940, section 5: restrictions on the
reverse process.)
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import forward_mode, sum_event

if TYPE_CHECKING:  # a penalty is handed the model; it does not need to know its class
    from nfdm_lightning.reverse import ReverseProcess


class Velocity(Protocol):
    """Anything with a velocity."""

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Returns dz/dt, (B, *event)."""
        ...


class Penalty(abc.ABC):
    """A cost on states of the model's paths; a subclass writes :meth:`cost`.

    Args:
        weight: factor of the cost, in nats per unit of cost.
        warmup_steps: training steps over which the weight rises linearly from 0; 0 is at once.
        fraction: share of each batch on which the cost is evaluated: less is cheaper and noisier.
    """

    takes_derivatives: ClassVar[bool] = False
    """Whether the cost differentiates the whole model in t, which some layers do not bear."""

    def __init__(self, weight: float = 1.0, warmup_steps: int = 0, fraction: float = 1.0) -> None:
        if not weight >= 0:
            raise ConfigError(f"{type(self).__name__}: weight={weight} must not be negative")
        if warmup_steps < 0:
            raise ConfigError(f"{type(self).__name__}: warmup_steps={warmup_steps} must not be negative")
        if not 0 < fraction <= 1:
            raise ConfigError(f"{type(self).__name__}: fraction={fraction} must lie in (0, 1]")
        self.weight, self.warmup_steps, self.fraction = weight, warmup_steps, fraction

    @property
    def name(self) -> str:
        """The name under which it is logged."""
        return type(self).__name__.lower()

    def weight_at(self, step: int) -> float:
        """Returns the weight at a training step."""
        return self.weight * min(1.0, step / self.warmup_steps) if self.warmup_steps else self.weight

    @abc.abstractmethod
    def cost(self, reverse: ReverseProcess, z: Tensor, t: Tensor) -> Tensor:
        """Returns the cost of each state, (B,).

        Args:
            reverse: the generative model, given the source of each state if it is a bridge.
            z: states of the forward process, with their graph, (B, *event).
            t: their times, (B,).
        """


class Curvature(Penalty):
    r"""Straightens the model's ODE: :math:`|\tfrac{d}{dt} f(z_t, t, \hat x(z_t, t))|^2` along its own trajectory (NFDM-OT).

    The total derivative of the model's velocity, which is that of :math:`(z, t) \mapsto f(z, t, \hat x(z, t))` in direction
    (f, 1): zero everywhere means straight trajectories at constant speed, which one Euler step solves. The second time
    derivative of F alone is a different quantity. (NFDM, arXiv 2404.12940, section 5.2.)

    Args:
        weight: lambda.
        warmup_steps: training steps over which the weight rises linearly from 0.
        fraction: share of each batch on which it is evaluated.
    """

    takes_derivatives: ClassVar[bool] = True

    def __init__(self, weight: float = 1e-2, warmup_steps: int = 0, fraction: float = 1.0) -> None:
        super().__init__(weight, warmup_steps, fraction)

    def cost(self, reverse: ReverseProcess, z: Tensor, t: Tensor) -> Tensor:
        return sum_event(acceleration(reverse, z, t) ** 2)


def acceleration(model: Velocity, z: Tensor, t: Tensor) -> Tensor:
    r"""Returns :math:`\partial_t f + (\partial_z f) f`, (B, *event), for the velocity f(z, t) of a model."""
    direction = model.velocity(z, t)
    wanted = torch.is_grad_enabled()
    with torch.enable_grad(), forward_mode():  # without a graph torch has no second forward-mode derivative of SiLU
        derivative = torch.func.jvp(model.velocity, (z, t.contiguous()), (direction, torch.ones_like(t)))[1]
    return derivative if wanted else derivative.detach()


class Obstacle(Penalty):
    r"""Keeps the paths out of a ball: :math:`U(z)\, |f(z, t)|`, :math:`U = \text{softplus}\big(k\,(r - |z - c|)\big) / k`.

    U is about the depth inside the ball. Times the model's speed, the cost is the integral of U along the path whatever the
    speed is: U alone would be escaped by jumping across at once, with no state inside and every path through it. The states
    are those of the forward process; the model, trained on the same objective, follows them around. (NFDM, arXiv
    2404.12940, section 5.3: bridges around obstacles; the factor of speed is ours.)

    Args:
        centre: c, as many numbers as z has dimensions.
        radius: r.
        sharpness: k; the cost reaches about 1 / k beyond the ball.
        weight: factor of the cost, in nats per unit of depth and length.
        warmup_steps: training steps over which the weight rises linearly from 0.
        fraction: share of each batch on which it is evaluated.
    """

    def __init__(
        self,
        centre: Sequence[float] = (0.0, 0.0),
        radius: float = 1.0,
        sharpness: float = 10.0,
        weight: float = 30.0,
        warmup_steps: int = 0,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(weight, warmup_steps, fraction)
        if not (radius > 0 and sharpness > 0):
            raise ConfigError(f"Obstacle: radius={radius} and sharpness={sharpness} must be positive")
        self.centre, self.radius, self.sharpness = tuple(centre), radius, sharpness

    def depth(self, z: Tensor) -> Tensor:
        """Returns how deep each state is inside the ball, negative outside; (B, D) to (B,)."""
        if z.shape[1:] != (len(self.centre),):
            raise ConfigError(
                f"Obstacle: centre={self.centre} has {len(self.centre)} numbers, but a state has shape {tuple(z.shape[1:])}"
            )
        return self.radius - (z - z.new_tensor(self.centre)).norm(dim=-1)

    def cost(self, reverse: ReverseProcess, z: Tensor, t: Tensor) -> Tensor:
        depth = functional.softplus(self.sharpness * self.depth(z)) / self.sharpness
        return depth * reverse.velocity(z, t).norm(dim=1)
