"""Frozen, every process is one that somebody else has written: torchcfm, diffusers, VDM and NDM as printed."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from conftest import Known, batch, perturb, small_mlp
from nfdm_lightning.bound import Draws, diffusion_loss, discrete_diffusion_loss, variational_bound
from nfdm_lightning.decoder import DiscreteDecoder
from nfdm_lightning.predictor import DataSpec, XPrediction
from nfdm_lightning.processes import (
    NDM,
    NFDM,
    AffineCoupling,
    AffineProcess,
    Bridge,
    Cosine,
    FlowNFDM,
    Gaussian,
    LearnedMonotone,
    LinearFlow,
    MuLAN,
    Schedule,
    SeparableNFDM,
    SplineCoupling,
    VariancePreserving,
)
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def column(t: Tensor) -> Tensor:
    return t[:, None]


# --- flow matching: torchcfm ---------------------------------------------------------------------------------------------


class FrozenStd(nn.Module):
    """The network of NFDM or Bridge that makes std a given function of time, and m = 0."""

    def __init__(
        self, out_shape: tuple[int, ...], std: Callable[[Tensor], Tensor], fixed: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.size, self.std, self.fixed = out_shape[0] // 2, std, fixed

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        value = (self.std(t).log() - self.fixed(t).log()) / (t * (1 - t))
        return torch.cat([torch.zeros(len(t), self.size), column(value).expand(-1, self.size)], 1)


def frozen_nfdm(delta: float) -> NFDM:
    def network(_: tuple[int, ...], out: tuple[int, ...]) -> nn.Module:
        return FrozenStd(out, lambda t: t + (1 - t) * delta, lambda t: delta ** (1 - t))

    return NFDM((3,), network=network, delta=delta, bound=1e8)


def frozen_bridge(std: Callable[[Tensor], Tensor], delta: float = 0.01, noise: float = 0.7) -> Bridge:
    def fixed(t: Tensor) -> Tensor:
        return delta ** (1 - t) * (delta**2 * t + (1 - t) * (1 - t + noise**2 * t)).sqrt()

    return Bridge((3,), network=lambda _, out: FrozenStd(out, std, fixed), delta=delta, noise=noise, bound=1e8)


@pytest.fixture(scope="module")
def torchcfm():
    return pytest.importorskip("torchcfm.conditional_flow_matching")


@pytest.mark.parametrize("delta", [1e-3, 0.2])
@pytest.mark.parametrize("name", ["nfdm", "gaussian"])
def test_linear_path_is_flow_matching_of_lipman(torchcfm, name, delta):
    process = frozen_nfdm(delta) if name == "nfdm" else Gaussian((3,), schedule=partial(LinearFlow, delta))
    noise, t, x = batch((3,), 8)
    _, state, flow, eps = torchcfm.TargetConditionalFlowMatcher(sigma=delta).sample_location_and_conditional_flow(
        noise, x, 1 - t, return_noise=True
    )
    for point in (process.path(eps, t, x), process.path_at(state, t, x)):
        close(point.z, state)
        close(point.velocity, -flow)  # their time runs from noise to data


@pytest.mark.parametrize("name", ["nfdm", "gaussian"])
def test_linear_path_tends_to_conditional_flow_matching_as_delta_vanishes(torchcfm, name):
    """Independent coupling, sigma = 0: theirs is the limit, and ours differs by exactly delta (1 - t) eps."""
    delta = 1e-3
    process = frozen_nfdm(delta) if name == "nfdm" else Gaussian((3,), schedule=partial(LinearFlow, delta))
    eps, t, x = batch((3,), 8)
    _, state, flow = torchcfm.ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(eps, x, 1 - t)
    point = process.path(eps, t, x)
    close(point.z, state + delta * column(1 - t) * eps)
    close(point.velocity, -flow - delta * eps)


def test_cosine_path_is_variance_preserving_flow_matching(torchcfm):
    eps, t, x = batch((3,), 8)
    matcher = torchcfm.VariancePreservingConditionalFlowMatcher(sigma=0.0)
    _, state, flow = matcher.sample_location_and_conditional_flow(eps, x, 1 - t)
    point = Gaussian((3,), schedule=partial(Cosine, 1e-9)).path(eps, t, x)
    torch.testing.assert_close(point.z, state, rtol=0, atol=1e-7)
    torch.testing.assert_close(point.velocity, -flow, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["constant", "schrodinger"])
def test_frozen_bridge_is_that_of_flow_matching(torchcfm, name):
    if name == "constant":
        matcher, process = torchcfm.ConditionalFlowMatcher(sigma=0.3), frozen_bridge(lambda t: torch.full_like(t, 0.3))
    else:
        matcher = torchcfm.SchrodingerBridgeConditionalFlowMatcher(sigma=0.3)
        process = frozen_bridge(lambda t: 0.3 * (t * (1 - t)).sqrt())
    (eps, t, x), source = batch((3,), 8), batch((3,), 8, seed=2)[0]
    state = matcher.sample_xt(source, x, 1 - t, eps)
    point = process.path(eps, t, torch.stack([x, source], 1))
    close(point.z, state)
    # theirs has 1e-8 in a denominator
    torch.testing.assert_close(
        point.velocity, -matcher.compute_conditional_flow(source, x, 1 - t, state), rtol=1e-6, atol=1e-6
    )


# --- VDM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 7, 1000])
@pytest.mark.parametrize("schedule", [VariancePreserving, LearnedMonotone])
def test_bound_of_the_variance_preserving_process_is_that_of_vdm(schedule, steps):
    """All three terms from gamma alone, in continuous and in discrete time (arXiv 2107.00630, sections 3 and 4)."""
    process = Gaussian((3,), schedule=partial(schedule, -6.0, 2.0))
    perturb(process, 0.3)
    gamma, levels = process.schedule.gamma, 65
    eps, eps_0 = (batch((3,), 6, seed)[0] for seed in (1, 2))
    t = torch.rand(6, generator=torch.Generator().manual_seed(4))
    grid = torch.linspace(-1, 1, levels)
    index = torch.randint(levels, (6, 3), generator=torch.Generator().manual_seed(3))
    x = grid[index]
    x_hat = 0.7 * x + 0.1
    reverse = ReverseProcess(process, Known((3,), x_hat), MatchedVolatility())
    terms = variational_bound(reverse, DiscreteDecoder(levels), x, Draws(t, eps, eps_0), steps)

    gamma_0, gamma_1 = gamma(torch.tensor([0.0, 1.0]))
    logits = -0.5 * ((x + (0.5 * gamma_0).exp() * eps_0)[..., None] - grid) ** 2 * (-gamma_0).exp()
    reconstruction = -logits.log_softmax(-1).gather(-1, index[..., None])[..., 0].sum(1)
    assert reconstruction.min() > 0.1
    close(terms.reconstruction, reconstruction)

    variance = torch.sigmoid(gamma_1)
    close(terms.prior, 0.5 * ((1 - variance) * x**2 + variance - 1 - variance.log()).sum(1))

    if steps is None:
        (weight,) = torch.autograd.grad(gamma(t.requires_grad_()).sum(), t) if schedule is LearnedMonotone else (8.0,)
    else:
        t = (t * steps).ceil() / steps
        weight = steps * torch.expm1(gamma(t) - gamma(t - 1 / steps))
    alpha, sigma = (column(torch.sigmoid(sign * gamma(t)).sqrt()) for sign in (-1, 1))
    z = alpha * x + sigma * eps
    eps_hat = (z - alpha * x_hat) / sigma
    close(terms.diffusion, 0.5 * weight * ((eps - eps_hat) ** 2).sum(1))
    close(terms.z, z)


# --- DDPM and DDIM: diffusers --------------------------------------------------------------------------------------------


class Tabulated(Schedule):
    """Variance preserving, gamma linear between its values at the times i / T."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.register_buffer("gamma", ((1 - alphas_cumprod) / alphas_cumprod).log())

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = t * len(self.gamma)
        index = place.floor().long().clamp(0, len(self.gamma) - 2)
        gamma = self.gamma[index] + (place - index) * (self.gamma[index + 1] - self.gamma[index])
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


# alpha stays above 0.05, from where on the reference volatility takes it for 0.05
BETAS = {
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.01},
}


def scheduler_and_process(name: str, betas: str, steps: int):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=1000, clip_sample=False, prediction_type="sample", **BETAS[betas]
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    assert scheduler.alphas_cumprod.min() > 0.05**2
    return scheduler, Gaussian((3,), schedule=partial(Tabulated, scheduler.alphas_cumprod))


@pytest.mark.parametrize("betas", BETAS)
def test_states_are_those_of_diffusers(betas):
    scheduler, process = scheduler_and_process("DDPMScheduler", betas, 1000)
    eps, _, x = batch((3,), 6)
    index = torch.tensor([0, 1, 250, 500, 998, 999])
    close(process.reference(index / 1000)[0] ** 2, scheduler.alphas_cumprod[index])
    close(process.transform(eps, index / 1000, x), scheduler.add_noise(x, eps, index))


@pytest.mark.parametrize("steps", [1000, 20])
@pytest.mark.parametrize("betas", BETAS)
def test_posterior_is_that_of_ddpm(betas, steps):
    scheduler, process = scheduler_and_process("DDPMScheduler", betas, steps)
    z, _, x_hat = batch((3,), 5)
    for index in scheduler.timesteps[:: steps // 10].tolist()[:-1]:
        t, s = (torch.full((5,), i / 1000) for i in (index, index - 1000 // steps))
        mean, std = process.posterior(
            z, t, s, process.step_moments(t, s, x_hat), process.reference_g2(t), process.reference_g2(s)
        )
        for seed in (0, 1):  # two draws tell mean and std apart
            noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            step = scheduler.step(x_hat, index, z, generator=torch.Generator().manual_seed(seed))
            close(mean + std * noise, step.prev_sample)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1000, 20])
@pytest.mark.parametrize("betas", BETAS)
def test_transition_is_that_of_ddim(betas, steps, eta):
    scheduler, process = scheduler_and_process("DDIMScheduler", betas, steps)
    z, _, x_hat = batch((3,), 5)
    noise = batch((3,), 5, seed=2)[0]
    for index in scheduler.timesteps[:: steps // 10].tolist()[:-1]:
        t, s = (torch.full((5,), i / 1000) for i in (index, index - 1000 // steps))
        g2_t, g2_s = (eta**2 * process.reference_g2(u) for u in (t, s))
        step = scheduler.step(x_hat, index, z, eta=eta, variance_noise=noise if eta else None)
        close(process.transition(z, t, s, x_hat, g2_t, g2_s, noise), step.prev_sample)


# --- NDM in discrete time ------------------------------------------------------------------------------------------------


def test_posterior_of_ndm_is_that_of_the_paper():
    """arXiv 2310.08337, section 3, with DDPM's variance."""
    process = NDM((3,), network=small_mlp)
    perturb(process, 0.3)
    eps, t, x = batch((3,), 6)
    x_hat, s = 0.8 * x + 0.1, 0.7 * t
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([column(value) for value in process.schedule(u)] for u in (t, s))
    with torch.no_grad():
        maps = [[u_data + column(u) * process.network(u_data, u) for u_data in (x, x_hat)] for u in (t, s)]
        z = alpha_t * maps[0][0] + sigma_t * eps
        v = sigma_s**2 / sigma_t**2 * (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2)
        g2_t, g2_s = process.reference_g2(t), process.reference_g2(s)
        ends = [process.step_moments(t, s, data) for data in (x, x_hat)]
        for at_ends, at_t, at_s in zip(ends, *maps, strict=True):
            mean, std = process.posterior(z, t, s, at_ends, g2_t, g2_s)
            close(mean, alpha_s * at_s + (sigma_s**2 - v).sqrt() / sigma_t * (z - alpha_t * at_t))
            close(std**2, v.expand(6, 3))
        (at_t, at_t_hat), (at_s, at_s_hat) = maps
        difference = alpha_s * (at_s - at_s_hat) - (sigma_s**2 - v).sqrt() * alpha_t / sigma_t * (at_t - at_t_hat)
        assert (at_t - at_t_hat - (x - x_hat)).abs().max() > 0.01  # the map is not the identity
        close(process.posterior_kl(z, t, s, *ends, g2_t, g2_s), (difference**2 / (2 * v)).sum(1))


# --- discrete time tends to continuous time ------------------------------------------------------------------------------

LEARNED = {
    "ndm": partial(NDM, network=small_mlp),
    "nfdm": partial(NFDM, network=small_mlp),
    "separable": partial(SeparableNFDM, network=small_mlp),
    "mulan": partial(MuLAN, network=small_mlp),
    "bridge": partial(Bridge, network=small_mlp),
}


@pytest.mark.parametrize("name", LEARNED)
def test_discrete_time_tends_to_continuous_time_at_first_order(name):
    """T KL against the loss, averaged over fixed times, where std depends on x and g is not the reference."""
    torch.manual_seed(0)
    process, volatility = LEARNED[name]((3,)), LearnedVolatility()
    predictor = XPrediction(DataSpec((3,), source=process.takes_source), small_mlp)
    for seed, module in enumerate((process, volatility, predictor)):
        perturb(module, 0.25, seed)
    times = torch.arange(1, 17) / 16
    eps, _, x = (part.repeat_interleave(16, 0) if part.ndim > 1 else part for part in batch((3,), 4))
    t = times.repeat(4)
    if process.takes_source:
        x = torch.stack([x, batch((3,), 4, seed=2)[2].repeat_interleave(16, 0)], 1)
    reverse = ReverseProcess(process, predictor, volatility).given(process.split(x)[1])
    with torch.no_grad():
        limit, _ = diffusion_loss(reverse, x, t, eps)
        # a time in the middle of a step is moved to its end, t
        errors = [
            (discrete_diffusion_loss(reverse, x, t - 0.5 / steps, eps, steps)[0] - limit).mean().item()
            for steps in (2**14, 2**15, 2**16, 2**17)
        ]
    assert abs(errors[-1]) < 0.01 * limit.mean().item()
    for coarse, fine in itertools.pairwise(errors):
        assert fine / coarse == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["nfdm", "separable", "mulan"])
def test_posterior_variance_is_that_of_the_sde_whatever_x(name):
    r"""Its ratio at x and x_hat is 1 + O(1 / T), or T KL would diverge.

    Derived: :math:`v = g^2 dt\,[1 - dt\,(\text{std}'/\text{std} + g'/g + g^2 / (2\,\text{std}^2))]`.
    """
    process, volatility = LEARNED[name]((3,)), LearnedVolatility()
    perturb(process, 0.25)
    perturb(volatility, 0.25, 1)
    _, t, x = batch((3,), 6)
    x_hat, steps = 0.5 * x - 0.3, 1e7
    s = t - 1 / steps
    g2_t, g2_s = (volatility(u, process.reference_g2(u)) for u in (t, s))
    with torch.no_grad():
        stds = [process.posterior(x, t, s, process.step_moments(t, s, data), g2_t, g2_s)[1] for data in (x, x_hat)]
        moments = [process.moments_dt(t, data) for data in (x, x_hat)]
        rates = [m.std_dt / m.std + column(g2_t) / (2 * m.std**2) for m in moments]
    assert (moments[0].std / moments[1].std).log().abs().max() > 0.1
    for std in stds:
        torch.testing.assert_close(std**2 * steps, column(g2_t).expand(6, 3), rtol=0.02, atol=0)
    torch.testing.assert_close(2 * steps * (stds[0] / stds[1]).log(), rates[1] - rates[0], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", ["nfdm", "mulan"])
def test_posterior_kl_is_that_of_torch_where_stds_differ(name):
    process = LEARNED[name]((3,))
    perturb(process, 0.25)
    z, t, x = batch((3,), 6)
    s, x_hat = 0.7 * t, 0.5 * x - 0.3
    g2_t, g2_s = process.reference_g2(t), process.reference_g2(s)
    with torch.no_grad():
        ends = [process.step_moments(t, s, data) for data in (x, x_hat)]
        laws = [Normal(*process.posterior(z, t, s, at_ends, g2_t, g2_s)) for at_ends in ends]
        assert (laws[0].stddev / laws[1].stddev).log().abs().max() > 0.1
        close(process.posterior_kl(z, t, s, *ends, g2_t, g2_s), kl_divergence(*laws).sum(1))


# --- general couplings ---------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A network whose output depends on nothing."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(out_shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.value.expand(len(x), *self.value.shape)


class Composed(AffineProcess):
    """NFDM after coupling layers of constant (r, h): written out dimension by dimension."""

    def __init__(self, network: nn.Module, layers: list[tuple[list[float], list[float]]]) -> None:
        super().__init__((3,))
        self.network, self.layers = network, layers

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        output, time = self.network(x, t), column(t)
        mean = (1 - time) * x + time * (1 - time) * output[:, :3]
        std = torch.exp((1 - time) * math.log(0.01) + time * (1 - time) * 8 * torch.tanh(output[:, 3:] / 8))
        scale, shift = [torch.ones_like(t)] * 3, [torch.zeros_like(t)] * 3
        for k, (r, h) in enumerate(self.layers):
            for place, dim in enumerate([1] if k % 2 == 0 else [0, 2]):
                factor = torch.exp(t * (1 - t) * 4 * math.tanh(r[place] / 4))
                scale[dim], shift[dim] = scale[dim] * factor, shift[dim] * factor + t * (1 - t) * h[place]
        return mean + std * torch.stack(shift, 1), std * torch.stack(scale, 1)


def assert_same_process(general: FlowNFDM, affine: AffineProcess, same: Callable[..., None]) -> None:
    eps, t, x = batch((3,), 6)
    x_hat = 0.8 * x + 0.1
    z = affine.transform(eps, t, x)
    points = ((process.path(eps, t, x), process.path_at(z, t, x_hat)) for process in (general, affine))
    for mine, other in zip(*points, strict=True):
        for field in ("z", "velocity", "score"):
            same(getattr(mine, field), getattr(other, field))
    same(general.inverse(z, t, x_hat), affine.inverse(z, t, x_hat))
    same(general.log_prob(z, t, x_hat), affine.log_prob(z, t, x_hat))
    same(general.start(eps, x), affine.start(eps, x))
    same(general.prior_kl(eps, x), affine.prior_kl(eps, x))
    volatility = LearnedVolatility()
    perturb(volatility)
    models = (ReverseProcess(process, Known((3,), x_hat), volatility) for process in (general, affine))
    same(*(diffusion_loss(model, x, t, eps)[0] for model in models))


def test_flow_nfdm_with_a_diagonal_flow_is_affine():
    process = FlowNFDM((3,), network=small_mlp, flow=partial(AffineCoupling, network=Constant))
    perturb(process.affine, 0.3)
    perturb(process.flow, 1.5, seed=1)
    layers = [tuple(part.tolist() for part in network.value.detach().chunk(2)) for network in process.flow.networks]
    assert_same_process(process, Composed(process.affine.network, layers), partial(close, rtol=1e-6, atol=1e-6))


def zeroed_flow(flow: type) -> FlowNFDM:
    process = FlowNFDM((3,), network=small_mlp, flow=partial(flow, network=small_mlp))
    perturb(process.affine, 0.3)
    with torch.no_grad():
        for parameter in process.flow.parameters():
            parameter.zero_()
    return process


@pytest.mark.parametrize("flow", [AffineCoupling, SplineCoupling])
def test_flow_nfdm_with_a_zeroed_flow_is_nfdm(flow):
    process = zeroed_flow(flow)
    assert_same_process(process, process.affine, close)


@pytest.mark.parametrize("flow", [AffineCoupling, SplineCoupling])
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_transition_of_flow_nfdm_with_a_zeroed_flow_is_that_of_nfdm(flow, factor):
    process = zeroed_flow(flow)
    (z, t, x), noise = batch((3,), 6), batch((3,), 6, seed=2)[0]
    s = 0.9 * t
    g2_t, g2_s = (factor * process.reference_g2(u) for u in (t, s))
    expected, actual = (p.transition(z, t, s, x, g2_t, g2_s, noise) for p in (process.affine, process))
    close(actual, expected)
