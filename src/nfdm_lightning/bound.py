r"""The variational bound on -log p(x): three terms, all trained, in nats per sample.

.. math::
    \underbrace{-\mathbb E \log p(x \mid z_0)}_{\text{reconstruction}}
    + \underbrace{\mathbb E_t \frac{|b - \hat b|^2}{2 g^2}}_{\text{diffusion}}
    + \underbrace{KL(q(z_1 \mid x) \,\|\, \mathcal N(0, I))}_{\text{prior}},
    \qquad b = f - \tfrac12 g^2 s \text{ at } x, \quad \hat b \text{ at } \hat x(z_t, t)

(NFDM, arXiv 2404.12940, equation 10 and appendix A.) Without the first and the last term a learned process collapses.
In discrete time the diffusion term is a sum of T divergences instead (NDM, arXiv 2310.08337, section 3). For a bridge all
terms are given the source, and the bound is on -log p(x | source); given labels, it is on -log p(x | label).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nfdm_lightning.decoder import Decoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes.base import AffineProcess, expand_as_event, sum_event
from nfdm_lightning.reverse import ReverseProcess, drift
from nfdm_lightning.seeding import generators, standard_normal
from nfdm_lightning.time_sampling import LowDiscrepancyTimes, TimeSampler


@dataclass(frozen=True)
class BoundTerms:
    """The terms of the bound, each (B,) in nats, and where the diffusion term was drawn: times (B,), states (B, *event).

    ``weight`` is 1 / p(t), (B,), for times of density p: the diffusion term has it already, and the mean over a batch of
    anything else that depends on t and z needs it too.
    """

    reconstruction: Tensor
    diffusion: Tensor
    prior: Tensor
    t: Tensor
    z: Tensor
    weight: Tensor

    @property
    def nats(self) -> Tensor:
        """The bound on -log p(x), (B,)."""
        return self.reconstruction + self.diffusion + self.prior

    def detach(self) -> "BoundTerms":
        """The same values without their graph."""
        return BoundTerms(*(getattr(self, field.name).detach() for field in fields(self)))

    def named(self) -> dict[str, Tensor]:
        """The three terms by name."""
        return {"reconstruction": self.reconstruction, "diffusion": self.diffusion, "prior": self.prior}


def bits_per_dim(nats: Tensor, dimensions: int) -> Tensor:
    """Returns nats / (D ln 2)."""
    return nats / (dimensions * math.log(2))


def diffusion_loss(reverse: ReverseProcess, x: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`|b - \hat b|^2 / (2 g^2)` at the times t in nats, (B,), and the states z_t, (B, *event)."""
    g2 = reverse.g2(t)
    at_x = reverse.path(eps, t, x)
    at_x_hat = reverse.point(at_x.z, t)
    difference = drift(at_x, g2) - drift(at_x_hat, g2)
    return sum_event(difference**2 / (2 * expand_as_event(g2, difference))), at_x.z


def discrete_diffusion_loss(
    reverse: ReverseProcess, x: Tensor, t: Tensor, eps: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns :math:`T\; KL(q(z_s \mid z_t, x) \,\|\, q(z_s \mid z_t, \hat x))` in nats, (B,), with z_t and t.

    One term of the sum over the T steps of the grid, times T: t, uniform in [0, 1), is moved to the end of its step, and
    s = t - 1/T. Exact for the sampler ``Ancestral(nfe=T)``. (NDM, arXiv 2310.08337, section 3.)

    Raises:
        ConfigError: the process is not affine in the noise, so that the divergence has no closed form.
    """
    process = reverse.process
    if not isinstance(process, AffineProcess):
        raise ConfigError(
            f"discrete_steps={steps}: {type(process).__name__} is not affine in the noise, so its discrete-time divergence "
            "has no closed form; use continuous time (discrete_steps: null)"
        )
    index = (t * steps).floor().clamp(0, steps - 1)
    s, t = index / steps, (index + 1) / steps
    ends = reverse.ends(t, s, x)
    z = ends.mean_t + ends.std_t * eps
    ends_hat = reverse.ends(t, s, reverse.x_hat(z, t))
    return steps * process.posterior_kl(z, t, s, ends, ends_hat, reverse.g2(t), reverse.g2(s)), z, t


@dataclass(frozen=True)
class Draws:
    """The random numbers of one draw of the bound: times (B,), noise of the diffusion and of the reconstruction term.

    ``weight`` is 1 / p(t), (B,), for times of density p; None for uniform ones.
    """

    t: Tensor
    eps: Tensor
    eps_0: Tensor
    weight: Tensor | None = None


def random_draws(
    x: Tensor, generator: torch.Generator | None = None, times: TimeSampler | None = None, antithetic: bool = False
) -> Draws:
    """Returns the draws of one batch, the same on every device.

    Args:
        x: targets, (B, *event).
        generator: CPU generator; None is torch's global one.
        times: draws the times; None is :class:`LowDiscrepancyTimes`.
        antithetic: whether the second half of the batch has the noise of the first with the opposite sign.
    """
    t, weight = (times or LowDiscrepancyTimes()).draw(len(x), x, generator)
    eps, eps_0 = torch.randn((2, *x.shape), generator=generator, dtype=x.dtype).to(x.device)
    if antithetic:
        half = len(x) // 2
        eps[len(x) - half :] = -eps[:half]
    return Draws(t, eps, eps_0, weight)


def indexed_draws(
    x: Tensor,
    index: Tensor,
    draw: int,
    draws: int,
    seed: int = 0,
    antithetic: bool = False,
    times: TimeSampler | None = None,
) -> Draws:
    r"""Returns draw number ``draw`` of ``draws`` for samples of known index in their data set.

    Each sample's numbers depend on (seed, index, draw) alone, so an evaluation is the same however the data are split over
    batches and processes. Times are stratified over the draws of a sample and rotated by the golden ratio between samples,
    :math:`t = (u + i \varphi + k / K) \bmod 1`, each uniform.

    Args:
        x: targets, (B, *event).
        index: place of each sample in the data set, (B,).
        draw: k, from 0.
        draws: K.
        seed: of all draws.
        antithetic: whether draws 2j and 2j + 1 of a sample have noise of opposite sign in the diffusion term. The noise of
            the reconstruction term, which is near even in it, stays independent.
        times: gives the times the density of this sampler; None is a uniform one.
    """
    golden = (math.sqrt(5) - 1) / 2
    u = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = (u + index.cpu().double() * golden + draw / draws) % 1
    noise = standard_normal((len(x), 2, *x.shape[1:]), x.dtype, generators(index, seed, draw)).to(x.device)
    eps, eps_0 = noise.unbind(1)
    if antithetic and draw % 2:
        eps = -indexed_draws(x, index, draw - 1, draws, seed).eps
    placed, weight = (times or LowDiscrepancyTimes()).place(t.to(x))
    return Draws(placed, eps, eps_0, weight)


def averaged(bound: Callable[[Draws], BoundTerms], draws: Iterable[Draws]) -> dict[str, Tensor]:
    """Returns the mean of each term over several draws of the bound of the same samples, (B,) in nats, by name."""
    total: dict[str, Tensor] = {}
    count = 0
    for one in draws:
        count += 1
        for name, value in bound(one).named().items():
            total[name] = total[name] + value if name in total else value
    return {name: value / count for name, value in total.items()}


def variational_bound(
    reverse: ReverseProcess,
    decoder: Decoder,
    x: Tensor,
    draws: Draws,
    discrete_steps: int | None = None,
    label: Tensor | None = None,
) -> BoundTerms:
    """Returns one draw of the three terms for each sample.

    Args:
        reverse: the generative model with its forward process.
        decoder: p(x | z_0).
        x: data, (B, *event), or pairs of data and source, (B, 2, *event), for a bridge.
        draws: the random numbers.
        discrete_steps: T for the discrete-time bound; None is continuous time.
        label: labels, (B,), for the bound on -log p(x | label); None is no label.
    """
    target, source = reverse.process.split(x)
    reverse = reverse.given(source, label)
    process = reverse.process
    alpha, sigma = process.reference_at_data(x)
    t = draws.t
    weight = torch.ones_like(t) if draws.weight is None else draws.weight
    if discrete_steps is None:
        diffusion, z = diffusion_loss(reverse, x, draws.t, draws.eps)
    else:
        diffusion, z, t = discrete_diffusion_loss(reverse, x, draws.t, draws.eps, discrete_steps)
    return BoundTerms(
        reconstruction=-decoder.log_prob(target, process.start(draws.eps_0, x), alpha, sigma),
        diffusion=weight * diffusion,
        prior=process.prior_kl(draws.eps_0, x),
        t=t,
        z=z,
        weight=weight,
    )
