"""What single plug-ins promise beyond the contract: derivatives of any order, monotone schedules, flows, bridges."""

import math
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor

from conftest import PROCESSES, batch, data_for, perturb, small_mlp, small_network
from nfdm_lightning.bound import diffusion_loss, random_draws, variational_bound
from nfdm_lightning.decoder import GaussianDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks import UNet
from nfdm_lightning.predictor import DataSpec, LevelPrediction, XPrediction
from nfdm_lightning.processes import (
    NFDM,
    NFDMOT,
    AffineCoupling,
    Bridge,
    FlowNFDM,
    ForwardProcess,
    MuLAN,
    SeparableNFDM,
    SplineCoupling,
)
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.solvers import Adaptive, Ancestral, EulerMaruyama, Heun
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_separable_nfdm_has_time_derivatives_of_any_order_from_one_evaluation(shape):
    """Against nested forward-mode autodiff of F, and counted."""
    process = SeparableNFDM(shape, network=small_network)
    perturb(process)
    eps, t, x = batch(shape)
    calls = []
    process.network.register_forward_hook(lambda *_: calls.append(1))
    got = process.derivatives(eps, t, x, order=4)
    process.path(eps, t, x)
    assert len(calls) == 2

    def function(time: Tensor) -> Tensor:
        return process.transform(eps, time, x)

    for value in got:
        torch.testing.assert_close(value, function(t))

        def function(time: Tensor, inner=function) -> Tensor:
            return torch.func.jvp(inner, (time,), (torch.ones_like(time),))[1]


def test_separable_nfdm_bounds_its_noise_and_learns_any_polynomial():
    process = SeparableNFDM((2,), network=small_network, terms=3, bound=2.0)
    perturb(process, 100.0)
    _, _, x = batch((2,))
    log_std = process.moments(torch.full((4,), 0.5), x)[1].log()
    assert (log_std - 0.5 * math.log(0.01)).abs().max() <= 0.25 * 2.0 + 1e-9
    # the basis spans t (1 - t) times every polynomial of degree K - 1
    t = torch.linspace(0, 1, 7)
    powers = t[:, None] * (1 - t[:, None]) * t[:, None] ** torch.arange(3)
    joint = torch.cat([process.basis(t)[:, 0], powers], 1)
    assert torch.linalg.matrix_rank(process.basis(t)[:, 0]) == torch.linalg.matrix_rank(joint) == 3


def test_mulan_has_a_monotone_schedule_of_its_own_for_every_dimension_and_sample():
    torch.manual_seed(0)
    process = MuLAN((3,), network=small_network)
    _, _, x = batch((3,))
    t = torch.linspace(0, 1, 101)
    start, _ = process.gamma(t, process.coefficients(x[:1].expand(101, 3)))
    torch.testing.assert_close(start, (-13.3 + 18.3 * t)[:, None].expand(101, 3))  # linear before training
    perturb(process, 0.3)
    curves = torch.stack([process.gamma(t, process.coefficients(row.expand(101, 3)))[0] for row in x])
    assert (curves.diff(dim=1) > 0).all()
    torch.testing.assert_close(curves[:, 0], torch.full((4, 3), -13.3))
    torch.testing.assert_close(curves[:, -1], torch.full((4, 3), 5.0))
    middle = curves[:, 50]
    assert middle.std(0).min() > 0.1
    assert middle.std(1).min() > 0.1


@pytest.mark.parametrize(("flow", "shape"), [(SplineCoupling, (4,)), (AffineCoupling, (4,)), (AffineCoupling, (2, 4, 4))])
def test_flows_are_the_identity_at_both_ends_and_bend_the_noise_between_them(flow, shape):
    network = partial(UNet, channels=8, multipliers=(1,)) if len(shape) == 3 else small_mlp
    built = flow(shape, network=network)
    perturb(built, 0.3)
    eps, t, x = batch(shape)
    for end in (torch.zeros(4), torch.ones(4)):
        torch.testing.assert_close(built(eps, end, x), eps)
    # not affine: second differences do not vanish; and every output depends on other inputs
    direction = torch.ones_like(eps)
    bend = built(eps + direction, t, x) - 2 * built(eps, t, x) + built(eps - direction, t, x)
    assert bend.abs().max() > 0.05
    size = math.prod(shape)
    jacobian = torch.func.jacrev(lambda e: built(e[None], t[1:2], x[1:2])[0])(eps[1]).reshape(size, size)
    coupled = (jacobian - torch.diag(jacobian.diag())).abs() > 1e-12
    assert coupled.any(1).all()
    assert coupled.any(0).all()


def test_a_flow_makes_a_conditional_that_is_not_gaussian():
    process = FlowNFDM((2,), network=small_mlp, flow=partial(SplineCoupling, network=small_mlp))
    perturb(process, 0.5)
    eps = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    z = process.transform(eps, torch.full((4000,), 0.5), torch.ones(4000, 2)).detach()
    assert min(stats.normaltest(z[:, i].numpy()).pvalue for i in (0, 1)) < 1e-6


def test_nfdm_ot_is_straight_before_training_and_asks_for_a_penalty():
    process = NFDMOT((3,), network=small_mlp)
    eps, t, x = batch((3,))
    torch.testing.assert_close(process.transform(eps, t, x), (1 - t[:, None]) * x + (0.01 + 0.99 * t[:, None]) * eps)
    assert [penalty.weight for penalty in process.penalties] == [1e-2]
    assert not list(NFDM((3,), network=small_mlp).penalties)


STD, DELTA = 1.5, 0.02


def exact_bridge(shape: tuple[int, ...] = (1,)) -> ReverseProcess:
    """Targets N(0, STD^2), independent of the source: with its network at zero XPrediction is the posterior mean."""
    process = Bridge(shape, network=small_network, delta=DELTA, noise=1.0)
    return ReverseProcess(process, XPrediction(DataSpec(shape, None, STD, True), small_network), MatchedVolatility())


@pytest.mark.parametrize(
    "solver",
    [Ancestral(300), Ancestral(300, stochasticity=0.0), EulerMaruyama(500), Adaptive(1e-6, 1e-6)],
    ids=["ancestral", "ddim", "euler-maruyama", "ode"],
)
def test_a_bridge_reaches_the_data_from_every_source_by_sde_and_ode(solver):
    """All start within delta of one source sample and end in the whole distribution of the targets."""
    source = torch.full((1500, 1), 2.5)
    reverse = exact_bridge().given(source)
    z = reverse.prior(1500, torch.Generator().manual_seed(0))
    assert z.std().item() == pytest.approx(DELTA, rel=0.05)
    end = solver.solve(reverse, z, torch.Generator().manual_seed(1)).z
    scale = (STD**2 + DELTA**2) ** 0.5
    assert end.std().item() == pytest.approx(scale, rel=0.06)
    assert stats.kstest(((end[:, 0] - end.mean()) / end.std()).numpy(), "norm").pvalue > 1e-3
    assert abs(end.mean().item()) < 0.1


def test_the_bound_of_a_bridge_is_tight_on_gaussian_data():
    """-log p(x | source) of independent Gaussian targets: the entropy, whatever the source; exact in both directions."""
    reverse = exact_bridge()
    number = 200_000
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([STD * torch.randn(number, 1, generator=generator), 3 * torch.rand(number, 1, generator=generator)], 1)
    with torch.no_grad():
        terms = variational_bound(reverse, GaussianDecoder(), x, random_draws(x[:, 0], generator))
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    error = terms.nats.std().item() / number**0.5
    assert terms.prior.abs().max() == 0
    assert -4 * error < terms.nats.mean().item() - entropy < 4 * error + 0.02
    assert error < 0.02


def test_the_matched_volatility_of_a_bridge_is_that_of_brownian_motion_at_the_source():
    process = Bridge((1,), network=small_mlp, delta=1e-3, noise=0.7)
    g2 = process.reference_g2(torch.tensor([1.0, 0.9999, 0.999]))
    torch.testing.assert_close(g2, torch.full((3,), 0.49), rtol=0.02, atol=0)


@pytest.mark.parametrize("delta", [1e-3, 0.01, 0.1])
@pytest.mark.parametrize("ratio", [1.01, 3.0, 10.0, 100.0, 1000.0])
def test_the_volatility_of_a_bridge_is_positive_and_the_slope_of_its_ratio(delta, ratio):
    """For every scale of its noise: both cases of the integral, against the derivative by autodiff."""
    process = Bridge((1,), network=small_mlp, delta=delta, noise=ratio * delta)
    t = torch.linspace(0, 1, 201)
    g2 = process.reference_g2(t)
    assert (g2 > 0).all()
    torch.testing.assert_close(g2, ForwardProcess.reference_g2(process, t), rtol=1e-5, atol=1e-9)
    # away from the source it is that of the path alpha = 1 - t
    inner = t[1:100]
    alpha, sigma = process.reference(inner)
    exact = (
        2 * sigma**2 * torch.func.jvp(lambda u: process.reference(u)[1].log() - (1 - u).log(), (inner,), (inner * 0 + 1,))[1]
    )
    divergent = delta**2 * (1 + inner) / (process._brownian(inner) * alpha)
    torch.testing.assert_close(process.reference_g2(inner), exact - sigma**2 * divergent, rtol=1e-5, atol=1e-9)


def test_the_basis_of_separable_nfdm_in_single_precision():
    process = SeparableNFDM((2,), network=small_network, terms=16)
    t = torch.linspace(0, 1, 101)
    for order in (0, 1, 2, 3):
        exact = process.basis(t, order)
        assert (process.basis(t.float(), order) - exact).abs().max() < 1e-4 * exact.abs().max()
    # T_k(cos a) = cos(k a)
    k = torch.arange(16)
    expected = (t * (1 - t))[:, None] * torch.cos(k * torch.acos((2 * t - 1).clamp(-1, 1))[:, None])
    torch.testing.assert_close(process.basis(t)[:, 0], expected, rtol=0, atol=1e-12)


def test_a_steep_spline_is_inverted_in_single_precision():
    """Whatever the network says: its parameters are bounded."""
    torch.manual_seed(0)
    flow = SplineCoupling((2,), network=small_mlp)
    perturb(flow, 10.0)
    flow.float()
    eps, x = torch.randn(2, 5000, 2, dtype=torch.float32)
    t = torch.rand(5000, dtype=torch.float32)
    back, log_det = flow.inverse(flow(eps, t, x), t, x)
    assert torch.isfinite(log_det).all()
    assert (back - eps).abs().max() < 0.01


def test_the_predictor_of_a_bridge_sees_the_source():
    process = Bridge((2,), network=small_mlp)
    predictor = XPrediction(DataSpec((2,), None, 1.0, True), small_mlp)
    perturb(predictor)
    reverse = ReverseProcess(process, predictor, MatchedVolatility())
    z, t = torch.zeros(1, 2), torch.tensor([0.3])
    source = torch.tensor([[1.0, -1.0]])
    # the same state relative to the source's share of the mean: only the network can tell the two apart
    first, second = (reverse.given(k * source).x_hat(z + 0.3 * k * source, t)[:, 0] for k in (1.0, 2.0))
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(reverse.given(source).x_hat(z, t)[:, 1], source)
    assert reverse.source is None  # giving a source leaves the model as it is


@pytest.mark.parametrize("predictor", [XPrediction, LevelPrediction])
def test_a_bridge_of_images(predictor):
    shape = (1, 4, 4)
    process = PROCESSES["bridge"](shape)
    perturb(process)
    built = predictor(DataSpec(shape, 5, 0.7, True), small_network)
    reverse = ReverseProcess(process, built, LearnedVolatility())
    eps, t, x = batch(shape, process=process)
    loss, z = diffusion_loss(reverse.given(x[:, 1]), x, t, eps)
    assert loss.shape == (4,)
    assert z.shape == (4, *shape)
    assert Heun(2).solve(reverse.given(x[:, 1]), z).z.shape == (4, *shape)


def test_a_model_without_its_source_or_with_one_too_many_says_so():
    z, t = torch.zeros(2, 3), torch.full((2,), 0.5)
    predictor = XPrediction(DataSpec((3,), None, 1.0, True), small_mlp)
    with pytest.raises(ConfigError, match="Bridge is a bridge: give it source samples"):
        ReverseProcess(PROCESSES["bridge"]((3,)), predictor, MatchedVolatility()).x_hat(z, t)
    predictor = XPrediction(DataSpec((3,)), small_mlp)
    with pytest.raises(ConfigError, match="NFDM is not a bridge"):
        ReverseProcess(PROCESSES["nfdm"]((3,)), predictor, MatchedVolatility()).given(z).x_hat(z, t)


def test_data_for_a_bridge_are_pairs():
    process = PROCESSES["bridge"]((3,))
    assert data_for(process, torch.zeros(4, 3)).shape == (4, 2, 3)


@pytest.mark.parametrize(
    "build",
    [
        partial(Bridge, (2,), delta=0.0),
        partial(Bridge, (2,), noise=0.001),
        partial(Bridge, (2,), bound=0.0),
        partial(SeparableNFDM, (2,), terms=0),
        partial(SeparableNFDM, (2,), delta=2.0),
        partial(SeparableNFDM, (2,), bound=-1.0),
        partial(MuLAN, (2,), gamma_min=3.0, gamma_max=1.0),
        partial(MuLAN, (2,), bound=0.0),
        partial(SplineCoupling, (2,), layers=0),
        partial(SplineCoupling, (2,), bound=0.0),
        partial(SplineCoupling, (1, 4, 4)),
        partial(AffineCoupling, (1, 5, 4)),
        partial(AffineCoupling, (2,), bound=0.0),
    ],
)
def test_settings_that_cannot_work_are_refused(build):
    with pytest.raises(ConfigError):
        build()
