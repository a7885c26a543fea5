r"""Forward processes: how data becomes noise.

A forward process is one invertible map from noise to latents,

.. math:: z_t = F(\varepsilon, t, x), \qquad \varepsilon \sim \mathcal N(0, I), \qquad t \in [0, 1],

with data at :math:`t = 0` and the prior at :math:`t = 1`. Everything the objective and the samplers need follows from F:

.. math::
    \text{velocity} \quad f(z, t, x) &= \partial_t F(\varepsilon, t, x) \big|_{\varepsilon = F^{-1}(z, t, x)} \\
    \text{score} \quad s(z, t, x) &= \nabla_z \log q(z_t \mid x)

Conventions: argument order is (state, t, x); ``t`` has shape (B,); ``x``, ``z`` and ``eps`` have shape (B, *event);
densities are per sample, shape (B,), in nats.
"""

import abc
import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import Conditioned
from nfdm_lightning.processes.tangents import NestedError, UnsupportedError, other_mode, refuse_nesting, value_and_tangent

if TYPE_CHECKING:
    from nfdm_lightning.processes.penalties import Penalty

Shape = tuple[int, ...]

# Where a path ends in alpha(1) = 0, -alpha'/alpha diverges. Below this alpha the reference volatility takes it for alpha,
# at a cost of 3e-4 nats per dimension on Gaussian data; the default variance preserving schedule never gets there.
ALPHA_FLOOR = 0.05


def expand_as_event(t: Tensor, like: Tensor) -> Tensor:
    """Views per-sample values of shape (B,) as (B, 1, ..., 1), so that they broadcast against ``like``."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def bounded(raw: Tensor, limit: float) -> Tensor:
    """Returns limit * tanh(raw / limit): raw near 0, and never beyond the limit."""
    return limit * torch.tanh(raw / limit)


def check_bound(bound: float) -> float:
    """Returns the limit of something learned, if it is one."""
    if not bound > 0:
        raise ConfigError(f"bound={bound} must be positive: it limits what is learned")
    return bound


def check_delta(delta: float) -> float:
    """Returns the standard deviation at a pinned end, if it is one."""
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta} must lie in (0, 1): it pins the noise at the data away from zero")
    return delta


def sum_event(values: Tensor) -> Tensor:
    """Sums over every dimension but the first: (B, *event) to (B,)."""
    return values.flatten(1).sum(1)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Lets what is inside be differentiated in forward mode: fused attention cannot, so its plain form is chosen."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leaves inference mode for no_grad: in it, torch 2.11 differentiates everything to zero without a word."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def time_derivative(function: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Returns function(t) and its time derivative, by forward-mode autodiff with tangent 1; of tensors or tuples of them.

    The one place where time derivatives are taken: by :mod:`~nfdm_lightning.processes.tangents`, and by torch's own forward
    mode under autocast or ``torch.compile``, inside another transformation of ``torch.func``, and for a function that the
    former cannot follow (which warns, as it costs half as much again). Differentiable in parameters and inputs once more.
    """
    refuse_nesting()  # the outer derivative starts again, in torch's forward mode
    t = t.contiguous()  # forward mode refuses an expanded tensor
    with outside_inference_mode(), forward_mode():
        if other_mode(t.device.type) is None:
            try:
                return value_and_tangent(function, t)
            except NestedError:
                pass
            except UnsupportedError as reason:
                warnings.warn(f"a time derivative is taken by torch.func.jvp, which is slower: {reason}", stacklevel=2)
        value, derivative = torch.func.jvp(function, (t,), (torch.ones_like(t),))[:2]
    return value, derivative


@dataclass(frozen=True)
class PathPoint:
    """A point of the forward path.

    Attributes:
        z: latents, (B, *event).
        velocity: dF/dt at fixed eps, (B, *event).
        score: gradient of log q(z_t | x) with respect to z, (B, *event).
    """

    z: Tensor
    velocity: Tensor
    score: Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of q(z_t | x) with their time derivatives, each broadcastable to (B, *event)."""

    mean: Tensor
    std: Tensor
    mean_dt: Tensor
    std_dt: Tensor


@dataclass(frozen=True)
class Ends:
    """Mean and standard deviation of q(z_t | x) and q(z_s | x) at both ends of a step, each broadcastable to (B, *event)."""

    mean_t: Tensor
    std_t: Tensor
    mean_s: Tensor
    std_s: Tensor


class ForwardProcess(Conditioned, abc.ABC):
    r"""A forward process :math:`z_t = F(\varepsilon, t, x)` (NFDM, arXiv 2404.12940, section 3).

    A subclass writes :meth:`transform`, :meth:`inverse` and :meth:`log_prob`; velocity and score then come from automatic
    differentiation. Override :meth:`reference` when the process starts out near another Gaussian path than the default.
    A process must be deterministic between calls (no dropout) and twice differentiable in its parameters and t.
    :func:`nfdm_lightning.testing.check_process` says whether a subclass keeps all this.

    The path of a bridge depends on a source sample besides the data: it sets ``takes_source``, its x are pairs
    (target, source) stacked to (B, 2, *event), and :meth:`split`, :meth:`join`, :meth:`prior`, :meth:`prior_log_prob`
    and :meth:`offset` say what that means. Every other process leaves these alone.

    A process that sees class labels has the init argument ``num_classes``, builds its networks by
    :func:`~nfdm_lightning.labels.build_network` and evaluates them by :meth:`call_network`. The labels are those of
    :meth:`given`. One without that argument ignores them, and its x is told apart by the predictor alone.

    Args:
        shape: event shape of z, without the batch dimension.
        num_classes: number of classes whose labels its networks see; None for a process without labels.
    """

    delta: float = 1e-2
    """Standard deviation of q(z_0 | x) along the default reference path, in data units."""

    takes_source: ClassVar[bool] = False
    """Whether x are pairs (target, source)."""

    penalties: Sequence["Penalty"] = ()
    """What the process wants added to the objective in training, besides the bound."""

    def __init__(self, shape: Shape, num_classes: int | None = None) -> None:
        super().__init__(num_classes)
        self.shape = tuple(shape)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns what the predictor has to predict, (B, *event), and the source that it is given, or None."""
        return x, None

    def join(self, x_hat: Tensor, source: Tensor | None) -> Tensor:
        """Returns the x of a prediction and a source: the inverse of :meth:`split`."""
        return x_hat

    def prior(self, eps: Tensor, source: Tensor | None) -> Tensor:
        """Returns z_1, (B, *event), as the generative model draws it from eps ~ N(0, I)."""
        return eps

    def offset(self, t: Tensor, source: Tensor | None) -> Tensor | float:
        """Returns what the source contributes to the mean of the reference path, broadcastable to (B, *event)."""
        return 0.0

    @abc.abstractmethod
    def transform(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Returns z = F(eps, t, x), (B, *event)."""

    @abc.abstractmethod
    def inverse(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Returns eps with F(eps, t, x) = z, (B, *event)."""

    @abc.abstractmethod
    def log_prob(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Returns log q(z_t = z | x) in nats, (B,)."""

    def path(self, eps: Tensor, t: Tensor, x: Tensor) -> PathPoint:
        """Returns z = F(eps, t, x) with velocity and score; forward mode in t for the one, reverse in z for the other."""
        z, velocity = time_derivative(lambda time: self.transform(eps, time, x), t)
        return PathPoint(z, velocity, self._score(z, t, x))

    def _score(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        def gradient(state: Tensor, time: Tensor, data: Tensor) -> Tensor:
            return torch.func.grad(lambda point: self.log_prob(point, time, data).sum())(state)

        with forward_mode():  # for the plain attention: fused, it has no second derivative in reverse mode either
            if not torch.is_inference_mode_enabled():
                return gradient(z, t, x)
            with outside_inference_mode():
                return gradient(z.clone(), t.clone(), x.clone())  # tensors made in it cannot be differentiated

    def path_at(self, z: Tensor, t: Tensor, x: Tensor) -> PathPoint:
        """Returns velocity and score at a given z, through the inverse."""
        return self.path(self.inverse(z, t, x), t, x)

    def velocity_at(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Returns the velocity alone at a given z, (B, *event): what the ODE needs, at less cost than both."""
        eps = self.inverse(z, t, x)
        return time_derivative(lambda time: self.transform(eps, time, x), t)[1]

    def start(self, eps: Tensor, x: Tensor) -> Tensor:
        """Returns z_0 = F(eps, 0, x), (B, *event); a process pinned at t = 0 may override it to save a network call."""
        return self.transform(eps, x.new_zeros(len(x)), x)

    def prior_log_prob(self, z: Tensor, source: Tensor | None) -> Tensor:
        """Returns the log density of :meth:`prior` at z_1 = z in nats, (B,)."""
        return -sum_event(0.5 * z**2 + 0.5 * math.log(2 * math.pi))

    def prior_kl(self, eps: Tensor, x: Tensor) -> Tensor:
        r"""Returns :math:`KL(q(z_1 | x) \| p(z_1))` in nats, (B,); by default the one-sample estimate at z_1 = F(eps, 1, x).

        A process with another prior than N(0, I) overrides :meth:`prior` and :meth:`prior_log_prob`, and this where it has
        a closed form.
        """
        t = x.new_ones(len(x))
        z = self.transform(eps, t, x)
        return self.log_prob(z, t, x) - self.prior_log_prob(z, self.split(x)[1])

    def reference(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns (alpha, sigma), each (B,): the Gaussian path N(alpha x, sigma^2 I) that the process is near.

        It sets the predictor's preconditioning, the decoder's noise and the scale of g(t), none of which changes what is
        a valid bound. Default: :math:`\alpha = 1 - t,\ \sigma = \delta^{1-t}`, from N(x, delta^2 I) to N(0, I).
        """
        return 1 - t, self.delta ** (1 - t)

    def reference_at_data(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (alpha, sigma) of the reference path at t = 0, scalars of the type and device of ``like``."""
        alpha, sigma = self.reference(like.new_zeros(1))
        return alpha[0], sigma[0]

    def reference_log_ratio(self, t: Tensor) -> Tensor:
        r"""Returns :math:`\log(\sigma / \alpha)` of the reference path, half of gamma, (B,).

        Where alpha falls below 0.05 its logarithm continues along its tangent there: on a path to alpha(1) = 0 it would
        diverge, and g with it.
        """
        alpha, sigma = self.reference(t)
        return sigma.log() - floored_log(alpha)

    def reference_g2(self, t: Tensor) -> Tensor:
        r"""Returns :math:`g^2(t) = 2 \sigma^2\, \partial_t \log(\sigma / \alpha)` of the reference path, (B,).

        For a fixed Gaussian process the bound is tight there (:math:`\sigma^2 \gamma'`).
        """
        _, slope = time_derivative(self.reference_log_ratio, t)
        return 2 * self.reference(t)[1] ** 2 * slope

    def log_refresh(
        self, t: Tensor, s: Tensor, g2_t: Tensor, g2_s: Tensor, std_t: Tensor, std_s: Tensor, like: Tensor
    ) -> Tensor:
        r"""Returns log rho <= 0: how much of eps_t is left at s < t in the reverse SDE of one fixed x (derived).

        .. math:: \varepsilon_s = \rho\, \varepsilon_t + \sqrt{1 - \rho^2}\, \text{noise},
            \qquad \rho = \exp\Big(-\int_s^t \frac{g^2}{2\, \text{std}^2} du\Big)

        At fixed x, eps is an Ornstein-Uhlenbeck process. The integral is exact for the reference path and its own g;
        another g or std multiplies it by the mean of its values at the two ends. So a fixed Gaussian process with its
        matched g has :math:`\rho = \alpha_t \sigma_s / (\alpha_s \sigma_t)`, DDPM's choice, while alpha is above 0.05.

        Args:
            t: the later time, (B,).
            s: the earlier time, (B,).
            g2_t: g^2(t), (B,).
            g2_s: g^2(s), (B,).
            std_t: standard deviation of q(z_t | x), broadcastable to (B, *event).
            std_s: that of q(z_s | x).
            like: any tensor of shape (B, *event).
        """
        exact = expand_as_event(self.reference_log_ratio(t) - self.reference_log_ratio(s), like)
        ends = ((t, g2_t, std_t), (s, g2_s, std_s))
        share = [
            expand_as_event(g2 / self.reference_g2(u) * self.reference(u)[1] ** 2, like) / std**2 for u, g2, std in ends
        ]
        return -0.5 * exact * (share[0] + share[1])

    def typical_std(self, t: Tensor, x: Tensor) -> Tensor:
        """Returns a scale of q(z_t | x), broadcastable, for :meth:`transition`: that of the reference by default."""
        return expand_as_event(self.reference(t)[1], self.split(x)[0])

    def transition(self, z: Tensor, t: Tensor, s: Tensor, x: Tensor, g2_t: Tensor, g2_s: Tensor, noise: Tensor) -> Tensor:
        """Returns z_s given z_t, s <= t, by the reverse SDE of one fixed x: a draw with :meth:`transition_moments`."""
        mean, std = self.transition_moments(z, t, s, x, g2_t, g2_s)
        return mean + std * noise

    def transition_moments(
        self, z: Tensor, t: Tensor, s: Tensor, x: Tensor, g2_t: Tensor, g2_s: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Returns mean and std, broadcastable to (B, *event), of z_s given z_t, s <= t, by the reverse SDE of one fixed x.

        First the exact ODE step of that x, then the noise and the score that balances it, with the rho of
        :meth:`log_refresh` (derived):

        .. math:: z_s = y + (1 - \rho)\,\text{std}_s^2\, s(y, s, x) + \text{std}_s \sqrt{1 - \rho^2}\; \text{noise},
            \qquad y = F(F^{-1}(z_t, t, x), s, x)

        Where q(z_s | x) is Gaussian with that std the step is exact, else it is of first order. With g = 0 it is the ODE
        step (DDIM for Gaussian paths).
        """
        std_t, std_s = self.typical_std(t, x), self.typical_std(s, x)
        log_rho = self.log_refresh(t, s, g2_t, g2_s, std_t, std_s, z)
        y = self.transform(self.inverse(z, t, x), s, x)
        spread = (-torch.expm1(2 * log_rho)).sqrt()
        return y - torch.expm1(log_rho) * std_s**2 * self._score(y, s, x), std_s * spread


class AffineProcess(ForwardProcess):
    r"""A forward process affine in the noise: :math:`F = \text{mean}(t, x) + \text{std}(t, x)\,\varepsilon`.

    A subclass writes :meth:`moments`; the rest is closed form, with one evaluation of :meth:`moments` (and of its time
    derivative by forward-mode autodiff) per path:

    .. math:: f = \text{mean}' + \text{std}'\varepsilon, \qquad s = -\varepsilon / \text{std}
    """

    @abc.abstractmethod
    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and std of q(z_t | x), each broadcastable to (B, *event), std > 0."""

    def moments_dt(self, t: Tensor, x: Tensor) -> Moments:
        """Returns the moments with their time derivatives, by forward-mode autodiff; override for a closed form."""
        (mean, std), (mean_dt, std_dt) = time_derivative(lambda time: self.moments(time, x), t)
        return Moments(mean, std, mean_dt, std_dt)

    def transform(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        mean, std = self.moments(t, x)
        return mean + std * eps

    def inverse(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        mean, std = self.moments(t, x)
        return (z - mean) / std

    def log_prob(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        mean, std = self.moments(t, x)
        log_std = std.log().expand_as(z)
        return sum_event(-0.5 * ((z - mean) / std) ** 2 - log_std - 0.5 * math.log(2 * math.pi))

    def path(self, eps: Tensor, t: Tensor, x: Tensor) -> PathPoint:
        at = self.moments_dt(t, x)
        return PathPoint(at.mean + at.std * eps, at.mean_dt + at.std_dt * eps, -eps / at.std)

    def path_at(self, z: Tensor, t: Tensor, x: Tensor) -> PathPoint:
        at = self.moments_dt(t, x)
        eps = (z - at.mean) / at.std
        return PathPoint(z, at.mean_dt + at.std_dt * eps, -eps / at.std)

    def step_moments(self, t: Tensor, s: Tensor, x: Tensor) -> Ends:
        """Returns the moments at both ends of a step; override where they share an evaluation of a network."""
        return Ends(*self.moments(t, x), *self.moments(s, x))

    def posterior(self, z: Tensor, t: Tensor, s: Tensor, ends: Ends, g2_t: Tensor, g2_s: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns mean and std, (B, *event), of the discrete-time posterior :math:`q(z_s \mid z_t, x)`, s < t.

        .. math:: \text{mean}_s + \rho\, \text{std}_s\, \frac{z_t - \text{mean}_t}{\text{std}_t}, \qquad
            \text{std}_s \sqrt{1 - \rho^2}

        with rho of :meth:`log_refresh` and ``ends`` of :meth:`step_moments` at x. It has the marginals q(z_s | x) for any g.
        (NDM, arXiv 2310.08337, section 3, where the mean is alpha F(x, t), the std sigma, and the variance v DDPM's.)
        """
        log_rho = self.log_refresh(t, s, g2_t, g2_s, ends.std_t, ends.std_s, z)
        mean = ends.mean_s + ends.std_s * log_rho.exp() * (z - ends.mean_t) / ends.std_t
        return mean, (ends.std_s * (-torch.expm1(2 * log_rho)).sqrt()).expand_as(z)

    def posterior_kl(
        self, z: Tensor, t: Tensor, s: Tensor, at_x: Ends, at_x_hat: Ends, g2_t: Tensor, g2_s: Tensor
    ) -> Tensor:
        r"""Returns :math:`KL(q(z_s \mid z_t, x) \,\|\, q(z_s \mid z_t, \hat x))` in nats, (B,).

        Summed over the steps of a grid it is the diffusion term in discrete time; T times one step tends to the continuous
        loss.
        """
        (mean, std), (mean_hat, std_hat) = (self.posterior(z, t, s, ends, g2_t, g2_s) for ends in (at_x, at_x_hat))
        ratio = std / std_hat
        return sum_event(0.5 * ((mean - mean_hat) / std_hat) ** 2 + 0.5 * (ratio**2 - 1) - ratio.log())

    def velocity_at(self, z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return self.path_at(z, t, x).velocity

    def transition_moments(
        self, z: Tensor, t: Tensor, s: Tensor, x: Tensor, g2_t: Tensor, g2_s: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.posterior(z, t, s, self.step_moments(t, s, x), g2_t, g2_s)

    def prior_kl(self, eps: Tensor, x: Tensor) -> Tensor:
        r"""Returns :math:`\tfrac12 \sum (\text{mean}^2 + \text{std}^2 - 1 - 2 \log \text{std})` at t = 1 in nats, (B,)."""
        mean, std = self.moments(x.new_ones(len(x)), x)
        return sum_event(0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).expand_as(eps))


def floored_log(alpha: Tensor) -> Tensor:
    """Returns log alpha, and below 0.05 its tangent there."""
    return alpha.clamp_min(ALPHA_FLOOR).log() + (alpha / ALPHA_FLOOR - 1).clamp_max(0)


def matched_g2(alpha: Tensor, sigma: Tensor, alpha_dt: Tensor, sigma_dt: Tensor) -> Tensor:
    r"""Returns :math:`2 \sigma (\sigma' - \sigma\, \alpha' / \max(\alpha, 0.05))`."""
    return 2 * sigma * (sigma_dt - sigma * alpha_dt / alpha.clamp_min(ALPHA_FLOOR))
