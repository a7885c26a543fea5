"""Penalties: the acceleration of the model's own trajectories, obstacles, and what training makes of them."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from conftest import PROCESSES, batch, perturb, small_data, small_mlp, small_model, small_network, small_trainer
from nfdm_lightning.bound import random_draws
from nfdm_lightning.callbacks import HealthCheck
from nfdm_lightning.errors import ConfigError, NonFiniteError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP, UNet
from nfdm_lightning.predictor import DataSpec, XPrediction
from nfdm_lightning.processes import NFDM, NFDMOT, Curvature, Gaussian, LinearFlow, Obstacle, Penalty, VariancePreserving
from nfdm_lightning.processes.penalties import acceleration
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility


class WithLayerNorm(ResidualMLP):
    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, out_shape, 16, 1)
        self.norm = nn.LayerNorm(2)


def learned(name: str, shape: tuple[int, ...]) -> tuple[ReverseProcess, Tensor, Tensor]:
    """A model whose every part is off its start, with states and times."""
    process = PROCESSES[name](shape)
    perturb(process)
    predictor = XPrediction(DataSpec(shape, None, 1.0, process.takes_source), small_network)
    perturb(predictor, seed=1)
    eps, t, x = batch(shape, process=process)
    reverse = ReverseProcess(process, predictor, LearnedVolatility()).given(process.split(x)[1])
    return reverse, process.transform(eps, t, x).detach(), t


def trajectory(reverse: ReverseProcess, z: Tensor, t: Tensor, until: float, steps: int = 1) -> Tensor:
    """The state at t + until by the classical Runge-Kutta method."""
    h = until / steps
    with torch.no_grad():
        for _ in range(steps):
            a = reverse.velocity(z, t)
            b = reverse.velocity(z + 0.5 * h * a, t + 0.5 * h)
            c = reverse.velocity(z + 0.5 * h * b, t + 0.5 * h)
            d = reverse.velocity(z + h * c, t + h)
            z, t = z + h / 6 * (a + 2 * b + 2 * c + d), t + h
    return z


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
@pytest.mark.parametrize("name", [name for name in PROCESSES if name not in ("gaussian_cosine", "gaussian_fm", "ndm_fm")])
def test_acceleration_is_the_second_difference_of_a_simulated_trajectory(name, shape):
    reverse, z, t = learned(name, shape)
    h = 5e-5
    states = [trajectory(reverse, z, t, k * h) for k in (-2, -1, 0, 1, 2)]
    expected = (-states[0] + 16 * states[1] - 30 * states[2] + 16 * states[3] - states[4]) / (12 * h**2)
    got = acceleration(reverse, z, t)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-4


def test_acceleration_without_a_graph():
    reverse, z, t = learned("nfdm", (3,))
    with torch.no_grad():
        got = acceleration(reverse, z, t)
    assert not got.requires_grad
    torch.testing.assert_close(got, acceleration(reverse, z, t).detach())


@pytest.mark.parametrize("name", ["nfdm", "flow_nfdm", "gaussian_vp", "bridge"])
def test_gradient_of_the_curvature_is_that_of_finite_differences(name):
    """Along a random direction of all parameters, through both the process and the predictor."""
    reverse, z, t = learned(name, (3,))
    parameters = [p for p in reverse.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator) for p in parameters]
    gradients = torch.autograd.grad(Curvature().cost(reverse, z, t).sum(), parameters, allow_unused=True)
    expected = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)

    def moved(h: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += h * d
            value = Curvature().cost(reverse, z, t).sum()
            for p, d in zip(parameters, direction, strict=True):
                p -= h * d
        return value

    h = 1e-5
    assert ((moved(h) - moved(-h)) / (2 * h)).item() == pytest.approx(float(expected), rel=1e-4)


def test_acceleration_in_closed_form():
    """For a single datum at 0 the model's ODE is z = sigma(t) eps: straight for a linear sigma, sigma'' eps else."""
    eps, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0.2, 0.8, 4)

    def model(schedule) -> ReverseProcess:
        predictor = XPrediction(DataSpec((2,), None, 1e-9), small_mlp)
        return ReverseProcess(Gaussian((2,), schedule=schedule), predictor, MatchedVolatility())

    straight = model(partial(LinearFlow, 0.05))
    assert acceleration(straight, straight.process.reference(t)[1][:, None] * eps, t).abs().max() < 1e-6
    curved = model(partial(VariancePreserving, -4.0, 3.0))
    sigma = curved.process.reference(t)[1]
    h = 1e-4
    second = (curved.process.reference(t + h)[1] - 2 * sigma + curved.process.reference(t - h)[1]) / h**2
    torch.testing.assert_close(acceleration(curved, sigma[:, None] * eps, t), second[:, None] * eps, rtol=1e-5, atol=1e-6)


def test_the_curvature_is_not_that_of_the_conditional_path():
    """With F linear in t at fixed eps and x (zero second derivative), the model's trajectories still bend: x_hat moves."""
    predictor = XPrediction(DataSpec((2,), None, 1.5), small_mlp)
    reverse = ReverseProcess(Gaussian((2,), schedule=LinearFlow), predictor, MatchedVolatility())
    z, t = torch.ones(1, 2), torch.tensor([0.5])
    assert acceleration(reverse, z, t).norm() > 0.1


def test_obstacle():
    obstacle = Obstacle(centre=(1.0, -1.0), radius=2.0, sharpness=50.0)
    z = torch.tensor([[1.0, -1.0], [1.0, 0.0], [4.0, -1.0]])
    torch.testing.assert_close(obstacle.depth(z), torch.tensor([2.0, 1.0, -1.0]))
    steady = SimpleNamespace(velocity=lambda z, t: torch.tensor([3.0, 4.0]).expand_as(z))
    cost = obstacle.cost(steady, z, torch.zeros(3)) / 5  # per unit of speed
    torch.testing.assert_close(cost, torch.tensor([2.0, 1.0, 0.0]), rtol=0, atol=1e-9)
    at_edge = torch.tensor([[3.0, -1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(obstacle.cost(steady, at_edge, torch.zeros(1)).sum() / 5, at_edge)
    torch.testing.assert_close(slope, torch.tensor([[-0.5, 0.0]]))  # pushed outwards
    with pytest.raises(ConfigError, match=r"2 numbers, but a state has shape \(3,\)"):
        obstacle.cost(None, torch.zeros(1, 3), torch.zeros(1))


def test_a_jump_across_an_obstacle_costs_as_much_as_a_slow_passage():
    """A straight path through the ball at speed v: the mean over time of the cost is the same for every v."""
    obstacle, costs = Obstacle(radius=1.0, sharpness=30.0), []
    for speed in (4.0, 40.0):
        t = torch.linspace(0, 1, 40_001)
        z = torch.stack([((t - 0.5) * speed).clamp(-2, 2), torch.zeros_like(t)], 1)
        moving = (z[:, 0].abs() < 2).to(z)[:, None]
        model = SimpleNamespace(velocity=lambda z, t, m=moving, v=speed: m * torch.tensor([v, 0.0]))
        costs.append(obstacle.cost(model, z, t).mean().item())
    assert costs[1] == pytest.approx(costs[0], rel=1e-2)


def test_weight_warms_up():
    penalty = Curvature(weight=0.5, warmup_steps=10)
    assert [penalty.weight_at(step) for step in (0, 5, 10, 1000)] == [0.0, 0.25, 0.5, 0.5]
    assert Curvature(weight=0.5).weight_at(0) == 0.5


@pytest.mark.parametrize(
    "build",
    [
        partial(Curvature, -1.0),
        partial(Curvature, 1.0, -1),
        partial(Curvature, fraction=0.0),
        partial(Obstacle, radius=0.0),
        partial(NFDMOT, (2,), weight=-1.0),
    ],
)
def test_settings_that_cannot_work_are_refused(build):
    with pytest.raises(ConfigError, match="must"):
        build()


def test_the_penalty_is_added_in_training_and_not_to_what_is_reported(tmp_path):
    """The training loss is bound + weight * cost, per dimension; the bound of evaluation has no penalty."""
    torch.manual_seed(0)
    plain = small_model(penalties=[Curvature])
    perturb(plain)
    weight, x = 3.0, torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    heavy = small_model(penalties=[partial(Curvature, weight=weight)])
    heavy.load_state_dict(plain.state_dict())
    losses = []
    for model in (plain, heavy):
        model.trainer = small_trainer(tmp_path)
        model._seed = 5
        model.log, model.log_dict = lambda *_, **__: None, lambda *_, **__: None
        losses.append(model.training_step(x, 0))
    cost = Curvature().cost(plain.reverse, plain.last_terms.z, plain.last_terms.t).mean()
    torch.testing.assert_close(losses[1] - losses[0], (weight - 1e-2) * cost / 2)
    torch.testing.assert_close(losses[0] * 2 - 1e-2 * cost, plain.last_terms.nats.mean())
    torch.testing.assert_close(plain.last_terms.nats, heavy.last_terms.nats)


def test_a_penalty_may_look_at_a_part_of_the_batch(tmp_path):
    """Half of the batch, as a mean over it; the source of a bridge is cut alike."""
    model = small_model(
        process=partial(PROCESSES["bridge"]), penalties=[partial(Curvature, weight=1.0, fraction=0.5)], data_std=1.0
    )
    perturb(model)
    model.trainer, model._seed = small_trainer(tmp_path), 5
    model.log, model.log_dict = lambda *_, **__: None, lambda *_, **__: None
    x = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(1))
    loss = model.training_step(x, 0)
    terms = model.last_terms
    cost = Curvature().cost(model.reverse.given(x[:4, 1]), terms.z[:4], terms.t[:4]).mean()
    torch.testing.assert_close(loss * 2, terms.nats.mean() + cost)


class Broken(Penalty):
    def cost(self, reverse, z, t):
        return z.sum(1) * math.nan


def test_a_penalty_that_is_not_finite_is_named(tmp_path):
    model = small_model(penalties=[partial(Obstacle, radius=0.1), partial(Obstacle, radius=0.2), Broken]).float()
    with pytest.raises(NonFiniteError, match="step 0: the penalty 'broken' on NFDM is nan"):
        small_trainer(tmp_path, callbacks=[HealthCheck()]).fit(model, small_data())
    assert set(model.last_penalties) == {"obstacle", "obstacle_1", "broken"}


def test_a_checkpoint_rebuilds_the_penalties(tmp_path):
    model = small_model(process=partial(NFDMOT, network=small_mlp, weight=0.3), penalties=[partial(Obstacle, radius=0.7)])
    trainer = small_trainer(tmp_path, max_steps=1)
    trainer.fit(model, small_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = NeuralDiffusion.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    curvature, obstacle = loaded.penalties
    assert (curvature.weight, obstacle.radius) == (0.3, 0.7)


def test_training_straightens_the_trajectories(tmp_path):
    """The same steps from the same start, with and without the penalty."""
    curvatures = {}
    for name, process in (("nfdm", NFDM), ("nfdm_ot", partial(NFDMOT, weight=1.0))):
        torch.manual_seed(0)
        model = small_model(process=partial(process, network=small_mlp), warmup_steps=1, decay="constant", lr=5e-3)
        small_trainer(tmp_path, max_steps=40).fit(model.double(), small_data())
        t = torch.linspace(0.1, 0.9, 200)
        z = model.reverse.prior(200, torch.Generator().manual_seed(0))
        curvatures[name] = acceleration(model.reverse, z, t).pow(2).sum(1).mean().item()
    assert curvatures["nfdm_ot"] < 0.5 * curvatures["nfdm"]
    assert math.isfinite(curvatures["nfdm_ot"])


def test_a_predictor_whose_derivative_would_be_wrong_is_refused():
    """LayerNorm's gradient under forward mode is silently wrong, and the curvature differentiates the predictor too."""
    small_model(predictor=partial(XPrediction, network=WithLayerNorm))
    with pytest.raises(ConfigError, match=r"Curvature differentiates the predictor: layer 'network.norm' is a LayerNorm"):
        small_model(predictor=partial(XPrediction, network=WithLayerNorm), penalties=[Curvature])


def test_states_and_times_belong_together_in_discrete_time():
    model = small_model(discrete_steps=4)
    perturb(model)
    x, draws = torch.randn(8, 2), random_draws(torch.zeros(8, 2), torch.Generator().manual_seed(0))
    terms = model.bound(x, draws)
    assert set((4 * terms.t).tolist()) == {1.0, 2.0, 3.0, 4.0}
    torch.testing.assert_close(terms.z, model.reverse.process.transform(draws.eps, terms.t, x))


def test_dropout_in_the_predictor_does_not_break_the_derivative():
    """A predictor may have dropout: primal and tangent then share one mask."""
    predictor = XPrediction(DataSpec((1, 4, 4)), partial(UNet, channels=8, multipliers=(1,), dropout=0.5))
    perturb(predictor)
    reverse = ReverseProcess(PROCESSES["nfdm"]((1, 4, 4)), predictor.train(), MatchedVolatility())
    z, t = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.6])
    assert torch.isfinite(acceleration(reverse, z, t)).all()
