"""The contract of every plug-in: inverse, density, score, velocity, end points, against autodiff and finite differences."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from conftest import PROCESSES, batch, central_difference, data_for, perturb, small_mlp, small_network
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.predictor import DataSpec, XPrediction
from nfdm_lightning.processes import (
    NDM,
    NFDM,
    AffineProcess,
    Cosine,
    ForwardProcess,
    Gaussian,
    LearnedMonotone,
    LinearFlow,
    Schedule,
    VariancePreserving,
)
from nfdm_lightning.processes.base import expand_as_event, sum_event
from nfdm_lightning.reverse import ReverseProcess, drift
from nfdm_lightning.volatility import MatchedVolatility

SCHEDULES = (VariancePreserving, LearnedMonotone, LinearFlow, Cosine)


class Derived(ForwardProcess):
    """Another process seen through the three abstract methods alone, so that everything else is the default."""

    def __init__(self, inner: ForwardProcess) -> None:
        super().__init__(inner.shape)
        self.inner = inner
        self.takes_source = inner.takes_source

    def transform(self, eps, t, x):
        return self.inner.transform(eps, t, x)

    def inverse(self, z, t, x):
        return self.inner.inverse(z, t, x)

    def log_prob(self, z, t, x):
        return self.inner.log_prob(z, t, x)


class Sinh(ForwardProcess):
    """A process that is not affine in eps: z = (1 - t) x + sinh(a eps) / a * std, std = 0.1 + 0.9 t."""

    a = 0.7

    def transform(self, eps, t, x):
        return (1 - expand_as_event(t, x)) * x + self._std(t, x) * torch.sinh(self.a * eps) / self.a

    def inverse(self, z, t, x):
        return torch.asinh(self.a * (z - (1 - expand_as_event(t, x)) * x) / self._std(t, x)) / self.a

    def log_prob(self, z, t, x):
        eps = self.inverse(z, t, x)
        slope = self._std(t, x) * torch.cosh(self.a * eps)
        return sum_event(-0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - slope.log())

    def _std(self, t, x):
        return 0.1 + 0.9 * expand_as_event(t, x)


def test_inverse_undoes_transform(process, shape):
    eps, t, x = batch(shape, process=process)
    torch.testing.assert_close(process.inverse(process.transform(eps, t, x), t, x), eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*PROCESSES, "sinh"])
def test_log_prob_is_the_change_of_variables(name):
    shape = (3,)
    process = Sinh(shape) if name == "sinh" else PROCESSES[name](shape)
    perturb(process)
    eps, t, x = batch(shape, process=process)
    jacobian = torch.stack(
        [
            torch.func.jacrev(lambda e, i=i: process.transform(e[None], t[i : i + 1], x[i : i + 1])[0])(eps[i])
            for i in range(4)
        ]
    )
    expected = Normal(0.0, 1.0).log_prob(eps).sum(1) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(process.log_prob(process.transform(eps, t, x), t, x), expected)


def test_score_is_the_gradient_of_log_prob(process, shape):
    eps, t, x = batch(shape, process=process)
    point = process.path(eps, t, x)
    z = point.z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(process.log_prob(z, t, x).sum(), z)
    torch.testing.assert_close(point.score, gradient)


def test_velocity_is_the_time_derivative_at_fixed_noise(process, shape):
    eps, t, x = batch(shape, process=process)
    point = process.path(eps, t, x)
    torch.testing.assert_close(point.z, process.transform(eps, t, x))
    expected = central_difference(lambda time: process.transform(eps, time, x), t)
    torch.testing.assert_close(point.velocity, expected, rtol=1e-6, atol=1e-7)


def test_path_at_a_state_is_the_path_through_it(process, shape):
    eps, t, x = batch(shape, process=process)
    point, again = process.path(eps, t, x), process.path_at(process.transform(eps, t, x), t, x)
    torch.testing.assert_close(process.velocity_at(point.z, t, x), point.velocity, rtol=1e-8, atol=1e-8)
    for name in ("z", "velocity", "score"):
        torch.testing.assert_close(getattr(point, name), getattr(again, name), rtol=1e-8, atol=1e-8)


def test_closed_forms_equal_the_defaults_by_autodiff(process, shape):
    eps, t, x = batch(shape, process=process)
    for closed, default in (
        (process.path(eps, t, x), Derived(process).path(eps, t, x)),
        (process.path_at(eps, t, x), Derived(process).path_at(eps, t, x)),
    ):
        for name in ("z", "velocity", "score"):
            torch.testing.assert_close(getattr(closed, name), getattr(default, name), rtol=1e-8, atol=1e-8)


def test_default_score_of_a_process_that_is_not_affine():
    # s = J^-T (-eps - grad log |det J|), J diagonal here
    process, (eps, t, x) = Sinh((3,)), batch((3,))
    slope = process._std(t, x) * torch.cosh(process.a * eps)
    expected = (-eps - process.a * torch.tanh(process.a * eps)) / slope
    torch.testing.assert_close(process.path(eps, t, x).score, expected)


def test_default_prior_kl_estimates_the_divergence():
    process = Derived(PROCESSES["ndm"]((2,)))
    perturb(process)
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        estimates = process.prior_kl(eps, x.expand(len(eps), 2))
        exact = process.inner.prior_kl(eps[:1], x)
    assert abs(estimates.mean() - exact.item()) < 4 * estimates.std() / len(eps) ** 0.5


def test_prior_kl_is_that_of_the_end_point(process, shape):
    eps, _, x = batch(shape, process=process)
    end = torch.ones(4)
    zero = torch.zeros_like(eps)
    mean = process.transform(zero, end, x)
    std = process.transform(zero + 1, end, x) - mean
    start = process.prior(zero, process.split(x)[1])
    prior = Normal(start, process.prior(zero + 1, process.split(x)[1]) - start)
    exact = kl_divergence(Independent(Normal(mean, std), len(shape)), Independent(prior, len(shape)))
    torch.testing.assert_close(process.prior_kl(eps, x), exact, rtol=1e-7, atol=1e-9)


def test_start_is_the_transform_at_zero_and_the_reference(process, shape):
    eps, _, x = batch(shape, process=process)
    start = torch.zeros(4)
    torch.testing.assert_close(process.start(eps, x), process.transform(eps, start, x))
    alpha, sigma = (expand_as_event(value, eps) for value in process.reference(start))
    target, source = process.split(x)
    expected = alpha * target + process.offset(start, source) + sigma * eps
    torch.testing.assert_close(process.start(eps, x), expected)
    if source is not None:
        torch.testing.assert_close(process.join(target, source), x)


@pytest.mark.parametrize("name", ["nfdm", "nfdm_ot", "separable", "flow_nfdm", "flow_affine", "bridge"])
def test_pinned_at_both_ends_whatever_the_network(name, shape):
    process = PROCESSES[name](shape)
    perturb(process, 1.0)
    eps, _, x = batch(shape, process=process)
    target, source = process.split(x)
    torch.testing.assert_close(process.transform(eps, torch.zeros(4), x), target + 0.01 * eps)
    end = eps if source is None else source + 0.01 * eps
    torch.testing.assert_close(process.transform(eps, torch.ones(4), x), end)
    torch.testing.assert_close(process.prior(eps, source), end)


def test_nfdm_log_std_is_bounded():
    process = NFDM((3,), network=small_network, bound=2.0)
    perturb(process, 100.0)
    _, _, x = batch((3,))
    std = process.moments(torch.full((4,), 0.5), x)[1]
    middle = 0.5 * math.log(0.01)
    assert torch.isfinite(std).all()
    assert (std.log() - middle).abs().max() <= 0.25 * 2.0 + 1e-9


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_zeroed_networks_give_the_fixed_process(shape):
    eps, t, x = batch(shape)
    time = expand_as_event(t, x)
    nfdm, ndm = NFDM(shape, network=small_network), NDM(shape, network=small_network)
    sigma = 0.01 ** (1 - time)
    rate = -math.log(0.01)
    point = nfdm.path(eps, t, x)
    torch.testing.assert_close(point.z, (1 - time) * x + sigma * eps)
    torch.testing.assert_close(point.velocity, -x + rate * sigma * eps)
    torch.testing.assert_close(point.score, -eps / sigma)
    gaussian = Gaussian(shape).path(eps, t, x)
    for name in ("z", "velocity", "score"):
        torch.testing.assert_close(getattr(ndm.path(eps, t, x), name), getattr(gaussian, name))


@pytest.mark.parametrize(
    "name", [name for name in PROCESSES if name not in ("gaussian_vp", "gaussian_fm", "gaussian_cosine")]
)
@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_gradients_through_the_time_derivative(name, shape):
    """Against the double-backward form of the derivative, another algorithm, and it reaches every parameter."""
    process = PROCESSES[name](shape)
    perturb(process)
    eps, t, x = batch(shape, process=process)
    weight = torch.randn(4, *shape, generator=torch.Generator().manual_seed(5))
    parameters = list(process.parameters())
    (process.path(eps, t, x).velocity * weight).sum().backward()
    got = [parameter.grad for parameter in parameters]
    assert all(g is not None and g.abs().max() > 0 for g in got)
    _, velocity = torch.autograd.functional.jvp(
        lambda time: process.transform(eps, time, x), t, torch.ones_like(t), create_graph=True
    )
    expected = torch.autograd.grad((velocity * weight).sum(), parameters)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-8)


def test_a_time_derivative_is_taken_in_inference_mode_and_of_expanded_times(process, shape):
    eps, _t, x = batch(shape, process=process)
    expected = process.path(eps, torch.full((4,), 0.3), x).velocity
    with torch.inference_mode():
        got = process.path(eps, torch.tensor(0.3).expand(4), x)
        assert got.velocity.abs().max() > 0
        torch.testing.assert_close(got.velocity, expected)
        torch.testing.assert_close(Derived(process).path(eps, torch.tensor(0.3).expand(4), x).score, got.score)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_derivatives_and_order(schedule):
    built: Schedule = schedule()
    perturb(built)
    t = torch.linspace(0.01, 0.99, 21)
    closed = built.derivatives(t)
    default = Schedule.derivatives(built, t)
    for a, b in zip(closed, default, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(closed.alpha_dt, central_difference(lambda u: built(u)[0], t), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(closed.sigma_dt, central_difference(lambda u: built(u)[1], t), rtol=1e-5, atol=1e-8)
    grid = torch.linspace(0, 1, 1001)
    alpha, sigma = built(grid)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()


def test_schedule_ends():
    one, zero = torch.ones(1), torch.zeros(1)
    for schedule in (LinearFlow(0.02), Cosine(0.02)):
        torch.testing.assert_close(torch.cat(schedule(one)), torch.tensor([0.0, 1.0]))
        assert schedule(zero)[1].item() == pytest.approx(0.02)
    for vp in (VariancePreserving(), LearnedMonotone()):
        alpha, sigma = vp(torch.linspace(0, 1, 5))
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5))
        assert vp.gamma(zero).item() == pytest.approx(-13.3, abs=1e-5)
        assert vp.gamma(one).item() == pytest.approx(5.0, abs=1e-5)
    # VDM's noise at the data end
    assert VariancePreserving()(zero)[1].item() == pytest.approx(1.2930e-3, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reference_volatility_is_sigma_squared_times_the_slope_of_gamma(schedule):
    process = Gaussian((2,), schedule=schedule)
    perturb(process)
    t = torch.linspace(0.01, 0.9, 15)

    def gamma(u: Tensor) -> Tensor:
        alpha, sigma = process.schedule(u)
        return 2 * (sigma.log() - alpha.log())

    expected = process.schedule(t)[1] ** 2 * central_difference(gamma, t)
    torch.testing.assert_close(process.reference_g2(t), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ForwardProcess.reference_g2(process, t), expected, rtol=1e-5, atol=1e-9)
    assert torch.isfinite(process.reference_g2(torch.tensor([0.0, 1.0]))).all()


def test_reference_volatility_of_nfdm():
    t = torch.linspace(0, 0.9, 7)
    expected = 2 * 0.01 ** (2 - 2 * t) * (-math.log(0.01) + 1 / (1 - t))
    torch.testing.assert_close(NFDM((2,), network=small_mlp).reference_g2(t), expected)


def test_transition_follows_the_conditional_reverse_sde(process_name):
    """The exact step against many Euler steps of the linear SDE of one x: mean and variance, and both at once marginally."""
    process = PROCESSES[process_name]((1,))
    if not isinstance(process, AffineProcess):
        pytest.skip("not a linear SDE")
    perturb(process)
    x = data_for(process, torch.tensor([[0.7]]))
    reference = ReverseProcess(process, XPrediction(DataSpec((1,)), small_mlp), MatchedVolatility())
    begin, end, steps = 0.6, 0.3, 20_000
    times = torch.linspace(begin, end, steps + 1)
    middle = 0.5 * (times[:-1] + times[1:])
    with torch.no_grad():
        rows = x.expand(steps, *x.shape[1:])
        low, high = (
            drift(process.path_at(torch.full((steps, 1), value), middle, rows), reference.g2(middle))[:, 0]
            for value in (0.0, 1.0)
        )
        slope, dt, g2 = high - low, (begin - end) / steps, reference.g2(middle)
        mean, variance = torch.tensor(1.3), torch.tensor(0.0)
        for a, b, g in zip(slope, low, g2, strict=True):
            mean = mean - dt * (a * mean + b)
            variance = (1 - dt * a) ** 2 * variance + g * dt
        # the same step split in parts, since the rate's integral is by the trapezoidal rule
        z, spread = torch.full((1, 1), 1.3), torch.zeros(1, 1)
        cuts = torch.linspace(begin, end, 65)
        for t, s in itertools.pairwise(cuts):
            arguments = (t[None], s[None], x, reference.g2(t[None]), reference.g2(s[None]))
            base = process.transition(z, *arguments, torch.zeros(1, 1))
            gain = process.transition(z + 1, *arguments, torch.zeros(1, 1)) - base
            noise = process.transition(z, *arguments, torch.ones(1, 1)) - base
            z, spread = base, gain**2 * spread + noise**2
    assert z.item() == pytest.approx(mean.item(), rel=2e-3)
    assert spread.item() == pytest.approx(variance.item(), rel=2e-3)


def test_transition_keeps_the_marginals_of_affine_processes(process, shape):
    """If eps_t is standard normal so is eps_s, for any g: it is rho eps_t + r noise with rho^2 + r^2 = 1."""
    eps, t, x = batch(shape, process=process)
    noise, s, zero = eps.roll(1, 0), 0.5 * t, torch.zeros_like(eps)

    def refreshed(state: Tensor, fresh: Tensor, g2: Tensor) -> Tensor:
        return process.inverse(process.transition(process.transform(state, t, x), t, s, x, g2, g2, fresh), s, x)

    still = torch.zeros(4)
    torch.testing.assert_close(refreshed(eps, noise, still), eps)
    if not isinstance(process, AffineProcess):
        return
    for g2 in (torch.full((4,), 0.3), process.reference_g2(t)):
        torch.testing.assert_close(refreshed(zero, zero, g2), zero)
        rho, fresh = refreshed(zero + 1, zero, g2), refreshed(zero, zero + 1, g2)
        torch.testing.assert_close(rho**2 + fresh**2, zero + 1)
        torch.testing.assert_close(refreshed(eps, noise, g2), rho * eps + fresh * noise)
        assert (rho < 0.999).all()


@pytest.mark.parametrize("name", [*PROCESSES, "derived", "sinh"])
def test_a_small_transition_is_a_step_of_the_reverse_sde(name):
    """Drift and covariance of z_s - z_t over dt, for any process: -(f - g^2 s / 2) and g^2, to first order."""
    process = {"sinh": Sinh, "derived": lambda shape: Derived(PROCESSES["nfdm"](shape))}.get(name, PROCESSES.get(name))((2,))
    perturb(process, 0.3)
    eps, t, x = batch((2,), process=process)
    g2, zero = 1.7 * process.reference_g2(t), torch.zeros_like(eps)
    z = process.transform(eps, t, x)
    errors = []
    for dt in (1e-5, 1e-6):
        s = t - dt

        def step(noise: Tensor, s: Tensor = s) -> Tensor:
            return process.transition(z, t, s, x, g2, 1.7 * process.reference_g2(s), noise)

        with torch.no_grad():
            mean, drawn = step(zero), step(eps.roll(1, 0))
        expected = -drift(process.path_at(z, t, x), g2)
        spread = expand_as_event(g2, z) ** 0.5 * eps.roll(1, 0)
        errors.append((((mean - z) / dt - expected).norm() / expected.norm(), ((drawn - mean) / dt**0.5 - spread).norm()))
    assert errors[1][0] < 0.2 * errors[0][0]
    assert errors[1][0] < 0.01
    assert errors[1][1] < 0.2 * errors[0][1]


class _Bad(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), layer)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(2), "silently wrong"),
        (nn.BatchNorm1d(2), "silently wrong"),
        (nn.InstanceNorm2d(2), "silently wrong"),
        (nn.Dropout(0.1), "deterministic"),
    ],
)
def test_layers_that_spoil_a_time_derivative_are_refused_by_name(layer, reason):
    process = NDM((2,), network=lambda inp, out: _Bad(layer))
    with pytest.raises(ConfigError, match=rf"NDM: layer 'network.inner.1' is a {type(layer).__name__}.*{reason}"):
        ReverseProcess(process, XPrediction(DataSpec((2,)), small_mlp), MatchedVolatility())


def test_layer_norm_is_refused_for_a_reason():
    """The gradient of a forward-mode derivative through LayerNorm differs from the true one: torch's own defect."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    t = torch.tensor([[0.3]])

    def gradient(jvp) -> Tensor:
        network.zero_grad()
        jvp(network, t, torch.ones_like(t))[1].sum().backward()
        return network[0].weight.grad.clone()

    forward = gradient(lambda f, u, v: torch.func.jvp(f, (u,), (v,)))
    true = gradient(lambda f, u, v: torch.autograd.functional.jvp(f, u, v, create_graph=True))
    if torch.allclose(forward, true, rtol=1e-3):
        pytest.skip("this torch differentiates LayerNorm's forward mode correctly")
    assert (forward - true).abs().max() > 1e-3


@pytest.mark.parametrize(
    "build",
    [
        partial(NFDM, (2,), delta=0.0),
        partial(NFDM, (2,), bound=-1.0),
        partial(LinearFlow, 1.5),
        partial(Cosine, 0.0),
        partial(VariancePreserving, 5.0, -5.0),
        partial(LearnedMonotone, 5.0, -5.0),
    ],
)
def test_settings_that_cannot_work_are_refused(build):
    with pytest.raises(ConfigError, match="must"):
        build()
