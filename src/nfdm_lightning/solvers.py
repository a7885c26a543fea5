r"""Samplers: the model's SDE and ODE, solved from t = 1 to t = 0.

Every solver counts its evaluations of the predictor, and is given a budget of them (``nfe``), so that samplers compare at
equal cost. The SDE family has one dial, the stochasticity :math:`\eta`:

.. math:: dz = \big[f - \tfrac12 \eta^2 g^2 s\big] dt + \eta\, g\, dw

is the ODE at 0 and the trained SDE at 1. All have the same marginals where velocity and score are affine in x and the
predictor is exact: for Gaussian processes. A learned process couples them only as far as training has.
"""

import abc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import expand_as_event
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.seeding import Generators, standard_normal


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
        z: the latents at t = 0, (B, *event).
        nfe: evaluations of the predictor per sample.
        times: times of the trajectory, falling from 1 to 0, (K,); empty where none was asked for.
        trajectory: latents at these times, (K, B, *event).
    """

    z: Tensor
    nfe: int
    times: Tensor
    trajectory: Tensor


class _Recorder:
    """Keeps the trajectory, if one is wanted."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.times: list[float] = []
        self.states: list[Tensor] = []

    def add(self, time: float, z: Tensor) -> None:
        if self.wanted:
            self.times.append(time)
            self.states.append(z)

    def solution(self, z: Tensor, nfe: int) -> Solution:
        states = torch.stack(self.states) if self.states else z.new_empty(0, *z.shape)
        return Solution(z, nfe, z.new_tensor(self.times), states)


class _Noise:
    """Standard normal draws from CPU generators: one seed, the same samples on every device.

    With a generator for each sample, what a sample draws does not depend on its batch.
    """

    def __init__(self, generator: Generators) -> None:
        self.generator = generator

    def like(self, z: Tensor) -> Tensor:
        return standard_normal(tuple(z.shape), z.dtype, self.generator).to(z.device)


class Solver(abc.ABC):
    """Base of the samplers; a subclass writes :meth:`solve`."""

    @abc.abstractmethod
    def solve(self, reverse: ReverseProcess, z: Tensor, generator: Generators = None, trajectory: bool = False) -> Solution:
        """Carries z from t = 1 to t = 0.

        Args:
            reverse: the generative model.
            z: latents at t = 1, (B, *event).
            generator: CPU generator of the noise, or one for each sample.
            trajectory: whether to keep every state.
        """


def _check_budget(nfe: int, per_step: int = 1) -> int:
    if nfe < per_step:
        raise ConfigError(f"nfe={nfe} is less than the {per_step} evaluation(s) of one step")
    return nfe // per_step


def _times(steps: int, z: Tensor) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).to(z)


class _FixedGrid(Solver):
    """A solver of equal steps: a subclass says how one step is made."""

    evaluations_per_step = 1

    def __init__(self, nfe: int = 100) -> None:
        self.nfe = nfe
        self.steps = _check_budget(nfe, self.evaluations_per_step)

    @abc.abstractmethod
    def step(self, reverse: ReverseProcess, z: Tensor, t: Tensor, s: Tensor, noise: _Noise) -> Tensor:
        """Returns the state at s < t, both (B,)."""

    @torch.no_grad()
    def solve(self, reverse: ReverseProcess, z: Tensor, generator: Generators = None, trajectory: bool = False) -> Solution:
        noise, recorder = _Noise(generator), _Recorder(trajectory)
        times = _times(self.steps, z)
        recorder.add(1.0, z)
        for t, s in itertools.pairwise(times):
            z = self.step(reverse, z, t.expand(len(z)), s.expand(len(z)), noise)
            recorder.add(s.item() if trajectory else 0.0, z)
        return recorder.solution(z, self.steps * self.evaluations_per_step)


class Euler(_FixedGrid):
    """The ODE by Euler's method, order 1.

    Args:
        nfe: number of function evaluations, 1 per step.
    """

    def step(self, reverse: ReverseProcess, z: Tensor, t: Tensor, s: Tensor, noise: _Noise) -> Tensor:
        return z + expand_as_event(s - t, z) * reverse.velocity(z, t)


class Heun(_FixedGrid):
    """The ODE by Heun's method, order 2.

    Args:
        nfe: number of function evaluations, 2 per step.
    """

    evaluations_per_step = 2

    def step(self, reverse: ReverseProcess, z: Tensor, t: Tensor, s: Tensor, noise: _Noise) -> Tensor:
        dt = expand_as_event(s - t, z)
        first = reverse.velocity(z, t)
        second = reverse.velocity(z + dt * first, s)
        return z + 0.5 * dt * (first + second)


class _FixedGridSDE(_FixedGrid):
    """A solver of equal steps for the family of SDEs.

    Args:
        nfe: number of function evaluations, 1 per step.
        stochasticity: eta, between the ODE (0) and the trained SDE (1).
    """

    def __init__(self, nfe: int = 100, stochasticity: float = 1.0) -> None:
        super().__init__(nfe)
        self.stochasticity = _check_stochasticity(stochasticity)


class EulerMaruyama(_FixedGridSDE):
    """The SDE by the Euler-Maruyama method; the noise is additive, so strong order 1."""

    def step(self, reverse: ReverseProcess, z: Tensor, t: Tensor, s: Tensor, noise: _Noise) -> Tensor:
        dt = expand_as_event(t - s, z)
        diffusion = self.stochasticity * expand_as_event(reverse.g2(t), z).sqrt()
        return z - dt * reverse.drift(z, t, self.stochasticity) + diffusion * dt.sqrt() * noise.like(z)


class Ancestral(_FixedGridSDE):
    r"""The SDE with its linear part solved exactly, see :meth:`~nfdm_lightning.processes.base.ForwardProcess.transition`.

    At fixed x_hat the reverse SDE of a process that is affine in the noise is an Ornstein-Uhlenbeck process in eps: each
    step has the right marginal for the current x_hat, and is stable for any g. For other processes a step is of first
    order. It is DDPM's ancestral sampling for a Gaussian process (while its alpha is above 0.05), DDIM at stochasticity 0,
    and shares their bias, of order 1: in few steps the samples are spread too little.
    """

    def step(self, reverse: ReverseProcess, z: Tensor, t: Tensor, s: Tensor, noise: _Noise) -> Tensor:
        scale = self.stochasticity**2
        x_hat = reverse.x_hat(z, t)
        draw = noise.like(z) if scale else torch.zeros_like(z)
        return reverse.process.transition(z, t, s, x_hat, scale * reverse.g2(t), scale * reverse.g2(s), draw)


class Adaptive(Solver):
    """The ODE by an adaptive Runge-Kutta method of torchdiffeq.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.
        method: torchdiffeq's name of the method.
    """

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, method: str = "dopri5") -> None:
        self.rtol, self.atol, self.method = rtol, atol, method

    @torch.no_grad()
    def solve(self, reverse: ReverseProcess, z: Tensor, generator: Generators = None, trajectory: bool = False) -> Solution:
        from torchdiffeq import odeint  # imports scipy: not at start-up

        nfe = 0

        def velocity(time: Tensor, state: Tensor) -> Tensor:
            nonlocal nfe
            nfe += 1
            return reverse.velocity(state, time.to(state).clamp(0, 1).expand(len(state)))  # rounding may step beyond

        times = _times(100 if trajectory else 1, z)
        options = {"step_t": times[-1:]}  # a step beyond the end, where the velocity is not smooth, costs accuracy
        states = odeint(velocity, z, times, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        if not trajectory:
            return Solution(states[-1], nfe, z.new_empty(0), z.new_empty(0, *z.shape))
        return Solution(states[-1], nfe, times, states)


class _TorchSDEProblem(nn.Module):
    """The reverse SDE as torchsde wants it: 2-D state and increasing time u = 1 - t."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, reverse: ReverseProcess, shape: tuple[int, ...], stochasticity: float) -> None:
        super().__init__()
        self.reverse, self.shape, self.stochasticity = reverse, shape, stochasticity
        self.nfe = 0

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        z = y.unflatten(1, self.shape)
        return -self.reverse.drift(z, (1 - u).to(y).expand(len(y)), self.stochasticity).flatten(1)

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        g2 = self.reverse.g2((1 - u).to(y).expand(len(y)))
        return self.stochasticity * g2.sqrt()[:, None].expand_as(y)


class TorchSDE(Solver):
    """The SDE by torchsde: its methods for additive noise, and a check of ours by another implementation.

    torchsde draws the noise of a batch from one seed; of several generators, the first sample's gives it.

    Args:
        nfe: number of function evaluations; torchsde spends one of them on checking shapes.
        method: torchsde's name of an Ito method: ``euler``, ``milstein`` (1 evaluation per step), or ``srk`` (10, of strong
            order 1.5).
        stochasticity: eta, between the ODE (0) and the trained SDE (1).
    """

    _evaluations_per_step: ClassVar = {"euler": 1, "milstein": 1, "srk": 10}

    def __init__(self, nfe: int = 100, method: str = "euler", stochasticity: float = 1.0) -> None:
        if method not in self._evaluations_per_step:
            raise ConfigError(f"TorchSDE.method={method!r}: choose from {', '.join(self._evaluations_per_step)}")
        self.steps = _check_budget(nfe - 1, self._evaluations_per_step[method])
        self.nfe, self.method, self.stochasticity = nfe, method, _check_stochasticity(stochasticity)

    @torch.no_grad()
    def solve(self, reverse: ReverseProcess, z: Tensor, generator: Generators = None, trajectory: bool = False) -> Solution:
        import torchsde  # imports scipy: not at start-up

        problem = _TorchSDEProblem(reverse, tuple(z.shape[1:]), self.stochasticity)
        y = z.flatten(1)
        step = (1 + 1e-4) / self.steps  # rounding would add a step to equal ones; so the last is a trifle shorter
        first = generator if generator is None or isinstance(generator, torch.Generator) else generator[0]
        seed = int(torch.randint(2**31, (1,), generator=first))  # torchsde draws from numpy, seeded here
        # without dt the interval tree is queried at arbitrary points, which is slow
        brownian = torchsde.BrownianInterval(
            0.0,
            1.0,
            size=tuple(y.shape),
            dtype=y.dtype,
            device=y.device,
            entropy=seed,
            dt=step,
            levy_area_approximation="space-time" if self.method == "srk" else "none",
        )
        times = torch.linspace(0, 1, self.steps + 1 if trajectory else 2, dtype=torch.float64).to(y)
        solve: Callable[..., Any] = torchsde.sdeint
        states = solve(problem, y, times, bm=brownian, method=self.method, dt=step)
        states = states.unflatten(2, z.shape[1:])
        if not trajectory:
            return Solution(states[-1], problem.nfe, z.new_empty(0), z.new_empty(0, *z.shape))
        return Solution(states[-1], problem.nfe, 1 - times, states)


def _check_stochasticity(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f"stochasticity={value} must be 0 (ODE), 1 (the trained SDE) or another value that is not negative"
        )
    return value
