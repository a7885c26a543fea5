"""The bound: exactly zero where it must be, closed form on Gaussian data, discrete time against continuous time."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical

from conftest import PROCESSES, Known, batch, data_for, gaussian_data_model, perturb, small_mlp, small_network
from nfdm_lightning.bound import (
    BoundTerms,
    bits_per_dim,
    diffusion_loss,
    indexed_draws,
    random_draws,
    variational_bound,
)
from nfdm_lightning.decoder import DiscreteDecoder, GaussianDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.processes import NDM, NFDM, Cosine, Gaussian, LinearFlow, VariancePreserving
from nfdm_lightning.processes.base import expand_as_event, sum_event
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.time_sampling import low_discrepancy_times
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility, Volatility


class Scaled(Volatility):
    """The reference times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, t: Tensor, reference_g2: Tensor) -> Tensor:
        return self.factor * reference_g2


def exact_terms(reverse: ReverseProcess, std: float, decoder: GaussianDecoder, cells: int = 2000) -> dict[str, float]:
    """Expected terms for one-dimensional data N(0, std^2), without sampling.

    Each term is a quadratic in (x, eps), for which a 3x3 Gauss-Hermite rule is exact; in t the midpoint rule, on a grid that
    is finer towards the data, t = (exp(9 u) - 1) / (exp(9) - 1).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = [(a * std, b, u * v) for (a, u), (b, v) in itertools.product(zip(nodes, weights, strict=True), repeat=2)]
    x, eps, weight = (torch.tensor(column) for column in zip(*grid, strict=True))
    weight = weight / weight.sum()
    x, eps = x[:, None], eps[:, None]
    u = (torch.arange(cells) + 0.5) / cells
    times, slope = torch.expm1(9 * u) / math.expm1(9), 9 * torch.exp(9 * u) / math.expm1(9)
    with torch.no_grad():
        alpha, sigma = (value[0] for value in reverse.process.reference(torch.zeros(1)))
        losses, _ = diffusion_loss(reverse, x.repeat(cells, 1), times.repeat_interleave(9), eps.repeat(cells, 1))
        diffusion = (losses.unflatten(0, (cells, 9)) @ weight * slope).mean()
        reconstruction = -decoder.log_prob(x, reverse.process.start(eps, x), alpha, sigma) @ weight
        prior = reverse.process.prior_kl(eps, x) @ weight
    return {"reconstruction": reconstruction.item(), "diffusion": diffusion.item(), "prior": prior.item()}


def entropy(std: float) -> float:
    return 0.5 * math.log(2 * math.pi * math.e * std**2)


def test_diffusion_loss_is_zero_where_the_prediction_is_right(process, shape):
    eps, t, target = batch(shape)
    x = data_for(process, target)
    for volatility in (MatchedVolatility(), LearnedVolatility()):
        perturb(volatility)
        right, wrong = (
            diffusion_loss(ReverseProcess(process, Known(shape, known), volatility).given(process.split(x)[1]), x, t, eps)[0]
            for known in (target, target + 0.1)
        )
        assert right.shape == (4,)
        assert right.max() < 1e-15 * wrong.min()


@pytest.mark.parametrize("name", ["vp", "fm", "cosine"])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_bound_is_tight_on_gaussian_data(name, std):
    """Above the entropy, and within 0.01 nats of it at the optimum: matched g, exact predictor."""
    schedule = {"vp": VariancePreserving, "fm": partial(LinearFlow, 1e-3), "cosine": partial(Cosine, 1e-3)}[name]
    terms = exact_terms(gaussian_data_model(Gaussian((1,), schedule=schedule), std), std, GaussianDecoder())
    gap = sum(terms.values()) - entropy(std)
    assert 0 <= gap < 0.01


def test_bound_of_the_fixed_process_of_nfdm_is_tight_on_gaussian_data():
    process = NFDM((1,), network=small_mlp, delta=1e-3)
    terms = exact_terms(gaussian_data_model(process, 1.5), 1.5, GaussianDecoder())
    assert terms["prior"] == 0
    assert 0 <= sum(terms.values()) - entropy(1.5) < 0.01


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_another_volatility_costs_what_theory_says(factor):
    """At a fixed process the diffusion loss of r times the optimal g^2 is (r + 1/r + 2) / 4 times the optimum."""
    process = Gaussian((1,))
    best = exact_terms(gaussian_data_model(process, 1.0), 1.0, GaussianDecoder())
    other = exact_terms(gaussian_data_model(process, 1.0, Scaled(factor)), 1.0, GaussianDecoder())
    assert other["diffusion"] / best["diffusion"] == pytest.approx((factor + 1 / factor + 2) / 4, rel=1e-6)


def test_a_worse_predictor_costs_more():
    good = exact_terms(gaussian_data_model(Gaussian((1,)), 1.0), 1.0, GaussianDecoder())
    bad = exact_terms(gaussian_data_model(Gaussian((1,)), 0.6), 1.0, GaussianDecoder())
    assert bad["diffusion"] > good["diffusion"] + 0.05


def test_diffusion_loss_of_vp_is_the_loss_of_vdm():
    """VDM: half the slope of gamma times |eps - eps_hat|^2, written independently of velocity, score and g."""
    process, (eps, t, x) = Gaussian((2, 4, 4)), batch((2, 4, 4))
    x_hat = 0.7 * x + 0.1
    reverse = ReverseProcess(process, Known((2, 4, 4), x_hat), MatchedVolatility())
    gamma = expand_as_event(-13.3 + 18.3 * t, x)
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    eps_hat = (alpha * x + sigma * eps - alpha * x_hat) / sigma
    torch.testing.assert_close(diffusion_loss(reverse, x, t, eps)[0], 0.5 * 18.3 * sum_event((eps - eps_hat) ** 2))


def test_volatility_of_least_loss():
    """At a fixed t the best scalar is g^2 = 2 |df| / |ds|, for a learned process too."""
    process, (eps, t, x) = PROCESSES["nfdm"]((3,)), batch((3,))
    perturb(process)
    x_hat = 0.8 * x
    z = process.transform(eps, t, x)
    with torch.no_grad():
        at_x, at_x_hat = process.path_at(z, t, x), process.path_at(z, t, x_hat)
        df, ds = sum_event((at_x.velocity - at_x_hat.velocity) ** 2), sum_event((at_x.score - at_x_hat.score) ** 2)
        best = 2 * (df / ds).sqrt()

        def loss(factor: float) -> Tensor:
            volatility = Scaled(factor)
            volatility.forward = lambda t, reference: factor * best  # type: ignore[method-assign]
            return diffusion_loss(ReverseProcess(process, Known((3,), x_hat), volatility), x, t, eps)[0]

        assert (loss(1.0) < loss(0.9)).all()
        assert (loss(1.0) < loss(1.1)).all()


@pytest.mark.parametrize("name", [name for name in PROCESSES if "flow" not in name])
def test_discrete_time_kl_tends_to_the_continuous_loss(name):
    """For every affine process and a volatility that is not the reference: the discrete refresh has the rate g^2 / std^2."""
    process, (eps, t, x) = PROCESSES[name]((3,)), batch((3,))
    perturb(process)
    target, source = process.split(x := data_for(process, x))
    volatility = LearnedVolatility()
    perturb(volatility)
    reverse = ReverseProcess(process, Known((3,), 0.8 * target + 0.1), volatility).given(source)
    with torch.no_grad():
        limit, _ = diffusion_loss(reverse, x, t, eps)
        z = process.transform(eps, t, x)

        def divergence(s):
            ends = [process.step_moments(t, s, data) for data in (x, reverse.x_hat(z, t))]
            return process.posterior_kl(z, t, s, *ends, reverse.g2(t), reverse.g2(s))

        errors = [(steps * divergence(t - 1 / steps) - limit).abs().max().item() for steps in (100, 1000, 10_000, 100_000)]
    assert errors[-1] < 1e-3 * limit.max().item()
    for coarse, fine in itertools.pairwise(errors):
        assert fine < 0.2 * coarse  # first order in 1 / T


def test_discrete_posterior_is_that_of_bayes():
    """Drawing z_t, then z_s from the posterior, must give the mean, variance and covariance of the joint law."""
    process, x = NDM((1,), network=small_network), torch.tensor([[0.7]])
    perturb(process)
    s, t = torch.tensor([0.3]), torch.tensor([0.6])
    with torch.no_grad():
        (mean_s, std_s), (mean_t, std_t) = process.moments(s, x), process.moments(t, x)
        g2 = process.reference_g2(t), process.reference_g2(s)
        ends = process.step_moments(t, s, x)
        zero, std = process.posterior(mean_t, t, s, ends, *g2)
        one, _ = process.posterior(mean_t + 1, t, s, ends, *g2)
        variance = std**2
        slope = one - zero
        torch.testing.assert_close(zero, mean_s)
        torch.testing.assert_close(slope**2 * std_t**2 + variance, std_s**2)
        # the forward chain is z_t = (alpha_t / alpha_s) z_s + ..., so the covariance is (alpha_t / alpha_s) sigma_s^2
        ratio = process.schedule(t)[0] / process.schedule(s)[0]
        torch.testing.assert_close(slope * std_t**2, ratio * std_s**2)


@pytest.mark.parametrize("levels", [2, 17])
def test_discrete_decoder_is_a_distribution_over_levels(levels):
    decoder = DiscreteDecoder(levels)
    grid = torch.linspace(-1, 1, levels)
    alpha, sigma = torch.tensor(0.9), torch.tensor(0.2)
    z = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    log_probs = torch.stack([decoder.log_prob(level.expand(5, 1), z, alpha, sigma) for level in grid], 1)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(5))
    # proportional to q(z_0 | x = level)
    log_q = -0.5 * ((z - alpha * grid) / sigma) ** 2
    torch.testing.assert_close(log_probs, Categorical(logits=log_q).logits)
    assert torch.equal(decoder.mode(z, alpha)[:, 0], grid[log_probs.argmax(1)])


def test_discrete_decoder_sums_over_dimensions():
    decoder, alpha, sigma = DiscreteDecoder(5), torch.tensor(1.0), torch.tensor(0.3)
    x = torch.tensor([[[[-1.0, 0.5]]]])
    z = torch.tensor([[[[-0.8, 0.1]]]])
    parts = [decoder.log_prob(x[..., i : i + 1], z[..., i : i + 1], alpha, sigma) for i in (0, 1)]
    torch.testing.assert_close(decoder.log_prob(x, z, alpha, sigma), parts[0] + parts[1])


def test_gaussian_decoder_is_the_normal_density():
    x, z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.1)
    for std in (None, 0.05):
        expected = torch.distributions.Normal(z / alpha, std or sigma / alpha).log_prob(x).sum(1)
        torch.testing.assert_close(GaussianDecoder(std).log_prob(x, z, alpha, sigma), expected)
    with pytest.raises(ConfigError):
        GaussianDecoder(0.0)
    with pytest.raises(ConfigError):
        DiscreteDecoder(1)


def test_discrete_bound_is_above_the_entropy_of_levels():
    """Independent pixels over 4 levels with known probabilities: the bound in nats is a bound for discrete data too."""
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    truth = Categorical(probabilities)
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 4)[truth.sample((20_000, 2))]
    from nfdm_lightning.predictor import DataSpec, LevelPrediction

    predictor = LevelPrediction(DataSpec((2,), 4, 0.7), small_mlp)
    with torch.no_grad():  # the network's output is the log of the marginal probabilities: the exact posterior mean
        predictor.network.out.bias.copy_(probabilities.log().repeat_interleave(2))
    reverse = ReverseProcess(Gaussian((2,)), predictor, MatchedVolatility())
    with torch.no_grad():
        terms = variational_bound(reverse, DiscreteDecoder(4), x, random_draws(x))
    error = terms.nats.std().item() / len(x) ** 0.5
    gap = terms.nats.mean().item() - 2 * truth.entropy().item()
    assert -4 * error < gap < 4 * error + 0.01


def test_bound_terms_add_up_and_are_per_sample(process, shape):
    _, _, x = batch(shape)
    reverse = ReverseProcess(process, Known(shape, 0.5 * x), LearnedVolatility())
    draws = random_draws(x, torch.Generator().manual_seed(0))
    terms = variational_bound(reverse, GaussianDecoder(0.01), data_for(process, x), draws)
    assert isinstance(terms, BoundTerms)
    torch.testing.assert_close(terms.z, process.transform(draws.eps, draws.t, data_for(process, x)))
    for value in (*terms.named().values(), terms.nats, terms.t):
        assert value.shape == (4,)
    torch.testing.assert_close(sum(terms.named().values()), terms.nats)


def test_reconstruction_and_prior_of_nfdm_have_no_gradient():
    process, (_, _, x) = PROCESSES["nfdm"]((3,)), batch((3,))
    perturb(process)
    terms = variational_bound(
        ReverseProcess(process, Known((3,), 0.5 * x), LearnedVolatility()), GaussianDecoder(), x, random_draws(x)
    )
    assert not terms.reconstruction.requires_grad
    assert not terms.prior.requires_grad
    assert terms.diffusion.requires_grad


def test_sum_over_dimensions_not_mean():
    """Twice the dimensions of independent data, twice the nats."""
    std, number = 1.0, 4000
    values = []
    for dimensions in (1, 4):
        reverse = gaussian_data_model(Gaussian((dimensions,)), std)
        x = std * torch.randn(number, dimensions, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            terms = variational_bound(reverse, GaussianDecoder(), x, random_draws(x, torch.Generator().manual_seed(1)))
        values.append((terms.diffusion.mean() / dimensions, terms.reconstruction.mean() / dimensions))
    torch.testing.assert_close(torch.stack(values[0]), torch.stack(values[1]), rtol=0.05, atol=0)


def test_bits_per_dim():
    assert bits_per_dim(torch.tensor(64 * math.log(2)), 64).item() == pytest.approx(1.0)


def test_low_discrepancy_times_fill_every_cell_in_random_order():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([low_discrepancy_times(64, torch.zeros(1), generator) for _ in range(200)])
    assert ((draws >= 0) & (draws < 1)).all()
    shifted = (draws.sort(1).values - draws.min(1, keepdim=True).values) * 64
    torch.testing.assert_close(shifted, torch.arange(64.0).expand(200, 64), rtol=0, atol=1e-6)
    assert stats.kstest(draws[:, 3].numpy(), "uniform").pvalue > 1e-3  # one place in the batch sees all times


@pytest.mark.parametrize("event", [(2,), (2, 3, 3), (1, 8, 8)])
def test_indexed_draws_depend_on_the_index_alone(event):
    x = torch.zeros(6, *event)
    index = torch.tensor([0, 1, 2, 30, 31, 1_000_000])
    whole = indexed_draws(x, index, 1, 4, seed=7)
    for rows in (slice(2, 4), slice(3, 4)):  # a batch of one has another memory layout
        part = indexed_draws(x[rows], index[rows], 1, 4, seed=7)
        for name in ("t", "eps", "eps_0"):
            assert torch.equal(getattr(whole, name)[rows], getattr(part, name))
    assert not torch.equal(whole.eps, whole.eps_0)
    for other in (indexed_draws(x, index, 2, 4, seed=7), indexed_draws(x, index, 1, 4, seed=8)):
        assert not torch.isclose(other.t, whole.t).any()
        assert not torch.isclose(other.eps, whole.eps).any()


def test_indexed_draws_are_standard_normal_and_stratified():
    x, index = torch.zeros(2000, 4), torch.arange(2000)
    draws = [indexed_draws(x, index, k, 5) for k in range(5)]
    times = torch.stack([draw.t for draw in draws])
    assert stats.kstest(times.flatten().numpy(), "uniform").pvalue > 1e-3
    gaps = times.sort(0).values.diff(dim=0)
    torch.testing.assert_close(gaps, torch.full((4, 2000), 0.2))
    noise = torch.cat([torch.cat([draw.eps, draw.eps_0]) for draw in draws])
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert len(noise.flatten().unique()) == noise.numel()
    correlation = torch.corrcoef(torch.stack([draw.eps.flatten() for draw in draws] + [draws[0].eps_0.flatten()]))
    assert (correlation - torch.eye(6)).abs().max() < 0.05
