import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from zuko.transforms import FreeFormJacobianTransform

from conftest import PROCESSES, Ignored, Known, data_for, gaussian_data_model, perturb, small_network
from nfdm_lightning.bound import random_draws, variational_bound
from nfdm_lightning.decoder import DiscreteDecoder, GaussianDecoder
from nfdm_lightning.dequantisation import Density, TruncatedNormal, Uniform, WithDecoder
from nfdm_lightning.errors import ConfigError, NonFiniteError
from nfdm_lightning.likelihood import ODE, Bound, ImportanceWeighted, check_trust, judge
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.predictor import DataSpec, Predictor, XPrediction
from nfdm_lightning.processes import NFDM, Bridge, Cosine, Gaussian, LinearFlow
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.seeding import generators
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility

TIGHT = {"method": "dopri8", "rtol": 1e-8, "atol": 1e-8}


class Zero(nn.Module):
    """A network that is zero, at no cost."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out_shape = out_shape

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.new_zeros(len(x), *self.out_shape)


class Atoms(Predictor):
    r"""The exact predictor of data :math:`\sum_i p_i N(x_i, s^2 I)`: its posterior mean."""

    def __init__(self, atoms: Tensor, weights: Tensor, std: float) -> None:
        super().__init__(DataSpec(tuple(atoms.shape[1:])), Ignored)
        self.register_buffer("atoms", atoms)
        self.weights, self.std = weights, std

    def combine(self, z: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = alpha**2 * self.std**2 + sigma**2
        exponent = -0.5 * ((z[:, None] - alpha[:, None] * self.atoms) ** 2).flatten(2).sum(2) / variance.flatten(1)
        share = torch.softmax(exponent + self.weights.log(), 1)
        centre = torch.einsum("bi,i...->b...", share, self.atoms)
        return centre + alpha * self.std**2 / variance * (z - alpha * centre)


def mixture_log_density(x: Tensor, atoms: Tensor, weights: Tensor, variance: float) -> Tensor:
    squares = ((x[:, None] - atoms) ** 2).flatten(2).sum(2)
    normaliser = 0.5 * atoms[0].numel() * math.log(2 * math.pi * variance)
    return (weights.log() - 0.5 * squares / variance - normaliser).logsumexp(1)


SCHEDULES = {"vp": Gaussian, "fm": partial(Gaussian, schedule=LinearFlow), "cosine": partial(Gaussian, schedule=Cosine)}


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)], ids=["vector", "image"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ode_likelihood_of_gaussian_data_is_exact(name, shape):
    std = 0.7
    reverse = ReverseProcess(SCHEDULES[name](shape), XPrediction(DataSpec(shape, None, std), Zero), MatchedVolatility())
    x = std * torch.randn(5, *shape)
    alpha, sigma = (float(value) for value in reverse.process.reference(torch.zeros(1)))
    spread = torch.distributions.Normal(0, math.sqrt(alpha**2 * std**2 + sigma**2))
    dimensions = math.prod(shape)
    # the prior is not quite the marginal at t = 1: its KL is what is left
    estimate = ODE(trace="exact", **TIGHT).evaluate(reverse, GaussianDecoder(), x, torch.arange(5))
    exact = -spread.log_prob(alpha * x).flatten(1).sum(1) - dimensions * math.log(alpha)
    assert torch.allclose(estimate.nats, exact, atol=2e-2 * dimensions**0.5)
    alpha_1, sigma_1 = (float(value) for value in reverse.process.reference(torch.ones(1)))
    end = math.sqrt(alpha_1**2 * std**2 + sigma_1**2)
    flowed = alpha * x * end / spread.scale  # the exact flow of Gaussian data is linear
    prior = torch.distributions.Normal(0, 1).log_prob(flowed) - torch.distributions.Normal(0, end).log_prob(flowed)
    assert torch.allclose(estimate.nats, exact - prior.flatten(1).sum(1), atol=1e-6)
    data = -torch.distributions.Normal(0, std).log_prob(x).flatten(1).sum(1)
    if name == "fm":  # ends in the prior, and its delta of 0.01 is little beside 0.7
        assert (estimate.nats.mean() - data.mean()).abs() < 1e-3 * dimensions


def test_every_estimator_against_a_known_mixture():
    torch.manual_seed(1)
    atoms, weights, std = torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.3, -1.2]]), torch.tensor([0.5, 0.3, 0.2]), 0.3
    process = Gaussian((2,), schedule=LinearFlow)  # ends in its prior
    reverse = ReverseProcess(process, Atoms(atoms, weights, std), MatchedVolatility())
    number = 100
    x = atoms[torch.multinomial(weights, number, replacement=True)] + std * torch.randn(number, 2)
    index, decoder = torch.arange(number), GaussianDecoder()
    exact = -mixture_log_density(x, atoms, weights, std**2)
    ode = ODE().evaluate(reverse, decoder, x, index).nats
    assert (ode.mean() - exact.mean()).abs() < 1e-3
    assert (ode - exact).abs().max() < 0.01
    bound = Bound(draws=64).evaluate(reverse, decoder, x, index).nats.mean()
    assert exact.mean() < bound < exact.mean() + 0.5
    # in 60 steps the bound is far from tight; the weighted one lies between it and the exact value
    weighted = [ImportanceWeighted(k, 60).evaluate(reverse, decoder, x, index).nats.mean() for k in (1, 8)]
    assert exact.mean() < weighted[1] < weighted[0] - 1


def test_every_estimator_on_gaussian_images():
    shape, std = (3, 4, 4), 0.7
    process = Gaussian(shape, schedule=LinearFlow)
    reverse = ReverseProcess(process, XPrediction(DataSpec(shape, None, std), Zero), MatchedVolatility())
    x, index, decoder = std * torch.randn(24, *shape), torch.arange(24), GaussianDecoder()
    exact = -torch.distributions.Normal(0, std).log_prob(x).flatten(1).sum(1).mean()
    ode = ODE().evaluate(reverse, decoder, x, index).nats.mean()
    assert float(ode) == pytest.approx(float(exact), abs=1e-2)  # delta of 0.01 beside 0.7, in 48 dimensions
    bound = Bound(draws=64).evaluate(reverse, decoder, x, index).nats.mean()
    assert exact - 0.05 < bound < exact + 0.05 * 48
    in_steps = Bound(draws=64, discrete_steps=200).evaluate(reverse, decoder, x, index).nats.mean()
    few, many = (ImportanceWeighted(k, 200).evaluate(reverse, decoder, x, index).nats.mean() for k in (2, 16))
    assert exact < many < few < in_steps


def gaussian_of_ancestral(reverse: ReverseProcess, decoder_std: float, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of x as a one-dimensional model with an affine predictor draws it in so many steps."""
    mean, variance = torch.zeros(1, 1), torch.ones(1, 1)
    for t, s in itertools.pairwise(torch.linspace(1, 0, steps + 1)):
        t, s = t.expand(2), s.expand(2)
        z = torch.tensor([[0.0], [1.0]])
        at, std = reverse.process.transition_moments(z, t, s, reverse.x_hat(z, t), reverse.g2(t), reverse.g2(s))
        slope = at[1] - at[0]
        mean, variance = at[0] + slope * mean, slope**2 * variance + std.expand_as(z)[0] ** 2
    alpha = reverse.process.reference(torch.zeros(1))[0]
    return mean / alpha, variance / alpha**2 + decoder_std**2


@pytest.mark.parametrize("build", [partial(Gaussian, schedule=LinearFlow), partial(NFDM, network=Zero)], ids=["fm", "nfdm"])
def test_importance_weighting_falls_from_the_bound_to_the_likelihood_of_a_wrong_model(build):
    process, steps, number = build((1,)), 10, 30
    # the posterior mean of wider data: an affine predictor that is wrong
    reverse = ReverseProcess(process, XPrediction(DataSpec((1,), std=1.0), Zero), LearnedVolatility())
    perturb(reverse.volatility, 0.3)
    # the decoder of the process: with a wider one, the paths' last step would miss most of the posterior
    decoder, index, x = GaussianDecoder(), torch.arange(number), 0.8 * torch.randn(number, 1)
    with torch.no_grad():
        mean, variance = gaussian_of_ancestral(reverse, process.delta, steps)
    exact = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(x)[:, 0]
    few, more, many = (ImportanceWeighted(k, steps).evaluate(reverse, decoder, x, index, seed=k) for k in (4, 16, 64))
    bound = many.parts["single_path"]  # 64 draws of K = 1
    gaps = [float((nats - exact).mean()) for nats in (bound, few.nats, more.nats, many.nats)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 2
    assert gaps[-1] > -0.05
    assert gaps[-1] < 0.1 * gaps[0]
    # one path: the bound of so many discrete steps, by the closed-form divergences
    discrete = torch.stack(
        [variational_bound(reverse, decoder, x, random_draws(x), steps).nats.detach() for _ in range(200)]
    )
    noise = (discrete.std(0) ** 2 / 200 + bound**2 / 64) ** 0.5
    assert ((bound - discrete.mean(0)).abs() < 5 * noise).all()
    assert float(bound.mean()) == pytest.approx(float(discrete.mean()), rel=0.15)


def test_importance_weights_are_those_of_the_ends_where_the_prediction_is_right(process, shape):
    target = torch.randn(3, *shape)
    x = data_for(process, target)
    reverse = ReverseProcess(process, Known(shape, target), MatchedVolatility())
    index, own = torch.arange(3), []

    class Watched(GaussianDecoder):
        def log_prob(self, x, z, alpha, sigma):
            own.append(super().log_prob(x, z, alpha, sigma))
            return own[-1]

    number = 32
    with torch.no_grad():
        paths = [ImportanceWeighted(1, 1).evaluate(reverse, Watched(0.2), x, index, seed=s).nats for s in range(number)]
        # what is left besides the decoder is log p(z_1) / q(z_1 | x), whose mean is minus the prior KL: 0 where pinned
        ends = -torch.stack(paths) - torch.stack(own)
        kl = torch.stack([process.prior_kl(torch.randn(3, *shape), x) for _ in range(4 * number)])
    noise = (ends.var(0) / number + kl.var(0) / len(kl)).sqrt()
    assert ((ends.mean(0) + kl.mean(0)).abs() < 5 * noise + 1e-9).all()


def jacobian_log_density(reverse: ReverseProcess, z: Tensor, steps: int = 60) -> Tensor:
    """log p_0(z) of one sample by the Jacobian of the whole flow, solved by Runge-Kutta of order 4."""
    source = reverse.source

    def flow(flat: Tensor) -> Tensor:
        state = flat.view(1, *reverse.shape)
        for a, b in itertools.pairwise(torch.linspace(0, 1, steps + 1)):
            h = b - a

            def f(y: Tensor, at: Tensor) -> Tensor:
                return reverse.velocity(y, at.expand(1))

            one = f(state, a)
            two = f(state + 0.5 * h * one, a + 0.5 * h)
            three = f(state + 0.5 * h * two, a + 0.5 * h)
            four = f(state + h * three, b)
            state = state + h / 6 * (one + 2 * two + 2 * three + four)
        return state.flatten()

    jacobian = torch.autograd.functional.jacobian(flow, z.flatten())
    end = flow(z.flatten()).view(1, *reverse.shape)
    return reverse.process.prior_log_prob(end, source)[0] + torch.linalg.slogdet(jacobian)[1]


def any_model(process, shape):
    predictor = XPrediction(DataSpec(shape, None, 1.0, process.takes_source), small_network)
    perturb(predictor, 0.1)
    reverse = ReverseProcess(process, predictor, MatchedVolatility())
    for parameter in reverse.parameters():
        parameter.requires_grad_(False)
    return reverse


@pytest.mark.parametrize("name", [name for name in PROCESSES if "flow" not in name])  # they take half a minute
def test_ode_likelihood_is_the_change_of_variables_of_its_flow(name):
    shape = (2,)
    # the shipped bridge is stiff at both ends: too much for the fixed steps of the comparison
    process = PROCESSES[name](shape) if name != "bridge" else Bridge(shape, network=small_network, delta=0.2, noise=0.5)
    perturb(process)
    reverse = any_model(process, shape)
    x = data_for(process, torch.randn(2, *shape))
    z = reverse.process.split(x)[0]
    estimate = ODE(Density(), method="dopri8", rtol=1e-6, atol=1e-6).evaluate(reverse, GaussianDecoder(), x, torch.arange(2))
    alpha = process.reference(torch.zeros(1))[0]
    source = process.split(x)[1]
    one = reverse.given(None if source is None else source[:1])
    expected = jacobian_log_density(one, alpha * z[:1]) + math.prod(shape) * alpha.log()
    assert float(-estimate.nats[0]) == pytest.approx(float(expected), abs=5e-4)


def test_a_step_of_the_ode_likelihood_against_finite_differences(process, shape):
    reverse, (x, index) = any_model(process, shape), (data_for(process, torch.randn(1, *shape)), torch.tensor([0]))
    target, source = process.split(x)
    estimate = ODE(Density(), trace="exact", method="euler", steps=1).evaluate(reverse, GaussianDecoder(), x, index)
    reverse = reverse.given(source)
    alpha, zero, h = process.reference(torch.zeros(1))[0], torch.zeros(1), 1e-5
    z = alpha * target
    divergence = 0.0
    with torch.no_grad():
        for i in range(z.numel()):
            step = torch.zeros(z.numel())
            step[i] = h
            step = step.view_as(z)
            rise = reverse.velocity(z + step, zero) - reverse.velocity(z - step, zero)
            divergence += float(rise.flatten()[i]) / (2 * h)
        end = z + reverse.velocity(z, zero)
    log_p = float(process.prior_log_prob(end, source)) + divergence + z.numel() * float(alpha.log())
    assert float(-estimate.nats) == pytest.approx(log_p, rel=1e-6, abs=1e-5)


def test_ode_likelihood_against_zuko():
    torch.manual_seed(3)
    shape = (4,)
    process = NFDM(shape, network=small_network, delta=0.2)
    perturb(process)
    reverse = any_model(process, shape)
    x = torch.randn(1, *shape)
    ours = ODE(trace="exact", rtol=1e-5, atol=1e-5).evaluate(reverse, GaussianDecoder(), x, torch.arange(1))

    def velocity(t: Tensor, flat: Tensor) -> Tensor:
        state = flat.reshape(-1, *shape)
        return reverse.velocity(state, t.expand(len(state))).reshape(flat.shape)

    # another implementation of the flow, of its trace and of the solver
    theirs = FreeFormJacobianTransform(velocity, 0.0, 1.0, phi=reverse.parameters(), atol=1e-5, rtol=1e-5, exact=True)
    with torch.enable_grad():
        end, log_det = theirs.call_and_ladj(x.flatten(1).clone().requires_grad_())
    expected = -(process.prior_log_prob(end.view(-1, *shape), None) + log_det).detach()
    assert torch.allclose(ours.nats, expected, atol=1e-3)


def test_hutchinson_is_unbiased_and_rademacher_the_less_noisy():
    torch.manual_seed(4)
    process = NFDM((3,), network=small_network, delta=0.2)
    perturb(process)
    reverse, x, index = any_model(process, (3,)), torch.randn(3, 3), torch.arange(3)
    settings = {"method": "rk4", "steps": 10}
    exact = ODE(trace="exact", **settings).evaluate(reverse, GaussianDecoder(), x, index)
    spread = {}
    for probe in ("rademacher", "gaussian"):
        estimate = ODE(trace="hutchinson", probe=probe, probes=60, **settings).evaluate(reverse, GaussianDecoder(), x, index)
        assert estimate.probes.shape == (60, 3)
        assert torch.allclose(estimate.nats, estimate.probes.mean(0))
        spread[probe] = estimate.probes.std(0)
        assert ((estimate.nats - exact.nats).abs() < 5 * spread[probe] / 60**0.5 + 1e-6).all()
    assert spread["rademacher"].mean() < spread["gaussian"].mean()
    assert exact.probes.numel() == 0


ATOMS = torch.tensor([[0, 3, 8, 16], [16, 16, 0, 4], [2, 2, 2, 2], [8, 0, 16, 9], [8, 1, 16, 9]]).view(5, 1, 2, 2)
WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
ENTROPY = float(-(WEIGHTS.double() * WEIGHTS.double().log()).sum())


def levels_model(delta: float) -> tuple[ReverseProcess, DiscreteDecoder, Tensor, Tensor]:
    """The exact model of a distribution over 17 levels and 2x2 pixels, and the distribution."""
    atoms, weights = ATOMS.double() / 8 - 1, WEIGHTS.double()
    process = Gaussian((1, 2, 2), schedule=partial(LinearFlow, delta=delta))
    return ReverseProcess(process, Atoms(atoms, weights, 1e-6), MatchedVolatility()), DiscreteDecoder(17), atoms, weights


@pytest.mark.parametrize("delta", [0.02, 0.04])
def test_dequantisations_are_above_the_entropy_by_the_right_gap(delta):
    reverse, decoder, atoms, weights = levels_model(delta)
    repeats = 12
    x, index = atoms.repeat_interleave(repeats, 0), torch.arange(5 * repeats)

    def mean(estimator) -> tuple[float, float]:
        nats = estimator.evaluate(reverse, decoder, x, index).nats.view(5, repeats)
        error = (nats.var(1) / repeats * weights**2).sum().sqrt()
        return float((nats.mean(1) * weights).sum()), float(error)

    half = 1 / 16
    uniform, error = mean(ODE(Uniform(), rtol=1e-4, atol=1e-4))
    # E log of uniform over normal of standard deviation delta, per pixel; the kernels of two atoms hardly overlap
    gap = 4 * ((2 * half) ** 2 / 12 / (2 * delta**2) + math.log(delta * math.sqrt(2 * math.pi) / (2 * half)))
    assert uniform - ENTROPY == pytest.approx(gap, abs=4 * error + 0.02)
    truncated, error = mean(ODE(TruncatedNormal(), rtol=1e-4, atol=1e-4))
    gap = -4 * math.log(math.erf(half / delta / math.sqrt(2)))
    assert truncated - ENTROPY == pytest.approx(gap, abs=4 * error + 0.01)
    plain, error = mean(ODE(WithDecoder(), rtol=1e-4, atol=1e-4))
    many = x.repeat(100, 1, 1, 1)
    latents = reverse.process.start(torch.randn(many.shape), many)
    errors = -decoder.log_prob(many, latents, torch.tensor(1.0), torch.tensor(delta)).view(100, 5, repeats).mean((0, 2))
    assert plain - ENTROPY == pytest.approx(float((errors * weights).sum()), abs=4 * error + 0.01)
    bound, error = mean(Bound(draws=64))
    assert ENTROPY - 4 * error < bound < plain + 4 * error + 0.3
    weighted, error = mean(ODE(Uniform(), draws=4, rtol=1e-4, atol=1e-4))
    assert ENTROPY < weighted < uniform - 0.1


def test_truncated_normal_noise_has_the_density_that_it_states():
    noise = TruncatedNormal(0.3)
    quantiles = torch.rand(20000, 1)
    offset, log_density = noise.noise(quantiles, 0.5, 1.0)
    assert offset.abs().max() <= 0.5
    # the mean of 1 / density over the distribution is the width of the bin
    assert float((-log_density).exp().mean()) == pytest.approx(1.0, abs=0.01)
    exact = torch.distributions.Normal(0.0, 0.3)
    mass = exact.cdf(torch.tensor(0.5)) - exact.cdf(torch.tensor(-0.5))
    assert torch.allclose(log_density, exact.log_prob(offset) - mass.log())
    share = (offset < -0.2).double().mean()
    expected = (exact.cdf(torch.tensor(-0.2)) - exact.cdf(torch.tensor(-0.5))) / mass
    assert float(share) == pytest.approx(float(expected), abs=0.015)


@pytest.mark.parametrize("kind", [Uniform(), TruncatedNormal(0.1)], ids=lambda kind: kind.name)
def test_weights_of_noise_in_a_bin_integrate_to_its_volume_in_latents(kind):
    class Half(Gaussian):
        def reference(self, t):
            alpha, sigma = super().reference(t)
            return 0.5 * alpha, sigma

    reverse = ReverseProcess(Half((2,)), XPrediction(DataSpec((2,)), Zero), MatchedVolatility())
    x = torch.zeros(4000, 2)
    own = generators(torch.arange(4000), 1)
    z, log_w = kind.draw(reverse, DiscreteDecoder(5), x, own)
    width = 0.5 * 0.5  # of a bin, 2 / 4, in latents
    assert float(z.abs().max()) <= width / 2
    assert float(log_w.exp().mean()) == pytest.approx(width**2, rel=0.03)  # E_q [1 / q] is the volume


@pytest.mark.parametrize("name", [name for name in PROCESSES if "flow" not in name])
def test_ode_likelihood_in_float32_is_that_in_float64(name):
    process = PROCESSES[name]((2,)) if name != "bridge" else Bridge((2,), network=small_network, noise=1.0)
    perturb(process)
    reverse = any_model(process, (2,))
    x = data_for(process, torch.randn(2, 2))
    double = ODE(rtol=1e-5, atol=1e-5).evaluate(reverse, GaussianDecoder(), x, torch.arange(2)).nats
    torch.set_default_dtype(torch.float32)
    single = ODE(rtol=1e-5, atol=1e-5).evaluate(reverse.float(), GaussianDecoder(), x.float(), torch.arange(2)).nats
    assert torch.allclose(single.double(), double, atol=0.02)


def test_the_guard_trips_on_eight_steps_of_euler_and_not_on_a_good_solve():
    reverse, decoder, atoms, _ = levels_model(0.02)
    x, index = atoms, torch.arange(5)
    coarse = judge(*check_trust(ODE(TruncatedNormal(), method="euler", steps=8), reverse, decoder, x, index))
    assert not coarse.trusted
    assert coarse.solver_gap > 0.01  # coarse solves give too low a value
    assert "a finer solve differs" in coarse.reasons[0]
    good = judge(*check_trust(ODE(TruncatedNormal(), rtol=1e-4, atol=1e-4), reverse, decoder, x, index))
    assert good.trusted
    assert good.samples == 5
    assert good.probe_gap is None
    noisy = ODE(TruncatedNormal(), trace="hutchinson", probes=1)
    first = judge(*check_trust(noisy, reverse, decoder, x[:4], index[:4]))
    assert first.probe_gap is not None  # two probes at least
    assert judge(torch.zeros(2), torch.full((2,), 0.02)).reasons == ["two sets of probes differ by +0.0200 bits/dim"]
    assert not judge(torch.full((2,), float("nan")), torch.zeros(0)).trusted


@pytest.mark.parametrize(
    "estimator",
    [Bound(3), ImportanceWeighted(2, 4), ODE(trace="hutchinson", draws=2, method="rk4", steps=4)],
    ids=lambda e: type(e).__name__,
)
def test_estimates_do_not_depend_on_the_batch(estimator):
    process = NFDM((1, 4, 4), network=small_network)
    perturb(process)
    reverse, decoder = any_model(process, (1, 4, 4)), DiscreteDecoder(5)
    x = (torch.randint(0, 5, (5, 1, 4, 4)) / 2 - 1).double()
    whole = estimator.evaluate(reverse, decoder, x, torch.arange(5), seed=3)
    parts = [estimator.evaluate(reverse, decoder, x[i : i + 1], torch.tensor([i]), seed=3) for i in (4, 0)]
    assert torch.allclose(whole.nats[[4, 0]], torch.cat([part.nats for part in parts]), atol=1e-8)
    assert whole.nfe > 0
    other = estimator.evaluate(reverse, decoder, x, torch.arange(5), seed=4)
    assert not torch.allclose(whole.nats, other.nats, atol=1e-3)


@pytest.mark.parametrize(
    "estimator", [Bound(2), ImportanceWeighted(2, 4), ODE(method="rk4", steps=8)], ids=["bound", "iw", "ode"]
)
def test_labels_reach_both_networks_of_every_estimate(estimator):
    network = partial(ResidualMLP, width=8, depth=1)
    process = NFDM((2,), network=network, num_classes=3)
    predictor = XPrediction(DataSpec((2,), num_classes=3), network)
    x, index, label = torch.randn(3, 2), torch.arange(3), torch.tensor([0, 2, 1])

    def nats(label: Tensor | None) -> Tensor:
        reverse = ReverseProcess(process, predictor, MatchedVolatility())
        return estimator.evaluate(reverse, GaussianDecoder(), x, index, label=label).nats

    for part in (process, predictor):
        perturb(process, 0.3)
        perturb(predictor, 0.3)
        for name, parameter in part.named_parameters():
            if "embed" in name and parameter.shape[0] == 4:  # the labels of the other part make no difference
                parameter.data.copy_(parameter.data[:1].expand_as(parameter))
        given = nats(label)
        same = [nats(torch.full((3,), int(one)))[place] for place, one in enumerate(label)]
        assert torch.allclose(given, torch.stack(same), atol=1e-2)
        assert not torch.allclose(given, nats(label.flip(0)), atol=1e-2)
        assert not torch.allclose(given, nats(None), atol=1e-2)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="euler needs steps"):
        ODE(method="euler")
    with pytest.raises(ConfigError, match="leave steps out"):
        ODE(steps=8)
    with pytest.raises(ConfigError, match="choose from dopri5"):
        ODE(method="rk45")
    for wrong in ({"draws": 0}, {"probes": 0}, {"rtol": 0.0}, {"method": "euler", "steps": 0}):
        with pytest.raises(ConfigError, match="must be"):
            ODE(**wrong)
    for wrong in (lambda: Bound(0), lambda: Bound(1, 0), lambda: ImportanceWeighted(0), lambda: TruncatedNormal(0.0)):
        with pytest.raises(ConfigError, match="must be"):
            wrong()
    reverse = gaussian_data_model(Gaussian((2,)), 1.0)
    with pytest.raises(ConfigError, match="Uniform is for discrete data"):
        ODE(Uniform()).evaluate(reverse, GaussianDecoder(), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ConfigError, match="Density is for continuous data"):
        ODE(Density()).evaluate(reverse, DiscreteDecoder(3), torch.zeros(1, 2), torch.tensor([0]))


def test_a_solve_that_diverges_is_named():
    class Explodes(XPrediction):
        def combine(self, z, output, alpha, sigma):
            return z**3 * 1e3

    reverse = ReverseProcess(Gaussian((2,)), Explodes(DataSpec((2,)), Ignored), MatchedVolatility())
    with pytest.raises(NonFiniteError, match="ODE likelihood"):
        ODE(method="euler", steps=30).evaluate(reverse, GaussianDecoder(), 9 * torch.ones(1, 2), torch.tensor([7]))


def test_ode_in_inference_mode_and_the_parameters_after_it():
    process = PROCESSES["nfdm"]((2,))
    perturb(process)
    reverse = any_model(process, (2,))
    next(reverse.predictor.parameters()).requires_grad_(False)
    learned = [one.requires_grad for one in reverse.parameters()]
    x, index = torch.randn(3, 2), torch.arange(3)
    expected = ODE(rtol=1e-3, atol=1e-3).evaluate(reverse, GaussianDecoder(), x, index).nats
    with torch.inference_mode():
        inside = ODE(rtol=1e-3, atol=1e-3).evaluate(reverse, GaussianDecoder(), x.clone(), index).nats
    assert torch.equal(inside, expected)
    assert [one.requires_grad for one in reverse.parameters()] == learned


def test_ode_of_a_velocity_that_does_not_see_the_latents():
    class Still(ReverseProcess):
        def velocity(self, z, t):
            return torch.ones_like(z) * t[:, None]

    reverse = Still(Gaussian((2,)), XPrediction(DataSpec((2,)), Zero), MatchedVolatility())
    found = ODE(Density()).evaluate(reverse, GaussianDecoder(), torch.zeros(2, 2), torch.arange(2))
    alpha = reverse.process.reference_at_data(torch.zeros(1))[0]
    end = torch.full((2, 2), 0.5)
    assert torch.allclose(-found.nats, reverse.process.prior_log_prob(end, None) + 2 * alpha.log())
