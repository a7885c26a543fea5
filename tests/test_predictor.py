"""Predictors and the volatility: right where they must be, whatever the network says."""

import pytest
import torch
from torch import Tensor, nn

from conftest import batch, perturb, small_mlp, small_network
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.predictor import DataSpec, EpsPrediction, LevelPrediction, VPrediction, XPrediction
from nfdm_lightning.processes import Cosine, LinearFlow, VariancePreserving
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility

PREDICTORS = (XPrediction, EpsPrediction, VPrediction, LevelPrediction)


class Answer(nn.Module):
    """A network that answers what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize("schedule", [VariancePreserving(), LinearFlow(), Cosine()])
@pytest.mark.parametrize("kind", [EpsPrediction, VPrediction, XPrediction])
def test_the_right_network_output_gives_the_data(kind, schedule):
    eps, t, x = batch((3,))
    alpha, sigma = schedule(t)
    a, s = alpha[:, None], sigma[:, None]
    std = 1.7
    variance = a**2 * std**2 + s**2
    target = {
        EpsPrediction: eps,
        VPrediction: a * eps - s * x,
        XPrediction: (x - a * std**2 / variance * (a * x + s * eps)) * variance.sqrt() / (s * std),
    }[kind]
    predictor = kind(DataSpec((3,), None, std), lambda inp, out: Answer(target))
    torch.testing.assert_close(predictor(a * x + s * eps, t, alpha, sigma), x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_prediction_is_right_for_free_at_the_data_end(kind):
    torch.manual_seed(0)
    predictor = kind(DataSpec((1, 4, 4), 5, 0.7), small_network)
    perturb(predictor)
    x = torch.linspace(-1, 1, 5)[torch.randint(5, (4, 1, 4, 4))]
    eps = torch.randn(4, 1, 4, 4)
    t, schedule = torch.full((4,), 1e-3), LinearFlow(1e-4)
    alpha, sigma = schedule(t)
    x_hat = predictor(alpha[0] * x + sigma[0] * eps, t, alpha, sigma)
    assert (x_hat - x).abs().max() < 0.02


def test_zeroed_x_prediction_is_the_posterior_mean_of_gaussian_data():
    """By regression on draws, not by the formula."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(400_000, 1, generator=generator)
    z = 0.6 * x + 0.9 * torch.randn(400_000, 1, generator=generator)
    slope = (x * z).mean() / (z * z).mean()
    predictor = XPrediction(DataSpec((1,), None, 2.0), small_mlp)
    with torch.no_grad():
        got = predictor(torch.ones(1, 1), torch.full((1,), 0.5), torch.tensor([0.6]), torch.tensor([0.9]))
    assert got.item() == pytest.approx(slope.item(), rel=5e-3)


def test_network_sees_unit_variance():
    seen = []

    class Look(Answer):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(x.std().item())
            return torch.zeros_like(x)

    predictor = XPrediction(DataSpec((1,), None, 3.0), lambda inp, out: Look(torch.zeros(1)))
    generator = torch.Generator().manual_seed(0)
    for time in (0.01, 0.5, 0.99):
        t = torch.full((20_000,), time)
        alpha, sigma = LinearFlow()(t)
        x, eps = 3 * torch.randn(20_000, 1, generator=generator), torch.randn(20_000, 1, generator=generator)
        predictor(alpha[:, None] * x + sigma[:, None] * eps, t, alpha, sigma)
    assert seen == pytest.approx([1, 1, 1], rel=0.03)


def test_level_prediction_is_bayes_rule_for_independent_pixels():
    """The network gives log prior odds of the levels; x_hat must be the posterior mean, by brute force."""
    generator = torch.Generator().manual_seed(0)
    levels, shape = 5, (2, 2, 2)
    prior = torch.randn(3, levels, *shape, generator=generator).softmax(1)
    predictor = LevelPrediction(DataSpec(shape, levels), lambda inp, out: Answer(prior.log().flatten(1, 2)))
    z = torch.randn(3, *shape, generator=generator)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.7, 1.0])
    grid = torch.linspace(-1, 1, levels)
    got = predictor(z, torch.zeros(3), alpha, sigma)
    for i in range(3):
        likelihood = torch.distributions.Normal(alpha[i] * grid, sigma[i]).log_prob(z[i][..., None]).exp()
        posterior = prior[i].movedim(0, -1) * likelihood
        expected = (posterior * grid).sum(-1) / posterior.sum(-1)
        torch.testing.assert_close(got[i], expected)


def test_level_prediction_refuses_continuous_data():
    with pytest.raises(ConfigError, match="XPrediction"):
        LevelPrediction(DataSpec((2,)), small_mlp)


def test_volatility_starts_at_the_reference_and_stays_near_it():
    reference = torch.tensor([1e-3, 0.1, 20.0])
    t = torch.tensor([0.0, 0.5, 1.0])
    assert MatchedVolatility()(t, reference) is reference
    volatility = LearnedVolatility(bound=2.0)
    torch.testing.assert_close(volatility(t, reference), reference)
    perturb(volatility, 50.0)
    ratio = (volatility(t, reference) / reference).log().abs()
    assert (ratio <= 2.0).all()
    assert ratio.max() > 0.1
    with pytest.raises(ConfigError):
        LearnedVolatility(bound=0.0)
