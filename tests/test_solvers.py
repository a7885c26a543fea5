"""Samplers: order of convergence, marginals and counts, on Gaussian data, where everything is closed form."""

import itertools
import math
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor

from conftest import PROCESSES, gaussian_data_model, perturb, small_mlp
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.predictor import DataSpec, XPrediction
from nfdm_lightning.processes import NFDM, Cosine, Gaussian, LinearFlow, VariancePreserving
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.solvers import Adaptive, Ancestral, Euler, EulerMaruyama, Heun, Solver, TorchSDE
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility

STD = 1.5
MILD = partial(VariancePreserving, gamma_min=-5.0, gamma_max=3.0)


def model(shape: tuple[int, ...] = (1,)) -> ReverseProcess:
    return gaussian_data_model(Gaussian(shape, schedule=MILD), STD)


def exact_end(reverse: ReverseProcess, z: Tensor) -> Tensor:
    """The ODE keeps z / std(z_t) for Gaussian data."""
    (alpha, sigma) = reverse.process.reference(torch.tensor([0.0, 1.0]))
    std = (alpha**2 * STD**2 + sigma**2).sqrt()
    return z * std[0] / std[1]


def order(errors: list[float], counts: list[int]) -> float:
    slope, *_ = stats.linregress([math.log(count) for count in counts], [math.log(error) for error in errors])
    return -slope


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Euler, 1.0),
        (Heun, 2.0),
        (partial(Ancestral, stochasticity=0.0), 1.0),
        (partial(EulerMaruyama, stochasticity=0.0), 1.0),
        (partial(TorchSDE, stochasticity=0.0), 1.0),
        (partial(TorchSDE, stochasticity=0.0, method="milstein"), 1.0),
    ],
)
def test_order_of_convergence_of_the_ode(build, expected):
    reverse, z = model(), torch.tensor([[1.0], [-0.3]])
    counts = [64, 128, 256, 512]
    errors = [(build(count).solve(reverse, z).z - exact_end(reverse, z)).abs().max().item() for count in counts]
    assert order(errors, counts) == pytest.approx(expected, abs=0.15)


class _Path:
    """Noise of one Brownian path: increments of the finest grid, summed over the steps of a coarser one."""

    def __init__(self, fine: Tensor, steps: int) -> None:
        sums = fine.unflatten(0, (steps, -1)).sum(1)
        self.increments = iter(sums / (len(fine) // steps) ** 0.5)

    def like(self, z: Tensor) -> Tensor:
        return next(self.increments)


@pytest.mark.parametrize("build", [EulerMaruyama, Ancestral])
def test_strong_order_of_convergence_of_the_sde(build, monkeypatch):
    """Additive noise: strong order 1, against the finest grid on the same Brownian paths."""
    reverse, finest = model(), 4096
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(finest, 200, 1, generator=generator)
    z = torch.randn(200, 1, generator=generator)

    def end(steps: int) -> Tensor:
        monkeypatch.setattr("nfdm_lightning.solvers._Noise", lambda _: _Path(fine, steps))
        return build(steps).solve(reverse, z).z

    truth, counts = end(finest), [32, 64, 128, 256]
    errors = [(end(count) - truth).pow(2).mean().sqrt().item() for count in counts]
    assert order(errors, counts) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    "solver",
    [
        EulerMaruyama(400),
        EulerMaruyama(400, stochasticity=0.5),
        EulerMaruyama(400, stochasticity=1.5),
        Ancestral(400),
        Ancestral(400, stochasticity=0.5),
        Ancestral(400, stochasticity=0.0),
        TorchSDE(400),
        TorchSDE(401, method="srk"),
        TorchSDE(400, stochasticity=0.5),
        Euler(400),
        Heun(100),
        Adaptive(),
    ],
    ids=lambda solver: f"{type(solver).__name__}-{getattr(solver, 'stochasticity', '')}",
)
def test_every_member_of_the_family_has_the_marginals_of_the_data(solver):
    """The dial between ODE and SDE, and beyond: N(0, alpha_0^2 STD^2 + sigma_0^2) at t = 0."""
    reverse = model()
    z = torch.randn(8000, 1, generator=torch.Generator().manual_seed(0))
    end = solver.solve(reverse, z, torch.Generator().manual_seed(1)).z
    alpha, sigma = (value.item() for value in reverse.process.reference(torch.zeros(1)))
    alpha_1, sigma_1 = (value.item() for value in reverse.process.reference(torch.ones(1)))
    # z_1 is drawn from N(0, 1), which is not quite alpha_1 x + sigma_1 eps: the ODE keeps the ratio, the SDE forgets it
    assert alpha_1 * STD < 0.4
    scale = (alpha**2 * STD**2 + sigma**2) ** 0.5
    start = (alpha_1**2 * STD**2 + sigma_1**2) ** 0.5
    slack = abs(1 - 1 / start)
    assert end.std().item() == pytest.approx(scale, rel=0.025 + slack)
    assert stats.kstest((end[:, 0] / end.std()).numpy(), "norm").pvalue > 1e-3


def test_stochasticity_is_the_share_of_fresh_noise():
    """How much of z_1 is remembered falls with the dial; the SDE's share is that of the linear SDE in closed form."""
    reverse = model()
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    memory = []
    for stochasticity in (0.0, 0.5, 1.0):
        end = EulerMaruyama(400, stochasticity).solve(reverse, z, torch.Generator().manual_seed(1)).z
        memory.append(torch.corrcoef(torch.stack([z[:, 0], end[:, 0]]))[0, 1].item())
    assert memory[0] == pytest.approx(1.0, abs=1e-9)
    t = torch.linspace(0, 1, 4001)
    alpha, sigma = reverse.process.reference(t)
    rate = reverse.g2(t) / (alpha**2 * STD**2 + sigma**2)
    exponent = torch.trapezoid(rate, t).item() / 2
    for stochasticity, share in zip((0.5, 1.0), memory[1:], strict=True):
        assert share == pytest.approx(math.exp(-(stochasticity**2) * exponent), abs=0.05)


@pytest.mark.parametrize("schedule", [VariancePreserving, LinearFlow, Cosine])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_ancestral_is_exact_for_a_single_datum(schedule, steps):
    """If the data are one point, any number of steps reaches q(z_0 | x), however large g is."""
    process = Gaussian((1,), schedule=schedule)
    reverse = gaussian_data_model(process, 1e-9)  # the posterior mean is 0 for data concentrated at 0
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    end = Ancestral(steps).solve(reverse, z, torch.Generator().manual_seed(1)).z
    assert end.std().item() == pytest.approx(process.reference(torch.zeros(1))[1].item(), rel=0.03)


def test_ancestral_spreads_too_little_in_few_steps_and_converges():
    reverse = model()
    z = torch.randn(8000, 1, generator=torch.Generator().manual_seed(0))
    spread = [Ancestral(nfe).solve(reverse, z, torch.Generator().manual_seed(1)).z.std().item() / STD for nfe in (5, 20, 80)]
    assert spread[0] < spread[1] < spread[2] < 1.03
    assert spread[0] < 0.8
    assert spread[2] > 0.93


def test_ancestral_without_noise_is_ddim():
    """z_s = alpha_s x_hat + sigma_s (z_t - alpha_t x_hat) / sigma_t, written out."""
    reverse = model((3,))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = z
    times = torch.linspace(1, 0, 6)
    with torch.no_grad():
        for t, s in itertools.pairwise(times):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = reverse.process.reference(t[None]), reverse.process.reference(s[None])
            x_hat = reverse.x_hat(expected, t.expand(4))
            expected = alpha_s * x_hat + sigma_s * (expected - alpha_t * x_hat) / sigma_t
    torch.testing.assert_close(Ancestral(5, stochasticity=0.0).solve(reverse, z).z, expected)


@pytest.mark.parametrize("name", ["ndm", "nfdm", "gaussian_learned"])
def test_solvers_agree_on_a_learned_model(name):
    """Different methods, one ODE, on a model that is no longer Gaussian."""
    torch.manual_seed(0)
    process = PROCESSES[name]((2,))
    perturb(process, 0.05)
    predictor = XPrediction(DataSpec((2,)), small_mlp)
    perturb(predictor, 0.05)
    reverse = ReverseProcess(process, predictor, MatchedVolatility())
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    truth = Adaptive(1e-8, 1e-8).solve(reverse, z).z
    errors = {
        solver: [(build(count).solve(reverse, z).z - truth).abs().max().item() for count in (100, 200)]
        for solver, build in (("euler", Euler), ("heun", Heun), ("ddim", partial(Ancestral, stochasticity=0.0)))
    }
    for coarse, fine in errors.values():
        assert fine < 0.6 * coarse
        assert fine < 0.1
    assert errors["heun"][1] < min(0.4 * errors["heun"][0], errors["euler"][1])


@pytest.mark.parametrize("shape", [(2,), (2, 4, 4)])
@pytest.mark.parametrize(
    "solver",
    [
        Euler(12),
        Heun(12),
        EulerMaruyama(12),
        Ancestral(12),
        TorchSDE(12),
        TorchSDE(11, method="srk"),
        TorchSDE(102, method="srk"),
        Adaptive(1e-3, 1e-3),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_counts_trajectories_and_seeds(shape, solver: Solver):
    reverse = model(shape)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    reverse.predictor.register_forward_hook(count)
    z = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    solution = solver.solve(reverse, z, torch.Generator().manual_seed(1))
    assert solution.nfe == calls
    if not isinstance(solver, Adaptive):
        assert solution.nfe <= solver.nfe < solution.nfe + 2
    assert solution.z.shape == z.shape
    assert len(solution.trajectory) == len(solution.times) == 0
    again = solver.solve(reverse, z, torch.Generator().manual_seed(1), trajectory=True)
    torch.testing.assert_close(again.z, solution.z, rtol=1e-3, atol=1e-3)
    assert again.trajectory.shape == (len(again.times), *z.shape)
    assert again.times[0] == 1
    assert abs(again.times[-1]) < 1e-12
    torch.testing.assert_close(again.trajectory[0], z)
    torch.testing.assert_close(again.trajectory[-1], again.z)


def test_no_graph_is_kept():
    reverse = model()
    assert not Euler(2).solve(reverse, torch.ones(1, 1)).z.requires_grad


def test_few_steps_of_the_sde_stay_finite_at_the_limit_of_the_learned_volatility():
    """A g at its upper bound everywhere: Ancestral does not care, where Euler-Maruyama in few steps would explode."""
    volatility = LearnedVolatility()
    with torch.no_grad():
        volatility.out.bias.fill_(100.0)
    reverse = ReverseProcess(NFDM((2,), network=small_mlp), XPrediction(DataSpec((2,), None, STD), small_mlp), volatility)
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    for nfe in (2, 10):
        assert Ancestral(nfe).solve(reverse, z, torch.Generator().manual_seed(1)).z.abs().max() < 5 * STD


@pytest.mark.parametrize(
    "build", [partial(Heun, 1), partial(Euler, 0), partial(EulerMaruyama, 5, -1.0), partial(TorchSDE, method="heun")]
)
def test_settings_that_cannot_work_are_refused(build):
    with pytest.raises(ConfigError):
        build()


class Still(ReverseProcess):
    """A velocity that is smooth on [0, 1], and known beyond its ends to no one."""

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        assert bool(((t >= 0) & (t <= 1)).all())
        return torch.exp(3 * t)[:, None] * torch.ones_like(z)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
def test_adaptive_steps_end_at_the_data(method):
    # a step beyond, where the time is cut off, leaves an error of its own however small the tolerance
    plain = model()
    reverse = Still(plain.process, plain.predictor, plain.volatility)
    end = Adaptive(1e-6, 1e-6, method).solve(reverse, torch.zeros(2, 1)).z
    assert torch.allclose(end, torch.full_like(end, -math.expm1(3) / 3), atol=2e-5)
