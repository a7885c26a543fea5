"""Class labels: the conditional bound and guidance against closed forms, every plug-in under labels, who sees them."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from conftest import (
    PROCESSES,
    SHAPES,
    Ignored,
    batch,
    central_difference,
    data_for,
    perturb,
    small_flow,
    small_mlp,
    small_network,
)
from nfdm_lightning.bound import Draws, random_draws, variational_bound
from nfdm_lightning.decoder import GaussianDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.labels import Labelled, build_network, build_part, takes_labels
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import DiT, ResidualMLP, UNet, VDMUNet, auto
from nfdm_lightning.predictor import DataSpec, XPrediction
from nfdm_lightning.processes import (
    NFDM,
    AffineCoupling,
    AffineProcess,
    Curvature,
    FlowNFDM,
    ForwardProcess,
    Gaussian,
    SplineCoupling,
    VariancePreserving,
)
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.solvers import Adaptive, Ancestral, Euler, EulerMaruyama, Heun, TorchSDE
from nfdm_lightning.testing import check_process
from nfdm_lightning.volatility import LearnedVolatility, MatchedVolatility

MEANS, WEIGHTS, STD = torch.tensor([-1.5, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64), 0.5


class TwoClasses(nn.Module):
    """What makes XPrediction (of scale STD) the exact posterior mean for classes N(MEANS, STD^2), and for their mixture."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        assert num_classes == len(MEANS)
        self.schedule = VariancePreserving()

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (value[:, None] for value in self.schedule(t))
        variance = alpha**2 * STD**2 + sigma**2
        outputs = MEANS * sigma / (STD * variance.sqrt())  # (B, K)
        likelihood = -0.5 * (variance.sqrt() * x - alpha * MEANS) ** 2 / variance
        posterior = (likelihood + WEIGHTS.log()).softmax(1)
        chosen = torch.cat([torch.eye(2), torch.zeros(1, 2)])[label]
        return (torch.where(label[:, None] == 2, posterior, chosen) * outputs).sum(1, keepdim=True)


def two_classes() -> ReverseProcess:
    predictor = XPrediction(DataSpec((1,), std=STD, num_classes=2), TwoClasses)
    return ReverseProcess(Gaussian((1,)), predictor, MatchedVolatility())


def expected_bound(reverse: ReverseProcess, given: int, label: Tensor | None, cells: int = 600, nodes: int = 31) -> float:
    """The bound for data of one class, without sampling: the midpoint rule in t, finer towards the data, in x and in eps."""
    axis = torch.linspace(-6, 6, nodes)
    weight = torch.exp(-0.5 * axis**2)
    x, eps = torch.cartesian_prod(axis, axis).unbind(1)
    weight = torch.outer(weight, weight).flatten()
    weight = weight / weight.sum()
    x = (MEANS[given] + STD * x)[:, None]
    u = (torch.arange(cells) + 0.5) / cells
    times, slope = torch.expm1(9 * u) / math.expm1(9), 9 * torch.exp(9 * u) / math.expm1(9)
    many = len(x)
    draws = Draws(times.repeat_interleave(many), eps[:, None].repeat(cells, 1), eps[:, None].repeat(cells, 1))
    with torch.no_grad():
        terms = variational_bound(reverse, GaussianDecoder(), x.repeat(cells, 1), draws, label=label)
    diffusion = (terms.diffusion.unflatten(0, (cells, many)) @ weight * slope).mean()
    return float(diffusion + terms.reconstruction[:many] @ weight + terms.prior[:many] @ weight)


def test_the_conditional_bound_is_the_entropy_given_the_class():
    reverse, entropy = two_classes(), 0.5 * math.log(2 * math.pi * math.e * STD**2)
    right = [expected_bound(reverse, k, torch.tensor([k])) for k in range(2)]
    assert all(0 <= bound - entropy < 0.01 for bound in right)
    # the wrong class costs the divergence between the two
    for k in range(2):
        wrong = expected_bound(reverse, k, torch.tensor([1 - k]))
        assert wrong - right[k] == pytest.approx((MEANS[1] - MEANS[0]).item() ** 2 / (2 * STD**2), rel=0.01)
    # without labels it is the entropy of the mixture, by the mutual information of x and the class above the former
    x = torch.linspace(-6, 6, 20001)[:, None]
    log_prob = MixtureSameFamily(Categorical(WEIGHTS), Normal(MEANS, STD)).log_prob(x[:, 0])
    mixture = -float(torch.trapezoid(log_prob.exp() * log_prob, x[:, 0]))
    free = sum(WEIGHTS[k].item() * expected_bound(reverse, k, None) for k in range(2))
    assert 0 <= free - mixture < 0.01
    assert mixture - entropy > 0.3


@pytest.mark.parametrize("weight", [-0.5, 0.0, 0.4, 1.0, 3.0])
def test_guidance_mixes_the_scores(weight):
    """x_hat_w has the score (1 - w) grad log p_t(z) + w grad log p_t(z | y), each from its own density."""
    z, t = torch.linspace(-2, 2, 7)[:, None].requires_grad_(), torch.linspace(0.2, 0.9, 7)
    alpha, sigma = VariancePreserving()(t)
    parts = Normal(alpha[:, None] * MEANS, (alpha**2 * STD**2 + sigma**2).sqrt()[:, None].expand(-1, 2))
    free = MixtureSameFamily(Categorical(WEIGHTS.expand(7, 2)), parts).log_prob(z[:, 0]).sum()
    label = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    given = parts.log_prob(z).gather(1, label[:, None]).sum()
    free, given = (torch.autograd.grad(value, z)[0] for value in (free, given))
    guided = two_classes().given(label=label, guidance=weight).point(z.detach(), t).score
    torch.testing.assert_close(guided, (1 - weight) * free + weight * given)


def labelled(name: str, shape: tuple[int, ...], num_classes: int = 3) -> ForwardProcess:
    torch.manual_seed(0)
    built = build_part(PROCESSES[name], shape, num_classes)
    perturb(built)
    return built


LABELLED = [name for name in PROCESSES if not name.startswith("gaussian")]


CASES = [*((name, SHAPES["vector"]) for name in LABELLED), ("nfdm", SHAPES["image"]), ("flow_nfdm", SHAPES["image"])]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda value: value if isinstance(value, str) else len(value))
def test_every_learned_process_sees_its_labels(name, shape):
    free, (eps, t, x) = labelled(name, shape), batch(shape)
    x, label = data_for(free, x), torch.tensor([0, 1, 2, 1])
    process = free.given(label)
    point = process.path(eps, t, x)
    difference = central_difference(lambda time: process.transform(eps, time, x), t)
    torch.testing.assert_close(point.velocity, difference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.inverse(point.z, t, x), eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.path_at(point.z, t, x).velocity, point.velocity, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.path_at(point.z, t, x).score, point.score, rtol=1e-6, atol=1e-6)
    # sample by sample the label matters, and nobody else's; no label is one more
    ways = [free, *(free.given(torch.tensor([k])) for k in range(3))]
    alike = torch.stack([way.path(eps, t, x).z for way in ways])
    torch.testing.assert_close(point.z, alike[label + 1, torch.arange(4)])
    for one, other in itertools.combinations(alike, 2):
        assert (one - other).flatten(1).norm(dim=1).min() > 1e-6
    assert torch.equal(free.given(torch.tensor([3])).path(eps, t, x).z, alike[0])
    assert free.label is None  # the view leaves the process as it was


@pytest.mark.parametrize("name", ["flow_nfdm", "flow_affine"])
def test_a_flow_sees_the_labels_too(name):
    process, (eps, t, x) = labelled(name, (3,)), batch((3,))
    moved = [process.given(torch.tensor([k])).flow(eps, t, x) for k in range(2)]
    assert (moved[0] - moved[1]).norm(dim=1).min() > 1e-4


@pytest.mark.parametrize("name", LABELLED)
def test_other_names_of_the_classes_change_nothing(name):
    process, (eps, t, x) = labelled(name, (3,)), batch((3,))
    x, label, order = data_for(process, x), torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 3, 1])
    renamed = copy.deepcopy(process)
    for module in renamed.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data[order] = module.weight.data.clone()
    for one, other in (
        (process.given(label).path(eps, t, x), renamed.given(order[label]).path(eps, t, x)),
        (process.given(order).path(eps, t, x), renamed.given(order[order]).path(eps, t, x)),
    ):
        assert torch.equal(one.z, other.z)
        assert torch.equal(one.velocity, other.velocity)


def test_a_conditional_process_can_be_checked_under_a_label():
    process, (_, _, x) = labelled("nfdm", (3,)), batch((3,), 6)
    check_process(process.given(torch.tensor([1])), x)


def model(process: str = "nfdm", **settings: object) -> NeuralDiffusion:
    torch.manual_seed(0)
    predictor = partial(XPrediction, network=ResidualMLP)
    built = NeuralDiffusion((3,), process=PROCESSES[process], predictor=predictor, num_classes=3, **settings)
    perturb(built, 0.05)
    return built


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, None) for name in LABELLED), ("nfdm", 10), ("separable", 10), ("mulan", 10)]
)
def test_gradients_reach_the_labels_of_the_batch_and_no_others(name, steps):
    process = labelled(name, (3,))
    predictor = XPrediction(DataSpec((3,), source=process.takes_source, num_classes=3), small_network)
    reverse = ReverseProcess(process, predictor, LearnedVolatility())
    perturb(reverse)
    _, _, x = batch((3,), 8)
    label = torch.tensor([0, 3, 0, 3, 0, 0, 3, 0])
    variational_bound(reverse, GaussianDecoder(), data_for(process, x), random_draws(x), steps, label).nats.sum().backward()
    embeddings = {name: m.weight.grad for name, m in reverse.named_modules() if isinstance(m, nn.Embedding)}
    assert {name.split(".")[0] for name in embeddings} == {"process", "predictor"}
    for grad in embeddings.values():
        assert grad[[0, 3]].norm(dim=1).min() > 0
        assert grad[[1, 2]].abs().max() == 0


def test_checkpointed_gradients_keep_their_labels():
    """Evaluated again in the backward pass, after another batch with other labels has passed."""
    grads = []
    x = torch.randn(6, 3)
    draws, labels = random_draws(x), (torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor([2, 2, 1, 3, 0, 0]))
    for checkpointing in (False, True):
        built = model(checkpoint_process=checkpointing)
        sum(built.bound(Labelled(x, label), draws).nats.sum() for label in labels).backward()
        grads.append([parameter.grad for parameter in built.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_a_penalty_sees_the_labels():
    built = model(penalties=[partial(Curvature, fraction=0.5)])
    built.log = lambda *_, **__: None  # outside a trainer
    built._trainer = type("Trainer", (), {"global_step": 0})()
    x, label = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 3])
    terms = built.bound(Labelled(x, label))
    total = built._penalty(Labelled(x, label), terms)
    reverse = built.reverse.given(None, label[:3])
    expected = 1e-2 * Curvature().cost(reverse, terms.z[:3], terms.t[:3]).mean()
    torch.testing.assert_close(total, expected)
    other = 1e-2 * Curvature().cost(built.reverse, terms.z[:3], terms.t[:3]).mean()
    assert abs(total - other) > 1e-4 * expected


SOLVERS = [Euler(4), Heun(4), Ancestral(4), EulerMaruyama(4), Adaptive(1e-2, 1e-2), TorchSDE(5)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_guidance_of_one_is_conditional_and_of_zero_unconditional_bit_for_bit(solver):
    built, label = model("gaussian_vp").eval(), torch.tensor([0, 1, 2, 2, 1])
    calls = []
    built.reverse.predictor.network.register_forward_hook(lambda *_: calls.append(1))

    def draw(**settings):
        calls.clear()
        samples, solution = built.sample(5, solver, torch.Generator().manual_seed(0), **settings)
        assert solution.nfe == len(calls)
        return samples, solution.nfe

    plain, budget = draw(label=label)
    free, _ = draw()
    assert torch.equal(draw(label=label, guidance=1.0)[0], plain)
    nothing, twice = draw(label=label, guidance=0.0)
    assert torch.equal(nothing, free)
    assert torch.equal(draw(label=torch.full((5,), 3))[0], free)
    assert twice % 2 == 0
    if not isinstance(solver, Adaptive):
        assert twice == 2 * budget
    assert not torch.equal(plain, free)
    assert not torch.equal(draw(label=label, guidance=2.0)[0], plain)


def test_guidance_leaves_the_label_to_the_forward_process():
    built, (_, t, x), label = model(), batch((3,)), torch.tensor([0, 1, 2, 1])
    at = built.reverse.given(label=label, guidance=0.0)
    x_hat = built.reverse.x_hat(x, t)
    assert torch.equal(at.x_hat(x, t), x_hat)
    assert torch.equal(at.velocity(x, t), built.reverse.process.given(label).velocity_at(x, t, x_hat))
    assert not torch.equal(at.velocity(x, t), built.reverse.velocity(x, t))


@pytest.mark.parametrize("process", ["nfdm", "flow_nfdm"])
def test_samples_depend_on_their_own_label_alone(process):
    built, generators = model(process).eval(), [torch.Generator() for _ in range(3)]

    def draw(*label):
        for i, generator in enumerate(generators):
            generator.manual_seed(i)
        return built.sample(3, Ancestral(3), generators, label=torch.tensor(label), guidance=1.7)[0]

    first, second = draw(0, 1, 2), draw(0, 2, 2)
    torch.testing.assert_close(first[[0, 2]], second[[0, 2]], rtol=1e-12, atol=1e-12)
    assert (first[1] - second[1]).norm() > 1e-3


@pytest.mark.parametrize("kind", [UNet, VDMUNet, DiT, ResidualMLP, auto])
def test_networks_add_the_label_to_the_embedding_of_time(kind):
    small = {UNet: {"channels": 8}, VDMUNet: {"channels": 8, "blocks": 1}, DiT: {"width": 8, "depth": 1, "heads": 2}}
    torch.manual_seed(0)
    factory = partial(kind, **small.get(kind, {})) if kind in small else kind
    network, x, t = build_network(factory, (1, 4, 4), (2, 4, 4), 3), torch.randn(4, 1, 4, 4), torch.rand(4)
    perturb(network)
    label = torch.tensor([0, 3, 1, 0])
    out = network(x, t, label)
    assert out.shape == (4, 2, 4, 4)
    change = (network(x, t, torch.tensor([0, 3, 2, 0])) - out).flatten(1).norm(dim=1)
    assert change[2] > 1e-3
    assert change[[0, 1, 3]].max() < 1e-12
    assert torch.equal(network(x, t), network(x, t, torch.full((4,), 3)))
    # a label is a shift of the embedding
    plain = build_network(factory, (1, 4, 4), (2, 4, 4), None)
    states = {key: value for key, value in network.state_dict().items() if "classes" not in key}
    plain.load_state_dict(states)
    embed, table = plain.embed.forward, network.embed.classes.weight
    plain.embed.forward = lambda time, label=None: embed(time) + table[torch.tensor([0, 3, 1, 0])]
    torch.testing.assert_close(plain(x, t), out)


def test_who_takes_labels():
    assert all(takes_labels(kind) for kind in (UNet, auto, partial(auto), NFDM, partial(NFDM, delta=0.1), small_flow))
    assert not any(takes_labels(kind) for kind in (Gaussian, Ignored, partial(Ignored)))

    class Mine(AffineProcess):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__(shape)

        def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return (1 - t)[:, None] * x, (0.01 + t)[:, None]

    built = build_part(Mine, (3,), 4)  # a process that knows nothing of labels serves a conditional model
    assert built.num_classes is None
    eps, t, x = batch((3,))
    assert torch.equal(built.given(torch.tensor([0, 1, 2, 3])).path(eps, t, x).z, built.path(eps, t, x).z)
    with pytest.raises(ConfigError, match=r"the network Ignored takes no labels: give it an init argument num_classes"):
        build_part(partial(NFDM, network=Ignored), (3,), 4)
    with pytest.raises(ConfigError, match="the network Ignored takes no labels"):
        XPrediction(DataSpec((3,), num_classes=4), partial(Ignored))
    for flow in (partial(SplineCoupling, network=Ignored), partial(AffineCoupling, network=Ignored)):
        with pytest.raises(ConfigError, match="the network Ignored takes no labels"):
            build_part(partial(FlowNFDM, network=small_mlp, flow=flow), (3,), 4)


def test_dynamo_takes_a_labelled_network_whole():
    network = ResidualMLP((3,), (3,), width=8, depth=1, num_classes=2)
    perturb(network)
    x, t, label = torch.randn(4, 3), torch.rand(4), torch.tensor([0, 1, 2, 0])
    expected = network(x, t, label)
    network.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(network(x, t, label), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": torch.tensor([0, 1])}, r"labels have shape \(2,\); \(3,\) was expected"),
        ({"label": torch.tensor([0, 1, 4])}, "whole numbers from 0 to 2, or 3 for none"),
        ({"label": torch.tensor([0, -1, 1])}, "whole numbers from 0 to 2"),
        ({"label": torch.tensor([0.0, 1.0, 1.0])}, "whole numbers"),
        ({"guidance": 2.0}, "guidance=2 needs labels"),
        ({"label": torch.tensor([0, 1, 2]), "guidance": math.nan}, "guidance=nan must be finite"),
    ],
)
def test_labels_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        model().sample(3, Euler(1), **settings)


def test_labels_and_models_that_do_not_fit_are_refused():
    free = NeuralDiffusion((3,), process=Gaussian)
    x, label = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="the model is not conditional: it takes neither labels nor guidance"):
        free.sample(2, Euler(1), label=label)
    with pytest.raises(ConfigError, match="the model is not conditional: it takes neither"):
        free.sample(2, Euler(1), guidance=2.0)
    with pytest.raises(ConfigError, match=r"the data have labels, but the model is not conditional: set data.labels=false"):
        free.bound(Labelled(x, label))
    with pytest.raises(ConfigError, match=r"conditional on 3 classes: it needs data.labels=true"):
        model().bound(x)
    with pytest.raises(ConfigError, match=r"guidance=2 needs a model trained with model.label_dropout above 0"):
        model(label_dropout=0.0).sample(2, Euler(1), label=label, guidance=2.0)
    for settings, message in (
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"label_dropout": 1.0}, r"label_dropout=1.0 must lie in \[0, 1\)"),
        ({"process": partial(NFDM, num_classes=3)}, "model.process.num_classes=3, but the data have no labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            NeuralDiffusion((3,), **settings)
