"""check_process: silent on every shipped plug-in, and for each of many faults it names that fault."""

import copy
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import PROCESSES, SHAPES, small_mlp
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.processes import NDM, NFDM, AffineProcess, Bridge, ForwardProcess, Gaussian, LinearFlow, PathPoint
from nfdm_lightning.processes.base import expand_as_event, sum_event
from nfdm_lightning.testing import ContractError, Finding, check_process, findings

SHAPE = (3,)


def data(process: ForwardProcess, seed: int = 0, number: int = 4) -> torch.Tensor:
    event = (2, *process.shape) if process.takes_source else process.shape
    return torch.randn(number, *event, generator=torch.Generator().manual_seed(seed))


class Plain(NFDM):
    """NFDM with a small network: what most of the faults are put into."""

    def __init__(self, shape=SHAPE, network=small_mlp):
        super().__init__(shape, network=network)


class Sinh(ForwardProcess):
    """Sound, and not affine in eps: z = (1 - t) x + std sinh(a eps) / a, where a = t(1 - t) pins both ends."""

    def __init__(self, shape=SHAPE):
        super().__init__(shape)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def parts(self, t, x):
        time = expand_as_event(t, x)
        return (1 - time) * x, self.delta ** (1 - time), 1e-3 + self.scale**2 * time * (1 - time)

    def transform(self, eps, t, x):
        mean, std, a = self.parts(t, x)
        return mean + std * torch.sinh(a * eps) / a

    def inverse(self, z, t, x):
        mean, std, a = self.parts(t, x)
        return torch.asinh(a * (z - mean) / std) / a

    def log_prob(self, z, t, x):
        _, std, a = self.parts(t, x)
        eps = self.inverse(z, t, x)
        return sum_event(-0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - std.log() - torch.cosh(a * eps).log())


def with_point(change):
    """Puts a fault into path and path_at alike; ``change`` is given the process, the moments, eps and the true point."""

    class Changed(Plain):
        def path(self, eps, t, x):
            at = self.moments_dt(t, x)
            return change(self, at, eps, super().path(eps, t, x))

        def path_at(self, z, t, x):
            return self.path(self.inverse(z, t, x), t, x)

    return Changed


ScoreSign = with_point(lambda process, at, eps, p: PathPoint(p.z, p.velocity, -p.score))
ScoreWithoutStd = with_point(lambda process, at, eps, p: PathPoint(p.z, p.velocity, -eps))
ScoreOfVariance = with_point(lambda process, at, eps, p: PathPoint(p.z, p.velocity, p.score / at.std))
ScoreHalved = with_point(lambda process, at, eps, p: PathPoint(p.z, p.velocity, 0.5 * p.score))
ScoreWithoutGradient = with_point(lambda process, at, eps, p: PathPoint(p.z, p.velocity, p.score.detach()))
VelocityWithoutNoise = with_point(lambda process, at, eps, p: PathPoint(p.z, at.mean_dt + 0 * eps, p.score))
VelocityMeanSign = with_point(lambda process, at, eps, p: PathPoint(p.z, at.std_dt * eps - at.mean_dt, p.score))
VelocitySign = with_point(lambda process, at, eps, p: PathPoint(p.z, -p.velocity, p.score))


class BrokenInverse(Plain):
    def inverse(self, z, t, x):
        mean, std = self.moments(t, x)
        return (z - mean) * std


class LogProbWithoutStd(Plain):
    def log_prob(self, z, t, x):
        return super().log_prob(z, t, x) + sum_event(self.moments(t, x)[1].log())


class LogProbMean(Plain):
    def log_prob(self, z, t, x):
        return super().log_prob(z, t, x) / z[0].numel()


class LogProbWithoutConstant(Plain):
    def log_prob(self, z, t, x):
        return super().log_prob(z, t, x) + 0.5 * math.log(2 * math.pi) * z[0].numel()


class SinhWithoutDeterminant(Sinh):
    def log_prob(self, z, t, x):
        _, _, a = self.parts(t, x)
        return super().log_prob(z, t, x) + sum_event(torch.cosh(a * self.inverse(z, t, x)).log())


class Softplus(AffineProcess):
    """std(1) = softplus(0) = 0.69."""

    def __init__(self):
        super().__init__(SHAPE)
        self.network = small_mlp(SHAPE, SHAPE)

    def moments(self, t, x):
        time = expand_as_event(t, x)
        raw = time * (1 - time) * self.network(x, t)
        return (1 - time) * x, (1 - time) * 0.01 + time * functional.softplus(raw)

    def prior_kl(self, eps, x):
        return x.new_zeros(len(x))


class NotPinned(Plain):
    """The mean does not vanish at t = 1."""

    def moments(self, t, x):
        mean, std = super().moments(t, x)
        return mean + 3 * expand_as_event(t, x) * x, std

    prior_kl = AffineProcess.prior_kl


class PriorKLHalved(NDM):
    def __init__(self):
        super().__init__(SHAPE, network=small_mlp)

    def prior_kl(self, eps, x):
        return 2 * super().prior_kl(eps, x)


class BridgeToNoise(Bridge):
    """Ends in its source, but says that it ends in N(0, I)."""

    def __init__(self):
        super().__init__(SHAPE, network=small_mlp)

    def prior(self, eps, source):
        return eps

    def prior_log_prob(self, z, source):
        return ForwardProcess.prior_log_prob(self, z, source)


class PriorDensity(Bridge):
    """Starts around its source, but gives the density of N(0, I)."""

    def __init__(self):
        super().__init__(SHAPE, network=small_mlp)

    prior_log_prob = ForwardProcess.prior_log_prob


class BridgeSwapped(Bridge):
    def __init__(self):
        super().__init__(SHAPE, network=small_mlp)

    def join(self, x_hat, source):
        return torch.stack([source, x_hat], 1)


class Detached(Plain):
    def moments(self, t, x):
        shift, raw = self.network(x, t).chunk(2, dim=1)
        time = expand_as_event(t, x)
        log_std = (1 - time) * (math.log(self.delta) + time * raw)
        return (1 - time) * (x + time * shift.detach()), log_std.exp()


class DetachedNetwork(Plain):
    def __init__(self):
        super().__init__()
        self.extra = small_mlp(SHAPE, SHAPE)

    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        with torch.no_grad():
            shift = self.extra(x, t)
        return mean + time * (1 - time) * shift, std


class Reversed(Plain):
    def moments(self, t, x):
        return super().moments(1 - t, x)

    start = ForwardProcess.start
    prior_kl = AffineProcess.prior_kl


class WithDropout(Plain):
    def __init__(self):
        super().__init__(network=partial(ResidualMLP, width=16, depth=1, dropout=0.2))


class Random(Plain):
    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + 0.1 * time * (1 - time) * torch.rand(()), std


class Normed(nn.Module):
    def __init__(self, layer, in_shape, out_shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_shape[0] + 1, 16), layer(16), nn.SiLU(), nn.Linear(16, out_shape[0]))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], 1))


class BatchMean(Plain):
    """Centres with the mean of the batch instead of a layer that the check of layers would know."""

    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * torch.tanh(x - x.mean(0)), std


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(2))


class PathAtIgnoresState(Plain):
    def path_at(self, z, t, x):
        point = self.path(torch.zeros_like(z), t, x)
        return PathPoint(z, point.velocity, point.score)


class VelocityAtTwice(Plain):
    def velocity_at(self, z, t, x):
        return 2 * super().velocity_at(z, t, x)


class VelocityAtDetached(Plain):
    def velocity_at(self, z, t, x):
        return super().velocity_at(z, t, x).detach()


class TransitionTooNoisy(Plain):
    def transition(self, z, t, s, x, g2_t, g2_s, noise):
        mean, _ = self.posterior(z, t, s, self.step_moments(t, s, x), g2_t, g2_s)
        return mean + self.moments(s, x)[1] * noise * (g2_t[:, None] > 0)


class TransitionTooFast(Plain):
    def log_refresh(self, t, s, g2_t, g2_s, std_t, std_s, like):
        return 2 * super().log_refresh(t, s, g2_t, g2_s, std_t, std_s, like)


class SinhTransition(Sinh):
    def transition(self, z, t, s, x, g2_t, g2_s, noise):
        still = torch.zeros_like(g2_t)
        return (
            super().transition(z, t, s, x, g2_t, g2_s, 0 * noise) + super().transition(z, t, s, x, still, still, noise) * 0
        )  # no fresh noise


class StartWithoutNoise(Plain):
    def start(self, eps, x):
        return x


class StartElsewhere(Plain):
    """Says nothing about its delta, which the reference takes for 0.01."""

    def __init__(self):
        super().__init__()
        self.network = nn.Identity()

    def moments(self, t, x):
        time = expand_as_event(t, x)
        return (1 - time) * x, 0.3 ** (1 - time)

    start = ForwardProcess.start


class HardFloat32(Plain):
    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * torch.sin(x.float()), std


class MadeInFloat32(Plain):
    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * (x @ torch.eye(3, dtype=torch.float32)), std


class HardDevice(Plain):
    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * torch.linspace(0, 1, 3, dtype=x.dtype), std


class HardDeviceProduct(Plain):
    """A product, whose kernel for meta tensors does not look at the device."""

    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * (x @ torch.eye(3, dtype=x.dtype)), std


class Unregistered(Plain):
    def __init__(self):
        super().__init__()
        self.shift = [torch.ones(3)]

    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * self.shift[0].to(x), std


class ModuleInAList(Plain):
    def __init__(self):
        super().__init__()
        self.parts = [small_mlp(SHAPE, SHAPE)]

    def moments(self, t, x):
        mean, std = super().moments(t, x)
        time = expand_as_event(t, x)
        return mean + time * (1 - time) * self.parts[0](x, t), std


class NegativeVolatility(Plain):
    def reference_g2(self, t):
        return -super().reference_g2(t)


class VolatilityHalved(Plain):
    def reference_g2(self, t):
        return 0.5 * super().reference_g2(t)


class Underflow(Gaussian):
    """sigma(0) = 0."""

    def __init__(self):
        super().__init__(SHAPE, schedule=LinearFlow)
        self.schedule.delta = 0.0


class NumericalVelocity(Plain):
    """The time derivative by finite differences, whose times are cut off from the graph."""

    def path(self, eps, t, x):
        h = 1e-5
        time = t.detach()
        velocity = (self.transform(eps, time + h, x) - self.transform(eps, time - h, x)) / (2 * h)
        point = super().path(eps, t, x)
        return PathPoint(point.z, velocity, point.score)

    def path_at(self, z, t, x):
        return self.path(self.inverse(z, t, x), t, x)


class Crash(Plain):
    def inverse(self, z, t, x):
        raise KeyError("cache")


class WrongShape(Plain):
    def log_prob(self, z, t, x):
        return super().log_prob(z, t, x)[:, None]


def bad_norm(layer):
    return lambda: Plain(network=partial(Normed, layer))


# name: (process, the check that must find it, what it must say, most findings)
FAULTS = {
    "score with the opposite sign": (ScoreSign, "score", r"200 %.*opposite sign", 1),
    "score without 1/std": (ScoreWithoutStd, "score", r"lacks the factor 1/std, as eps does", 1),
    "score divided by the std twice": (ScoreOfVariance, "score", r"divided by the std once too often", 1),
    "half the score": (ScoreHalved, "score", r"0\.5 times what it should be", 1),
    "score without gradient": (ScoreWithoutGradient, "gradients", r"path\(\)\.score \(in the parameters missing", 1),
    "velocity without the noise": (VelocityWithoutNoise, "velocity", r"lacks the derivative of the noise", 1),
    "velocity with -mean'": (VelocityMeanSign, "velocity", r"derivative of the mean has the wrong sign", 1),
    "minus the velocity": (VelocitySign, "velocity", r"opposite sign", 1),
    "broken inverse": (BrokenInverse, "round_trip", r"not divided by the std|differs from eps", 1),
    "log_prob without log std": (LogProbWithoutStd, "log_prob", r"lacks the log std", 1),
    "log_prob averaged": (LogProbMean, "log_prob", r"mean over the 3 dimensions", 1),
    "log_prob without its constant": (LogProbWithoutConstant, "log_prob", r"lacks -D/2 log\(2 pi\)", 1),
    "flow without its determinant": (SinhWithoutDeterminant, "log_prob", r"differs from log N\(eps\)", 1),
    "std(1) of a softplus": (Softplus, "prior_kl", r"0\.69\d* instead of 1.*not pinned", 1),
    "mean(1) is not 0": (NotPinned, "prior_kl", r"does not end in its prior", 1),
    "twice the prior KL": (PriorKLHalved, "prior_kl", r"2 times what it should be", 1),
    "density of another prior": (PriorDensity, "prior_kl", r"prior_log_prob is", 1),
    "bridge to noise": (BridgeToNoise, "prior_kl", r"not pinned to the prior", 1),
    "bridge with swapped ends": (BridgeSwapped, "source", r"join\(\*split\(x\)\) is not x", 1),
    "part of the mean detached": (Detached, "gradients", r"in the parameters wrong by", 2),  # forward mode stops there too
    "a network in no_grad": (DetachedNetwork, "gradients", r"'extra\..*are detached", 2),
    "time reversed": (Reversed, "ends", r"time runs backwards", 2),
    "dropout": (WithDropout, "layers", r"Dropout", 2),
    "random numbers": (Random, "basics", r"differ between two calls", 1),
    "LayerNorm": (bad_norm(nn.LayerNorm), "layers", r"LayerNorm.*silently wrong", 1),
    "BatchNorm": (bad_norm(nn.BatchNorm1d), "layers", r"BatchNorm1d.*silently wrong", 2),
    "mean over the batch": (BatchMean, "batch", r"depend on the others", 1),
    "unused parameter": (Unused, "gradients", r"'temperature'.*nothing depends on", 1),
    "path_at ignores z": (PathAtIgnoresState, "path_at", r"z is not used", 1),
    "twice the velocity_at": (VelocityAtTwice, "path_at", r"velocity_at\(z\) differs .*2 times", 1),
    "velocity_at without gradient": (VelocityAtDetached, "gradients", r"velocity_at \(in the parameters missing", 1),
    "transition without sqrt(1 - rho^2)": (TransitionTooNoisy, "transition", r"lacks the factor sqrt", 1),
    "transition at twice the rate": (TransitionTooFast, "transition", r"rate that differs", 1),
    "transition of a flow without noise": (SinhTransition, "transition", r"do not keep q\(z_s \| x\)", 1),
    "start without noise": (StartWithoutNoise, "ends", r"it has no noise", 1),
    "start away from the reference": (StartElsewhere, "ends", r"std 30 sigma", 1),
    "float32 inside": (HardFloat32, "precision", r"jumps.*computes in float32", 1),
    "a constant in float32": (MadeInFloat32, "dtype", r"same dtype.*test_testing\.py:\d+", 1),
    "a constant on the CPU": (HardDevice, "device", r"on the CPU wherever.*test_testing\.py:\d+", 1),
    "a product with a constant on the CPU": (HardDeviceProduct, "device", r"on the CPU wherever", 1),
    "unregistered tensor": (Unregistered, "attributes", r"shift holds tensors", 1),
    "module in a list": (ModuleInAList, "attributes", r"parts holds tensors", 2),
    "negative reference_g2": (NegativeVolatility, "reference", r"must be finite and above 0", 1),
    "half of reference_g2": (VolatilityHalved, "reference", r"0\.5 times", 2),
    "std(0) = 0": (Underflow, "ends", r"not finite at t = 0", 2),
    "numerical velocity": (NumericalVelocity, "second", r"cannot be differentiated again", 1),
    "an exception": (Crash, "basics", r"raised KeyError.*cache.*test_testing\.py:\d+", 1),
    "a wrong shape": (WrongShape, "basics", r"log_prob has shape \(4, 1\) instead of \(4,\)", 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(name):
    build, check, message, most = FAULTS[name]
    torch.manual_seed(0)
    process = build()
    with pytest.raises(ContractError) as caught:
        check_process(process, data(process))
    found = caught.value.findings
    assert any(one.check == check and _matches(message, one) for one in found), str(caught.value)
    assert len(found) <= most, str(caught.value)
    assert all(str(one) in str(caught.value) for one in found)
    assert type(process).__name__ in str(caught.value)


def _matches(message: str, finding: Finding) -> bool:
    return re.search(message, finding.message) is not None


SOUND = [(name, SHAPE) for name in PROCESSES]
# these differ from another in what the shape of the data does not matter to
SOUND += [
    (name, shape)
    for name in PROCESSES
    if name not in ("ndm_fm", "nfdm_ot", "flow_nfdm")
    for shape in ((1,), SHAPES["image"])
]


@pytest.mark.parametrize(("name", "shape"), SOUND)
def test_a_shipped_plugin_is_sound(name, shape):
    torch.manual_seed(0)
    process = PROCESSES[name](shape)
    assert findings(process, data(process)) == []


def test_a_sound_process_that_is_not_affine():
    check_process(Sinh(), data(Sinh()))


def test_the_caller_notices_nothing():
    process, noisy = Plain().float(), Random().float()
    before = copy.deepcopy(process.state_dict())
    process.eval()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    x = torch.randn(8, 3, dtype=torch.float32)
    kept = x.clone()
    torch.set_rng_state(state)
    with torch.no_grad():
        check_process(process, x)
        assert not torch.is_grad_enabled()
    assert findings(noisy, x)  # draws random numbers of its own
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(x, kept)
    assert not process.training
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in process.parameters())
    assert all(torch.equal(value, before[name]) for name, value in process.state_dict().items())


def test_the_same_seed_finds_the_same():
    process = ScoreSign()
    x = data(process)
    assert findings(process, x, 1) == findings(process, x, 1)
    assert findings(process, x, 1)[0].check == "score"


def test_data_of_images_in_other_types():
    process = Gaussian((1, 4, 4), schedule=LinearFlow)
    check_process(process, torch.from_numpy(np.random.default_rng(0).integers(0, 2, (4, 1, 4, 4), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("shape", "x", "message"),
    [
        ((3,), (4, 2), r"shape \(B, 3\), not \(4, 2\)"),
        ((3,), (1, 3), "one sample"),
        ((3, 16, 16), (4, 3, 16, 16), "smaller x"),
    ],
)
def test_data_that_cannot_be_used_are_refused(shape, x, message):
    with pytest.raises(ValueError, match=message):
        check_process(Gaussian(shape), torch.zeros(x))


def test_a_bridge_wants_pairs():
    with pytest.raises(ValueError, match=r"pairs .* shape \(B, 2, 3\)"):
        check_process(Bridge(SHAPE, network=small_mlp), torch.zeros(4, 3))
