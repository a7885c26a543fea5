"""How far the marginals of the model's SDE and of its ODE are apart, by a two-sample statistic on samples."""

from collections.abc import Sequence
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
        distance: :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|` over :math:`2 E|X - Y|`: 0 for equal distributions, at most 1.
        p_value: share of permutations of the two samples that are at least as far apart.
    """

    distance: float
    p_value: float


def energy_test(a: Tensor, b: Tensor, generator: torch.Generator, permutations: int = 300) -> EnergyTest:
    """Compares two samples, each (N, *event), by a permutation test of their energy distance.

    Args:
        a: a sample.
        b: a second one, of the same size.
        generator: CPU generator of the permutations.
        permutations: how many; the p-value is at least 1 / (permutations + 1).
    """
    both = torch.cat([a.flatten(1), b.flatten(1)]).double()
    distances = torch.cdist(both, both)
    number = len(a)
    sign = torch.ones(2 * number, dtype=torch.float64, device=both.device)
    sign[number:] = -1.0
    # with signs s, -s^T D s = 2 sum|a - b| - sum|a - a'| - sum|b - b'|
    orders = torch.stack([torch.randperm(2 * number, generator=generator) for _ in range(permutations)])
    signs = torch.cat([sign[None], sign[orders.to(sign.device)]])
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
        nfe: evaluations for each, by Ancestral and by Heun.
        times: number of times at which they are compared, from 0 on, equally spaced below 1.
    """

    def __init__(self, samples: int = 256, nfe: int = 100, times: int = 5) -> None:
        if samples < 0 or samples == 1 or nfe < 2 or times < 1:
            raise ConfigError(
                f"Consistency: samples={samples} must be 0 or at least 2, nfe={nfe} at least 2 and times={times} at least 1"
            )
        self.samples, self.nfe, self.times = samples, nfe, times

    @torch.no_grad()
    def evaluate(self, reverse: ReverseProcess, seed: int = 0) -> list[MarginalGap]:
        """Returns the differences, from t = 0 on.

        Args:
            reverse: the generative model; a bridge, given ``samples`` sources.
            seed: of the samples: independent ones for the two.
        """
        states: list[Sequence[Tensor]] = []
        for stream, solver in ((_SDE, Ancestral(self.nfe)), (_ODE, Heun(self.nfe))):
            generator = torch.Generator().manual_seed(mixed_seed(stream, seed))
            solution = solver.solve(reverse, reverse.prior(self.samples, generator), generator, trajectory=True)
            steps = len(solution.times) - 1
            states.append([solution.trajectory[steps - round(k / self.times * steps)] for k in range(self.times)])
        generator = torch.Generator().manual_seed(mixed_seed(_PERMUTATIONS, seed))
        return [
            MarginalGap(k / self.times, energy_test(sde, ode, generator))
            for k, (sde, ode) in enumerate(zip(*states, strict=True))
        ]
