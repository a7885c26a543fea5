r"""The generative model that a process, a predictor and a volatility induce.

.. math:: dz = \big[f(z, t, \hat x) - \tfrac12 g^2(t)\, s(z, t, \hat x)\big] dt + g(t)\, dw, \qquad t: 1 \to 0

with x_hat = x_hat(z, t) (NFDM, arXiv 2404.12940, section 3.2), and the ODE :math:`dz = f(z, t, \hat x)\, dt`. Given a
label y, process and predictor both see it; classifier-free guidance (arXiv 2207.12598) of weight w puts

.. math:: \hat x_w = \hat x(z, t) + w\, \big(\hat x(z, t, y) - \hat x(z, t)\big)

in the place of x_hat, where the process keeps its label.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks import DiT, UNet, VDMUNet
from nfdm_lightning.predictor import Predictor
from nfdm_lightning.processes.base import AffineProcess, Ends, ForwardProcess, PathPoint, expand_as_event
from nfdm_lightning.seeding import Generators, standard_normal
from nfdm_lightning.volatility import Volatility

# grad of jvp is silently wrong in the first group, whose norms have a fused backward; the second is random
_WRONG_UNDER_JVP = (nn.LayerNorm, nn.modules.batchnorm._NormBase)
_RANDOM = (nn.modules.dropout._DropoutNd,)
_CHECKPOINTING = (UNet, VDMUNet, DiT)

_Result = TypeVar("_Result")


def check_time_differentiable(module: nn.Module, owner: str, deterministic: bool = True) -> None:
    """Refuses layers that spoil a network whose time derivative is taken.

    Args:
        module: the network, or what contains it.
        owner: what it is, for the message.
        deterministic: whether to refuse dropout too.

    Raises:
        ConfigError: names the layer, its class and what to use in its place.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _WRONG_UNDER_JVP):
            raise ConfigError(
                f"{owner}: layer '{name}' is a {type(layer).__name__}, whose gradient under a forward-mode time derivative "
                "is silently wrong; use GroupNorm or RMSNorm"
            )
        if isinstance(layer, _CHECKPOINTING) and layer.checkpointing:
            raise ConfigError(
                f"{owner}: '{name}' is a {type(layer).__name__} with checkpointing=true, which torch cannot "
                "differentiate in t: set it to false there; model.checkpoint_process=true saves memory in its place"
            )
        if deterministic and isinstance(layer, _RANDOM):
            raise ConfigError(
                f"{owner}: layer '{name}' is a {type(layer).__name__}, which makes F(x) and F(x_hat) differ by chance; a "
                "forward process must be deterministic: remove it or set dropout to 0"
            )


def drift(point: PathPoint, g2: Tensor) -> Tensor:
    r"""Returns :math:`f - \tfrac12 g^2 s`, (B, *event); g2 is (B,). The one drift of both sides of the objective."""
    return point.velocity - 0.5 * expand_as_event(g2, point.z) * point.score


class ReverseProcess(nn.Module):
    """Process, predictor and volatility together.

    Args:
        process: the forward process.
        predictor: x_hat(z, t).
        volatility: g(t).

    Raises:
        ConfigError: a network of the process has a layer that a time derivative or the contract forbids.
    """

    def __init__(self, process: ForwardProcess, predictor: Predictor, volatility: Volatility) -> None:
        super().__init__()
        check_time_differentiable(process, type(process).__name__)
        self.process = process
        self.predictor = predictor
        self.volatility = volatility
        self.source: Tensor | None = None
        self.label: Tensor | None = None
        self.guidance = 1.0
        """Weight w of classifier-free guidance: 1 is the plain conditional model, 0 predicts without the label."""
        self.checkpoint_process = False
        """Whether the backward pass evaluates the forward process anew instead of keeping its activations."""
        self._autocast: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Event shape of x and z."""
        return self.process.shape

    def given(self, source: Tensor | None = None, label: Tensor | None = None, guidance: float = 1.0) -> "ReverseProcess":
        """Returns this model, with the same weights, of the data given their sources and labels.

        Args:
            source: for bridges, (B, *event).
            label: for models of several classes, (B,) or (1,); None is no label.
            guidance: weight of classifier-free guidance.
        """
        conditioned = copy.copy(self)
        conditioned._modules = {**self._modules, "process": self.process.given(label)}  # the shallow copy shares ours
        conditioned.source, conditioned.label, conditioned.guidance = source, label, guidance
        return conditioned

    @property
    def evaluations(self) -> int:
        """How often the predictor's network is evaluated for one x_hat: twice under guidance."""
        return 1 if self.guidance == 1 else 2

    @contextlib.contextmanager
    def full_precision(self, device: torch.device) -> Iterator[None]:
        """Confines autocast to the predictor: the forward process and the objective stay in the parameters' precision.

        With the forward process in bfloat16 too, the gradient of its parameters is 2 to 9 times further from that in
        float32 (benchmarks/precision.py, RESULTS.md).
        """
        if not torch.is_autocast_enabled(device.type):
            yield
            return
        self._autocast = torch.get_autocast_dtype(device.type)
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            self._autocast = None

    def g2(self, t: Tensor) -> Tensor:
        """Returns g^2(t), (B,)."""
        return self.volatility(t, self.process.reference_g2(t))

    def x_hat(self, z: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted data in the form that the process takes: (B, *event), or (B, 2, *event) with the source."""
        self._check_source()
        state = z - self.process.offset(t, self.source)
        reference = self.process.reference(t)
        mixed = contextlib.nullcontext() if self._autocast is None else torch.autocast(z.device.type, self._autocast)
        with mixed:
            prediction = self._predict(state, t, reference, self.label)
            if self.guidance != 1:
                free = self._predict(state, t, reference, None)
                prediction = free + self.guidance * (prediction - free)
        return self.process.join(prediction, self.source)

    def _predict(self, state: Tensor, t: Tensor, reference: tuple[Tensor, Tensor], label: Tensor | None) -> Tensor:
        known = (state, t, *reference, self.source)
        prediction: Tensor = self.predictor(*known) if label is None else self.predictor(*known, label)
        return prediction

    def path(self, eps: Tensor, t: Tensor, x: Tensor) -> PathPoint:
        """Returns the point of the forward process at the data x."""
        return self._evaluate(self.process.path, eps, t, x)

    def point(self, z: Tensor, t: Tensor) -> PathPoint:
        """Returns velocity and score of the model: those of the forward process at x_hat(z, t)."""
        return self._evaluate(self.process.path_at, z, t, self.x_hat(z, t))

    def ends(self, t: Tensor, s: Tensor, x: Tensor) -> Ends:
        """Returns the moments of the forward process at both ends of a step, for discrete time, at the data x."""
        assert isinstance(self.process, AffineProcess)
        return self._evaluate(self.process.step_moments, t, s, x)

    def _evaluate(self, function: Callable[[Tensor, Tensor, Tensor], _Result], *state: Tensor) -> _Result:
        # around the time derivative: checkpoints inside it are not supported by torch
        if self.checkpoint_process and torch.is_grad_enabled():
            return checkpoint(function, *state, use_reentrant=False)
        return function(*state)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Returns the drift of the model's ODE, (B, *event)."""
        return self.process.velocity_at(z, t, self.x_hat(z, t))

    def drift(self, z: Tensor, t: Tensor, stochasticity: float = 1.0) -> Tensor:
        r"""Returns :math:`f - \tfrac12 \eta^2 g^2 s` at x_hat, (B, *event): the drift of the SDE with noise :math:`\eta\,g`.

        From the ODE (0) to the trained SDE (1); the marginals are the same for a Gaussian process with the exact predictor.
        """
        return drift(self.point(z, t), stochasticity**2 * self.g2(t))

    def _check_source(self) -> None:
        name = type(self.process).__name__
        if self.process.takes_source and self.source is None:
            raise ConfigError(f"{name} is a bridge: give it source samples to start from")
        if not self.process.takes_source and self.source is not None:
            raise ConfigError(f"{name} is not a bridge: it starts from noise and takes no source samples")

    def prior(self, number: int, generator: Generators = None) -> Tensor:
        """Draws z_1, (number, *event), on the model's device: from N(0, I), or around the sources of a bridge."""
        self._check_source()
        like = next(self.parameters())
        noise = standard_normal((number, *self.shape), like.dtype, generator)
        return self.process.prior(noise.to(like.device), self.source)
