"""How far the marginals of the model's SDE and of its ODE are apart, by a two-sample statistic on samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfdm_lightning.errors import ConfigError
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.seeding import mixed_seed
from nfdm_lightning.solvers import Ancestral, Heun

_PERMUTATIONS, _SDE, _ODE = 0xE4E, 0x5DE, 0x0DE


@dataclass(frozen=True)
class EnergyTest:
    """The energy distance of two samples and what chance would make of it.

    Attributes:
        distance: :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|` over :math:`2 E|X - Y|`, at most 1; about 1 / N for N samples of
            equal distributions.
        p_value: share of permutations of the two samples that are at least as far apart.
    """

    distance: float
    p_value: float


def energy_test(
    a: Tensor, b: Tensor, generator: torch.Generator, permutations: int = 300, paired: bool = False
) -> EnergyTest:
    """Compares two samples, each (N, *event), by a permutation test of their energy distance.

    Args:
        a: a sample.
        b: a second one, of the same size.
        generator: CPU generator of the permutations.
        permutations: how many; the p-value is at least 1 / (permutations + 1).
        paired: whether a_i and b_i belong together, as samples given the same source: only these are then exchanged.
    """
    both = torch.cat([a.flatten(1), b.flatten(1)]).double()
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    number = len(a)
    sign = torch.ones(2 * number, dtype=torch.float64, device=both.device)
    sign[number:] = -1.0
    # with signs s, -s^T D s = 2 sum|a - b| - sum|a - a'| - sum|b - b'|
    if paired:
        swaps = (torch.rand(permutations, number, generator=generator) < 0.5).to(sign) * 2 - 1
        others = torch.cat([swaps, -swaps], 1)
    else:
        orders = torch.stack([torch.randperm(2 * number, generator=generator) for _ in range(permutations)])
        others = sign[orders.to(sign.device)]
    signs = torch.cat([sign[None], others])
    values = -((signs @ distances) * signs).sum(1)
    larger = int((values[1:] >= values[0]).sum())
    between = 2 * distances[:number, number:].sum().clamp_min(torch.finfo(torch.float64).tiny)
    return EnergyTest(float(values[0] / between), (larger + 1) / (permutations + 1))


@dataclass(frozen=True)
class MarginalGap:
    """The difference between the marginals of SDE and ODE at one time."""

    t: float
    test: EnergyTest


class Consistency:
    """Compares the marginals of the model's SDE and of its ODE along t.

    The bound is a statement about the SDE and the ODE likelihood one about the ODE: where their marginals differ, these are
    two models.

    Args:
        samples: samples of each; 0 leaves the comparison out.
        nfe: about how many evaluations for each, by Ancestral and by Heun: a multiple of twice ``times``.
        times: number of times at which they are compared, from 0 on, equally spaced below 1.
    """

    def __init__(self, samples: int = 256, nfe: int = 100, times: int = 5) -> None:
        if samples < 0 or samples == 1 or nfe < 2 or times < 1:
            raise ConfigError(
                f"Consistency: samples={samples} must be 0 or at least 2, nfe={nfe} at least 2 and times={times} at least 1"
            )
        self.samples, self.nfe, self.times = samples, nfe, times

    @torch.no_grad()
    def evaluate(self, reverse: ReverseProcess, seed: int = 0, batch_size: int = 64) -> list[MarginalGap]:
        """Returns the differences, from t = 0 on.

        Args:
            reverse: the generative model; given ``samples`` sources or labels, which both share, if it takes any.
            seed: of the samples: independent ones for the two.
            batch_size: samples drawn at a time.
        """
        given = (reverse.source, reverse.label)
        steps = 2 * self.times * max(1, round(self.nfe / 2 / self.times))  # of which every time is one, for Heun's half too
        states: list[Tensor] = []
        for stream, solver in ((_SDE, Ancestral(steps)), (_ODE, Heun(steps))):
            generator, parts = torch.Generator().manual_seed(mixed_seed(stream, seed)), []
            for begin in range(0, self.samples, batch_size):
                end = min(begin + batch_size, self.samples)
                source, label = (None if one is None else one[begin:end] for one in given)
                part = reverse.given(source, label)
                solution = solver.solve(part, part.prior(end - begin, generator), generator, trajectory=True)
                every = (len(solution.times) - 1) // self.times
                parts.append(solution.trajectory[every:].flip(0)[::every].cpu())  # t = 0, 1 / times, ...
            states.append(torch.cat(parts, 1))
        generator = torch.Generator().manual_seed(mixed_seed(_PERMUTATIONS, seed))
        paired = any(one is not None for one in given)
        return [
            MarginalGap(k / self.times, energy_test(sde, ode, generator, paired=paired))
            for k, (sde, ode) in enumerate(zip(*states, strict=True))
        ]
