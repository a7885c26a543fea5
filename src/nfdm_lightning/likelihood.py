r"""Estimators of the negative log-likelihood, behind one interface.

A process, a predictor and a volatility define two generative models of the latents, the SDE's and the ODE's, which agree
only as far as training has made them: their likelihoods are two numbers, each with its own estimators.

* :class:`Bound`: the variational bound of the SDE, above its negative log-likelihood.
* :class:`ImportanceWeighted`: that of the SDE in T steps for K paths, between the bound in T steps and the likelihood of the
  sampler in T steps, falling with K. For small T it may lie above the bound in continuous time.
* :class:`ODE`: the ODE's density by the change of variables along its path,

.. math:: \log p_0(z_0) = \log p_1(z_1) + \int_0^1 \nabla \cdot f(z_t, t, \hat x(z_t, t))\, dt

A coarse solver can fake a low value of the last: :func:`check_trust` compares with a finer one.
"""

import abc
import contextlib
import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor, nn

from nfdm_lightning.bound import BoundTerms, Draws, averaged, bits_per_dim, indexed_draws, variational_bound
from nfdm_lightning.decoder import Decoder, DiscreteDecoder
from nfdm_lightning.dequantisation import Density, Dequantisation, WithDecoder, log_mean_exp
from nfdm_lightning.errors import ConfigError, NonFiniteError
from nfdm_lightning.processes.base import outside_inference_mode, sum_event
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.seeding import generators, standard_normal

# begin the seeds of each use of random numbers, so that no two share a stream
_DEQUANTISATION, _PROBES, _PATHS = 0x9E3779B9_00000DE0, 0x9E3779B9_0009B0BE, 0x9E3779B9_000009A7
_FIXED_STEPS = ("euler", "midpoint", "heun2", "heun3", "rk4")
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_EXACT_TRACE_UP_TO = 16
TRUST = 0.01
"""Bits/dim by which two solves may differ."""


@dataclass(frozen=True)
class Estimate:
    """An estimate of the negative log-likelihood of each sample of a batch.

    Attributes:
        nats: (B,).
        nfe: evaluations of the predictor per sample, all counted.
        parts: what else is known of it, each (B,) in nats, by name: the terms of the bound, the mean over single paths, or
            minus log p(z_1).
        probes: for a stochastic trace, the estimates of the single probes, (P, B) in nats; else empty, (0, B).
    """

    nats: Tensor
    nfe: int
    parts: dict[str, Tensor] = field(default_factory=dict)
    probes: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def probe_gap(self, dimensions: int) -> Tensor:
        """Returns the difference between two halves of the probes in bits/dim, (B,); empty for fewer than two."""
        middle = len(self.probes) // 2
        if not middle:
            return self.nats.new_empty(0)
        return bits_per_dim(self.probes[:middle].mean(0) - self.probes[middle:].mean(0), dimensions)


class Estimator(abc.ABC):
    """Base of the estimators; a subclass writes :meth:`evaluate`.

    The random numbers of a sample depend on the seed and on its place in the data set alone, so a value is the same for any
    batch size and any number of processes (but for the tolerance of adaptive solvers).
    """

    @property
    @abc.abstractmethod
    def of(self) -> str:
        """The model whose likelihood it estimates: SDE, SDE in T steps, or ODE."""

    @abc.abstractmethod
    def evaluate(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, index: Tensor, seed: int = 0, label: Tensor | None = None
    ) -> Estimate:
        """Returns the estimates of a batch, without a graph.

        Args:
            reverse: the generative model.
            decoder: p(x | z_0).
            x: data, (B, *event), or pairs of data and source for a bridge.
            index: place of each sample in the data set, (B,).
            seed: of all random numbers.
            label: classes, (B,), for the likelihood given them; None is no label.
        """

    def dequantisation_name(self, decoder: Decoder) -> str:
        """Returns what connects latents and data, for the tags of a result."""
        return WithDecoder().described(decoder)


class Bound(Estimator):
    """The variational bound, averaged over stratified draws of time and noise.

    Args:
        draws: draws per sample.
        discrete_steps: T, for the bound of T discrete steps; None is continuous time.
    """

    def __init__(self, draws: int = 32, discrete_steps: int | None = None) -> None:
        if draws < 1:
            raise ConfigError(f"Bound.draws={draws} must be at least 1")
        if discrete_steps is not None and discrete_steps < 1:
            raise ConfigError(f"Bound.discrete_steps={discrete_steps} must be at least 1, or null for continuous time")
        self.draws, self.discrete_steps = draws, discrete_steps

    @property
    def of(self) -> str:
        return "SDE" if self.discrete_steps is None else f"SDE in {self.discrete_steps} steps"

    @torch.no_grad()
    def evaluate(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, index: Tensor, seed: int = 0, label: Tensor | None = None
    ) -> Estimate:
        target = reverse.process.split(x)[0]

        def bound(numbers: Draws) -> BoundTerms:
            return variational_bound(reverse, decoder, x, numbers, self.discrete_steps, label)

        parts = averaged(bound, (indexed_draws(target, index, draw, self.draws, seed) for draw in range(self.draws)))
        return Estimate(torch.stack(list(parts.values())).sum(0), self.draws, parts)


class ImportanceWeighted(Estimator):
    r"""The importance-weighted bound of the model in T steps, with K paths of the forward process.

    .. math::
        -\log \frac1K \sum_k \frac{p(x \mid z_0)\, p(z_1) \prod p(z_s \mid z_t)}{q(z_1 \mid x) \prod q(z_s \mid z_t, x)},
        \qquad p(z_s \mid z_t) = q(z_s \mid z_t, \hat x(z_t, t))

    with the transitions of :class:`~nfdm_lightning.solvers.Ancestral`: it bounds the likelihood of that sampler with
    ``nfe=steps``, which tends to the SDE's. For K = 1 its mean is the bound in T discrete steps, and it falls with K
    (arXiv 1509.00519).

    Args:
        samples: K, paths of each sample.
        steps: T, steps of each path.
    """

    def __init__(self, samples: int = 16, steps: int = 100) -> None:
        if samples < 1 or steps < 1:
            raise ConfigError(f"ImportanceWeighted: samples={samples} and steps={steps} must be at least 1")
        self.samples, self.steps = samples, steps

    @property
    def of(self) -> str:
        return f"SDE in {self.steps} steps"

    @torch.no_grad()
    def evaluate(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, index: Tensor, seed: int = 0, label: Tensor | None = None
    ) -> Estimate:
        reverse = reverse.given(reverse.process.split(x)[1], label)
        log_w = torch.stack([self._log_weight(reverse, decoder, x, index, seed, k) for k in range(self.samples)])
        return Estimate(-log_mean_exp(log_w), self.samples * self.steps, {"single_path": -log_w.mean(0)})

    def _log_weight(self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, index: Tensor, seed: int, k: int) -> Tensor:
        process = reverse.process
        target, source = process.split(x)
        # all at once: a call for each sample and step would cost more than a small network
        shape = (len(x), self.steps + 1, *target.shape[1:])
        noise = standard_normal(shape, x.dtype, generators(index, _PATHS, seed, k)).to(x.device).unbind(1)
        times = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).to(x)
        one = x.new_ones(len(x))
        z = process.transform(noise[0], one, x)
        log_w = process.prior_log_prob(z, source) - process.log_prob(z, one, x)
        g2_t = reverse.g2(one)
        for (t, s), eps in zip(itertools.pairwise(times), noise[1:], strict=True):
            t, s = t.expand(len(x)), s.expand(len(x))
            g2_s = reverse.g2(s)
            mean, std = process.transition_moments(z, t, s, x, g2_t, g2_s)
            mean_hat, std_hat = process.transition_moments(z, t, s, reverse.x_hat(z, t), g2_t, g2_s)
            z = mean + std * eps
            log_ratio = 0.5 * eps**2 - 0.5 * ((z - mean_hat) / std_hat) ** 2 + (std / std_hat).log()
            log_w, g2_t = log_w + sum_event(log_ratio), g2_s
        return log_w + decoder.log_prob(target, z, *process.reference_at_data(x))


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Takes the gradient of no parameter: what it would need is not kept."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()


class ODE(Estimator):
    r"""The likelihood of the model's ODE, by the change of variables, for dequantised data.

    The divergence is exact, by D backward passes, or Hutchinson's estimate :math:`v^T \partial_z f\, v`, by one for each
    random v, which is the same along the whole path. Nothing is kept between evaluations, so memory does not grow with
    their number. With several draws of the dequantisation and a stochastic trace, the errors of the trace lower the value
    (Jensen's inequality), which no comparison of probes shows: give more probes, or an exact trace.

    Args:
        dequantisation: WithDecoder, Density (continuous data), Uniform or TruncatedNormal; None takes Density for continuous
            data and WithDecoder for discrete data.
        draws: K, draws of the dequantisation, importance-weighted.
        trace: ``exact``, ``hutchinson``, or ``auto``: exact up to 16 dimensions.
        probes: random vectors for Hutchinson's estimate.
        probe: their distribution, ``rademacher`` (of the least variance) or ``gaussian``.
        method: of torchdiffeq: dopri5, dopri8, bosh3, fehlberg2 or adaptive_heun; or euler, midpoint, heun2, heun3 or rk4
            with ``steps``.
        rtol: relative tolerance of an adaptive method, of each sample.
        atol: the same, absolute, of latents and of nats per dimension.
        steps: number of steps of a method of fixed steps.
    """

    def __init__(
        self,
        dequantisation: Dequantisation | None = None,
        draws: int = 1,
        trace: Literal["auto", "exact", "hutchinson"] = "auto",
        probes: int = 2,
        probe: Literal["rademacher", "gaussian"] = "rademacher",
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        steps: int | None = None,
    ) -> None:
        if draws < 1 or probes < 1:
            raise ConfigError(f"ODE: draws={draws} and probes={probes} must be at least 1")
        if method not in _FIXED_STEPS + _ADAPTIVE:
            raise ConfigError(f"ODE.method={method!r}: choose from {', '.join(_ADAPTIVE + _FIXED_STEPS)}")
        if (method in _FIXED_STEPS) != (steps is not None):
            raise ConfigError(
                f"ODE.method={method} {'needs' if steps is None else 'has'} "
                + ("steps: give their number" if steps is None else "tolerances and no steps: leave steps out")
            )
        if steps is not None and steps < 1:
            raise ConfigError(f"ODE.steps={steps} must be at least 1")
        if not (rtol > 0 and atol > 0):
            raise ConfigError(f"ODE: rtol={rtol} and atol={atol} must be positive")
        self.dequantisation, self.draws = dequantisation, draws
        self.trace, self.probes, self.probe = trace, probes, probe
        self.method, self.rtol, self.atol, self.steps = method, rtol, atol, steps

    @property
    def of(self) -> str:
        return "ODE"

    def finer(self) -> Self:
        """Returns the same estimator, with the same random numbers, at a tenth of the tolerances or four times the steps."""
        finer = copy.copy(self)
        finer.rtol, finer.atol = self.rtol / 10, self.atol / 10
        finer.steps = None if self.steps is None else 4 * self.steps
        return finer

    def exact_trace(self, dimensions: int) -> bool:
        """Returns whether the divergence of that many dimensions is exact."""
        return self.trace == "exact" or (self.trace == "auto" and dimensions <= _EXACT_TRACE_UP_TO)

    def dequantisation_name(self, decoder: Decoder) -> str:
        name = self._dequantisation(decoder).described(decoder)
        return name if self.draws == 1 else f"{name}, {self.draws} importance-weighted draws"

    def _dequantisation(self, decoder: Decoder) -> Dequantisation:
        if self.dequantisation is not None:
            return self.dequantisation
        return WithDecoder() if isinstance(decoder, DiscreteDecoder) else Density()

    @torch.no_grad()
    def evaluate(
        self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, index: Tensor, seed: int = 0, label: Tensor | None = None
    ) -> Estimate:
        with outside_inference_mode(), _frozen(reverse):
            x, label = x.clone(), None if label is None else label.clone()  # tensors made in it have no gradient
            return self._evaluate(reverse.given(reverse.process.split(x)[1], label), decoder, x, index, seed)

    def _evaluate(self, reverse: ReverseProcess, decoder: Decoder, x: Tensor, index: Tensor, seed: int) -> Estimate:
        nfe, log_p, prior = 0, [], []
        for k in range(self.draws):
            own = generators(index, _DEQUANTISATION, seed, k)
            z, log_w = self._dequantisation(decoder).draw(reverse, decoder, x, own)
            end, log_det, evaluations = self._flow(reverse, z, generators(index, _PROBES, seed, k))
            prior.append(reverse.process.prior_log_prob(end, reverse.source))
            log_p.append(log_w + prior[-1] + log_det)
            nfe += evaluations
        by_probe = torch.stack(log_p, 1)  # (P or 1, K, B)
        nats = -log_mean_exp(by_probe.mean(0))
        if not torch.isfinite(nats).all():
            bad = int((~torch.isfinite(nats)).int().argmax())
            raise NonFiniteError(
                f"the ODE likelihood of sample {int(index[bad])} is {float(nats[bad])}: the solve has diverged; tighten "
                "rtol and atol, or give more steps"
            )
        single = (
            torch.stack([-log_mean_exp(one) for one in by_probe]) if not self._is_exact(z) else nats.new_empty(0, len(x))
        )
        return Estimate(nats, nfe, {"prior": -torch.stack(prior).mean(0)}, single)

    def _is_exact(self, z: Tensor) -> bool:
        return self.exact_trace(z[0].numel())

    def _vectors(self, z: Tensor, own: list[torch.Generator]) -> list[Tensor]:
        if self._is_exact(z):
            basis = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
            return [unit.view(1, *z.shape[1:]).expand_as(z) for unit in basis]
        drawn = standard_normal((len(z), self.probes, *z.shape[1:]), z.dtype, own).to(z.device)
        if self.probe == "rademacher":
            drawn = torch.where(drawn > 0, 1.0, -1.0).to(z)
        return list(drawn.unbind(1))

    def _flow(self, reverse: ReverseProcess, z: Tensor, own: list[torch.Generator]) -> tuple[Tensor, Tensor, int]:
        """Returns z_1, the integral of the divergence for each probe, (P, B), or the exact one, (1, B), and the NFE."""
        from torchdiffeq import odeint  # imports scipy: not at start-up

        vectors, exact, dimensions = self._vectors(z, own), self._is_exact(z), z[0].numel()
        integrals = 1 if exact else len(vectors)
        nfe = 0

        # one state (B, D + P): the latents, and the integrals per dimension, so that one tolerance serves both
        def rate(time: Tensor, state: Tensor) -> Tensor:
            nonlocal nfe
            latents = state[:, :dimensions].view_as(z)
            t = time.to(z).clamp(0, 1).expand(len(z)).contiguous()  # rounding may step beyond
            # reverse mode: the velocity may hold a forward derivative in t, and not every function has two of these
            with torch.enable_grad():
                point = latents.detach().requires_grad_()
                speed = reverse.velocity(point, t) + 0 * point  # which may not depend on it
            pulled = (torch.autograd.grad(speed, point, vector, retain_graph=True)[0] for vector in vectors)
            divergence = torch.stack([sum_event(vector * one) for vector, one in zip(vectors, pulled, strict=True)], 1)
            nfe += 1
            if exact:
                divergence = divergence.sum(1, keepdim=True)
            return torch.cat([speed.detach().flatten(1), divergence / dimensions], 1)

        def norm(error: Tensor) -> Tensor:  # the worst sample's, so that its error does not depend on the others
            return torch.maximum(error[:, :dimensions].square().mean(1).sqrt().max(), error[:, dimensions:].abs().max())

        begin = torch.cat([z.flatten(1), z.new_zeros(len(z), integrals)], 1)
        times = torch.tensor([0.0, 1.0], dtype=torch.float64).to(z)
        try:
            if self.steps is None:
                settings = {"rtol": self.rtol, "atol": self.atol, "options": {"norm": norm, "step_t": times[1:]}}
                end = odeint(rate, begin, times, method=self.method, **settings)[1]
            else:
                end = odeint(rate, begin, times, method=self.method, options={"step_size": (1 + 1e-6) / self.steps})[1]
        except AssertionError as error:  # torchdiffeq's, where a step becomes too small for the precision
            raise NonFiniteError(
                f"the ODE likelihood by {self.method} failed ({error}): loosen rtol={self.rtol} and atol={self.atol}, or "
                "evaluate in float64"
            ) from None
        return end[:, :dimensions].view_as(z), dimensions * end[:, dimensions:].T, nfe


@dataclass(frozen=True)
class Trust:
    """Whether an ODE likelihood is what it says, judged on some samples.

    Attributes:
        solver_gap: mean difference to the finer solve, in bits/dim: positive if the solve gives too low a value.
        probe_gap: mean difference between two halves of the probes, in bits/dim; None for an exact trace.
        samples: how many the two solves were compared on.
    """

    solver_gap: float
    probe_gap: float | None
    samples: int

    @property
    def reasons(self) -> list[str]:
        """What speaks against it, in words."""
        found = []
        if math.isnan(self.solver_gap):
            found.append("a finer solve failed")
        elif not abs(self.solver_gap) <= TRUST:
            found.append(f"a finer solve differs by {self.solver_gap:+.4f} bits/dim")
        if self.probe_gap is not None and not abs(self.probe_gap) <= TRUST:
            found.append(f"two sets of probes differ by {self.probe_gap:+.4f} bits/dim")
        return found

    @property
    def trusted(self) -> bool:
        """Whether all differences are at most 0.01 bits/dim."""
        return not self.reasons


def check_trust(
    ode: ODE,
    reverse: ReverseProcess,
    decoder: Decoder,
    x: Tensor,
    index: Tensor,
    seed: int = 0,
    label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the differences in bits/dim, (B,), of a finer solve to the given one, and of two halves of the probes.

    The second is empty for an exact trace. Both solves have the same random numbers and at least two probes.
    """
    given = copy.copy(ode)
    given.probes = max(2, ode.probes)
    coarse = given.evaluate(reverse, decoder, x, index, seed, label)
    fine = given.finer().evaluate(reverse, decoder, x, index, seed, label)
    dimensions = math.prod(reverse.shape)
    return bits_per_dim(fine.nats - coarse.nats, dimensions), coarse.probe_gap(dimensions)


def judge(solver: Tensor, probe: Tensor) -> Trust:
    """Returns the verdict on differences as :func:`check_trust` gives them; those of the probes may be of more samples."""
    return Trust(float(solver.mean()), float(probe.mean()) if len(probe) else None, len(solver))
