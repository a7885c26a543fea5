"""Times and noise of training: every way estimates the same bound, with the variance that theory says."""

import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import stats
from torch import Tensor

from conftest import CONFIGS, gaussian_data_model, perturb, small_data, small_model, small_trainer
from nfdm_lightning.bound import Draws, indexed_draws, random_draws, variational_bound
from nfdm_lightning.callbacks import EMA, NLL
from nfdm_lightning.cli import main
from nfdm_lightning.decoder import GaussianDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.processes import Gaussian, Penalty
from nfdm_lightning.time_sampling import (
    AdaptiveTimes,
    LowDiscrepancyTimes,
    TimeSampler,
    UniformTimes,
    low_discrepancy_times,
)


def profile(t: Tensor) -> Tensor:
    """A loss that is mostly near t = 0, as a diffusion loss may be; its integral is :data:`INTEGRAL`."""
    return 5 * torch.exp(-8 * t) + t**2


INTEGRAL = 5 * (1 - math.exp(-8)) / 8 + 1 / 3
SQUARES = 25 * (1 - math.exp(-16)) / 16 + 1 / 5 + 10 * (2 - math.exp(-8) * (64 + 16 + 2)) / 512


def learned(loss=profile, batches: int = 60, size: int = 256, **settings: float) -> AdaptiveTimes:
    """A density that has seen a loss, at the times that it drew itself."""
    times, generator = AdaptiveTimes(**settings), torch.Generator().manual_seed(1)  # type: ignore[arg-type]
    for _ in range(batches):
        t, _ = times.draw(size, torch.zeros(1), generator)
        times.observe(t, loss(t))
    return times


def density(times: AdaptiveTimes, t: Tensor) -> Tensor:
    return times.bins * times.probabilities(t)[(t * times.bins).long().clamp(max=times.bins - 1)]


SAMPLERS = {
    "uniform": UniformTimes,
    "low_discrepancy": LowDiscrepancyTimes,
    "adaptive_new": AdaptiveTimes,
    "adaptive": learned,
    "adaptive_coarse": partial(learned, bins=3, uniform=0.3),
}


@pytest.mark.parametrize("number", [1, 37])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_unbiased_at_every_place_of_the_batch(name, number):
    times, generator = SAMPLERS[name](), torch.Generator().manual_seed(0)
    draws = [times.draw(number, torch.zeros(1), generator) for _ in range(1500 if number < 37 else 300)]
    t, weight = (torch.stack(column) for column in zip(*draws, strict=True))
    assert t.shape == weight.shape
    assert ((t >= 0) & (t <= 1)).all()
    for value, expected in ((profile(t) * weight, INTEGRAL), (weight, 1.0)):
        for place in (value.mean(1), value[:, 0], value[:, -1]):
            error = place.std() / len(place) ** 0.5
            assert abs(place.mean() - expected) <= 4 * error + 1e-9


def test_the_density_integrates_to_one_and_the_inverse_cdf_is_its_inverse():
    times = learned(bins=7)
    grid = (torch.arange(70_000) + 0.5) / 70_000
    p = density(times, grid)
    assert p.mean().item() == pytest.approx(1, abs=1e-9)
    assert p.min() >= times.uniform
    assert p.max() / p.min() > 5
    t, weight = times.place(grid)
    torch.testing.assert_close(weight, 1 / density(times, t))
    ends = np.concatenate([[0], np.cumsum(p.reshape(7, -1).mean(1).numpy()) / 7])
    np.testing.assert_allclose(t.numpy(), np.interp(grid.numpy(), ends, np.arange(8) / 7), atol=1e-9)
    # by quadrature over u, without chance: the mean of loss / p at t(u) is the integral of the loss
    assert (profile(t) * weight).mean().item() == pytest.approx(INTEGRAL, rel=1e-5)


def test_the_ends_of_the_interval_are_reached_and_not_left():
    times = learned(bins=5)
    u = torch.tensor([0.0, 1e-12, 1 - 1e-12, 1.0])
    t, _ = times.place(u)
    assert t[0] == 0
    assert ((t >= 0) & (t <= 1)).all()
    torch.testing.assert_close(t, u, atol=1e-10, rtol=0)


def test_the_density_is_spread_out_over_the_batch():
    """Every bin gets its share of the batch but for less than one time at each of its edges."""
    times = learned(bins=8)
    share = times.probabilities(torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        t, _ = times.draw(100, torch.zeros(1), generator)
        counts = torch.bincount((8 * t).long(), minlength=8)
        assert (counts - 100 * share).abs().max() < 1 + 1e-9
    ranks = torch.stack([times.draw(16, torch.zeros(1), generator)[0].argsort().argsort() for _ in range(2000)]).double()
    assert stats.kstest((ranks[:, 3] + torch.rand(2000)).numpy() / 16, "uniform").pvalue > 1e-3  # in random order


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_density_is_the_root_of_the_second_moment(share):
    """For a loss that is random at each t, with E[loss^2 | t] = 4 profile(t)^2."""

    def loss(t: Tensor) -> Tensor:
        return profile(t) * (1 + math.sqrt(3) * torch.randn(len(t)))

    times = learned(loss, batches=150, size=4096, bins=8, uniform=share)
    fine = profile((torch.arange(8000) + 0.5) / 8000).reshape(8, -1)
    root = (fine**2).mean(1).sqrt()
    expected = (1 - share) * root / root.sum() + share / 8
    torch.testing.assert_close(times.probabilities(torch.zeros(1)), expected, rtol=0.04, atol=0)


def test_the_variance_falls_by_the_factor_of_theory():
    """Of one time: the integral of loss^2 / p less the squared mean."""
    times = learned(uniform=0.1)
    grid = (torch.arange(320_000) + 0.5) / 320_000
    predicted = (profile(grid) ** 2 / density(times, grid)).mean().item() - INTEGRAL**2
    uniform = SQUARES - INTEGRAL**2
    assert predicted < 0.1 * uniform
    t, weight = times.place(torch.rand(400_000, generator=torch.Generator().manual_seed(0)))
    assert (profile(t) * weight).var().item() == pytest.approx(predicted, rel=0.02)
    t, weight = UniformTimes().draw(400_000, torch.zeros(1), torch.Generator().manual_seed(0))
    assert (profile(t) * weight).var().item() == pytest.approx(uniform, rel=0.02)


def test_the_density_follows_a_loss_that_changes():
    times = learned(bins=4, decay=0.9)
    for _ in range(100):
        t, _ = times.draw(64, torch.zeros(1))
        times.observe(t, profile(1 - t))
    probabilities = times.probabilities(torch.zeros(1))
    assert probabilities.argmax() == 3
    expected = learned(lambda t: profile(1 - t), bins=4, decay=0.9).probabilities(torch.zeros(1))
    torch.testing.assert_close(probabilities, expected, rtol=0.05, atol=0)


def test_a_loss_that_is_not_finite_is_not_counted():
    times, clean = AdaptiveTimes(bins=4), AdaptiveTimes(bins=4)
    t, losses = torch.linspace(0, 1, 9), torch.tensor([1.0, math.inf, 2.0, 3.0, math.nan, 1.0, 1e300, 2.0, 5.0])
    times.observe(t, losses)
    usable = [0, 2, 3, 5, 7, 8]
    clean.observe(t[usable], losses[usable])
    assert torch.equal(times.state_dict()["sums"], clean.state_dict()["sums"])
    assert torch.isfinite(density(times, t)).all()


def test_without_a_loss_the_density_is_uniform():
    times = AdaptiveTimes()
    u = torch.rand(50)
    for _ in range(2):
        t, weight = times.place(u)
        torch.testing.assert_close(t, u)
        torch.testing.assert_close(weight, torch.ones(50))
        times.observe(u, torch.zeros(50))  # where the prediction is perfect from the start


@pytest.mark.parametrize("settings", [{"bins": 0}, {"uniform": 0.0}, {"uniform": 1.5}, {"decay": 1.0}, {"decay": -0.1}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=f"AdaptiveTimes: {next(iter(settings))}=.* must"):
        AdaptiveTimes(**settings)


# --- the bound


def test_default_draws_are_those_of_the_plain_formula():
    x = torch.zeros(5, 3)
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(1, generator=generator, dtype=torch.float64)
    t = (u + torch.randperm(5, generator=generator) / 5) % 1
    eps, eps_0 = torch.randn((2, 5, 3), generator=generator)
    assert torch.equal(low_discrepancy_times(5, x, torch.Generator().manual_seed(3)), t)
    for times in (None, LowDiscrepancyTimes()):
        draws = random_draws(x, torch.Generator().manual_seed(3), times)
        for got, expected in ((draws.t, t), (draws.eps, eps), (draws.eps_0, eps_0), (draws.weight, torch.ones(5))):
            assert torch.equal(got, expected)


def test_a_weight_of_one_changes_no_bit():
    model = small_model()
    perturb(model)
    x, draws = torch.randn(6, 2), random_draws(torch.zeros(6, 2))
    plain, weighted = (model.bound(x, Draws(draws.t, draws.eps, draws.eps_0, one)) for one in (None, torch.ones(6)))
    assert torch.equal(plain.nats, weighted.nats)
    for first, second in zip(*(torch.autograd.grad(one.nats.sum(), model.reverse.predictor.parameters())
                               for one in (plain, weighted)), strict=True):  # fmt: skip
        assert torch.equal(first, second)


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize(
    ("name", "antithetic"), [("uniform", False), ("low_discrepancy", True), ("adaptive", False), ("adaptive_coarse", True)]
)
def test_every_way_estimates_the_same_bound(name, steps, antithetic):
    """In discrete time too, where t is moved to the end of its step; against a grid of times and Gauss-Hermite noise."""
    reverse, x = gaussian_data_model(Gaussian((1,)), 0.7), torch.tensor([[0.9]])
    decoder = GaussianDecoder(0.01)
    nodes, weights = (torch.tensor(value) for value in np.polynomial.hermite_e.hermegauss(3))
    cells = 3000
    grid = ((torch.arange(cells) + 0.5) / cells).repeat_interleave(3)
    with torch.no_grad():
        eps = nodes.repeat(cells)[:, None]
        terms = variational_bound(reverse, decoder, x.expand(3 * cells, 1), Draws(grid, eps, eps), steps)
        expected = (terms.diffusion.reshape(cells, 3) @ (weights / weights.sum())).mean()
        times, generator = SAMPLERS[name](), torch.Generator().manual_seed(0)
        batch = x.expand(200, 1)
        draws = [random_draws(batch, generator, times, antithetic) for _ in range(100)]
        means = torch.stack([variational_bound(reverse, decoder, batch, one, steps).diffusion.mean() for one in draws])
    assert abs(means.mean() - expected) < 4 * means.std() / 10
    assert means.std() / 10 < 0.02 * expected


class Square(Penalty):
    def cost(self, reverse, z, t):
        return t**2


def training_model(tmp_path, times: TimeSampler, **settings: object) -> NeuralDiffusion:
    model = small_model(**settings)
    perturb(model)
    model.trainer, model._seed, model.times = small_trainer(tmp_path), 5, times
    model.log, model.log_dict = lambda *_, **__: None, lambda *_, **__: None
    return model


def test_penalties_keep_their_meaning(tmp_path):
    """The mean over uniform t of t^2 is 1/3, whatever the density of the times."""
    model, costs = training_model(tmp_path, learned(), penalties=[partial(Square, fraction=0.5)]), []
    model.times.observe = lambda t, losses: None
    for seed in range(40):
        model._seed = seed
        loss = model.training_step(torch.randn(64, 2), 0)
        costs.append(model.last_penalties["square"])
        terms = model.last_terms
        assert costs[-1] == (terms.t[:32] ** 2 * terms.weight[:32]).mean()
        torch.testing.assert_close(2 * loss, terms.nats.mean() + costs[-1])
    costs = torch.stack(costs)
    assert abs(costs.mean() - 1 / 3) < 4 * costs.std() / len(costs) ** 0.5


@pytest.mark.parametrize("steps", [None, 4])
def test_training_teaches_the_sampler_the_loss_without_its_weight(tmp_path, steps):
    model = training_model(tmp_path, learned(bins=16), discrete_steps=steps)
    seen: list[tuple[Tensor, Tensor]] = []
    model.times.observe = lambda t, losses: seen.append((t, losses))
    x = torch.randn(8, 2)
    model.training_step(x, 0)
    draws = random_draws(x, model.step_generator(), model.times)
    plain = model.bound(x, Draws(draws.t, draws.eps, draws.eps_0))
    ((t, losses),) = seen
    assert torch.equal(t, draws.t)  # as drawn, not as moved to the grid of discrete time
    torch.testing.assert_close(losses, plain.diffusion.detach())
    torch.testing.assert_close(model.last_terms.diffusion, plain.diffusion.detach() / density(model.times, t))


# --- antithetic noise


@pytest.mark.parametrize("number", [1, 6, 7])
def test_the_halves_of_an_antithetic_batch_are_mirrored(number):
    x = torch.zeros(number, 2, 3)
    draws = random_draws(x, torch.Generator().manual_seed(0), antithetic=True)
    plain = random_draws(x, torch.Generator().manual_seed(0))
    half = number // 2
    assert torch.equal(draws.eps[number - half :], -draws.eps[:half])
    assert torch.equal(draws.eps[: number - half], plain.eps[: number - half])
    assert torch.equal(draws.t, plain.t)
    assert torch.equal(draws.eps_0, plain.eps_0)
    many = torch.cat([random_draws(x, torch.Generator().manual_seed(s), antithetic=True).eps[-1:] for s in range(300)])
    assert stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("draws", [1, 4, 5])
def test_every_second_evaluation_is_mirrored(draws):
    x, index = torch.zeros(6, 3), torch.tensor([0, 1, 2, 30, 31, 1_000_000])
    for k in range(draws):
        got, plain = (indexed_draws(x, index, k, draws, 7, antithetic) for antithetic in (True, False))
        first = indexed_draws(x, index, k - k % 2, draws, 7)
        assert torch.equal(got.eps, -first.eps if k % 2 else plain.eps)
        assert torch.equal(got.t, plain.t)
        assert torch.equal(got.eps_0, plain.eps_0)
        part = indexed_draws(x[2:4], index[2:4], k, draws, 7, antithetic=True)
        for name in ("t", "eps", "eps_0"):
            assert torch.equal(getattr(part, name), getattr(got, name)[2:4])


def test_a_mirrored_pair_cancels_what_is_odd_in_the_noise():
    """At one x and t the loss is even plus odd in eps: the mean of a pair is the even part, whose variance is less."""
    reverse, eps = gaussian_data_model(Gaussian((1,)), 0.7), torch.randn(2000, 1)
    t, x = torch.full((2000,), 0.6), torch.full((2000, 1), 2.5)
    with torch.no_grad():
        loss = [variational_bound(reverse, GaussianDecoder(), x, Draws(t, e, e)).diffusion for e in (eps, -eps)]
        even, odd = (loss[0] + loss[1]) / 2, (loss[0] - loss[1]) / 2
    # of (a x + b eps)^2 the odd part is 2 a b x eps, with a variance in the ratio 2 (a x / b)^2 to that of b^2 eps^2
    slope = torch.linalg.lstsq(torch.cat([torch.ones(2000, 1), eps**2], 1), even[:, None]).solution[:, 0]
    torch.testing.assert_close(odd**2 / eps[:, 0] ** 2, (4 * slope[0] * slope[1]).expand(2000))
    assert even.var() < 0.3 * loss[0].var()


@pytest.mark.parametrize("switch", ["antithetic", "importance"])
def test_evaluation_does_not_depend_on_the_batches(tmp_path, switch):
    def evaluate(batch_size: int, draws: int = 3, **switches: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = small_model(process=Gaussian).float()
        model.times = learned(lambda t: torch.exp(-3 * t))
        trainer = small_trainer(tmp_path, callbacks=[NLL(test_draws=draws, **switches)])
        trainer.test(model, small_data(eval_size=60, eval_batch_size=batch_size), verbose=False)
        return tuple(trainer.callback_metrics[f"test/{name}"].item() for name in ("nats", "nats_se"))

    whole = evaluate(60, **{switch: True})
    assert evaluate(7, **{switch: True}) == pytest.approx(whole, rel=1e-4)
    assert evaluate(60) != pytest.approx(whole, rel=1e-4)
    # the same bound, but for the error of its draws, which is part of that of the data
    value, error = evaluate(60, draws=60)
    assert evaluate(60, draws=60, **{switch: True})[0] == pytest.approx(value, abs=error)


# --- runs


def run(folder, steps: int, resume: bool = False) -> tuple[NeuralDiffusion, dict[str, object]]:
    torch.manual_seed(0)
    model = small_model(times=partial(AdaptiveTimes, bins=8), antithetic=True, decay="constant").float()
    keep = ModelCheckpoint(folder, filename="kept", every_n_train_steps=6, save_top_k=1, enable_version_counter=False)
    trainer = small_trainer(folder, max_steps=steps, callbacks=[EMA(), keep], enable_checkpointing=True)
    trainer.fit(model, small_data(), ckpt_path=folder / "kept.ckpt" if resume else None, weights_only=True)
    return model, torch.load(folder / "kept.ckpt", weights_only=True)


def test_a_resumed_run_has_the_times_of_one_never_stopped(tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    model, whole = run(tmp_path / "whole", 12)
    assert (model.times.probabilities(torch.zeros(1)) - 1 / 8).abs().max() > 0.01
    run(tmp_path / "stopped", 6)
    again, resumed = run(tmp_path / "stopped", 12, resume=True)
    assert torch.equal(again.times.state_dict()["sums"], model.times.state_dict()["sums"])
    assert torch.equal(resumed["nfdm_times"]["sums"], whole["nfdm_times"]["sums"])
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name
    loaded = NeuralDiffusion.load_from_checkpoint(tmp_path / "whole" / "kept.ckpt", weights_only=True)
    assert isinstance(loaded.times, AdaptiveTimes)
    assert loaded.antithetic
    assert torch.equal(loaded.times.state_dict()["sums"], model.times.state_dict()["sums"])


def test_weights_can_be_used_with_any_sampler(tmp_path):
    _, checkpoint = run(tmp_path, 6)
    assert set(small_model().state_dict()) == set(checkpoint["state_dict"])
    for times in (LowDiscrepancyTimes, partial(AdaptiveTimes, bins=4)):
        other = small_model(times=times)
        other.on_load_checkpoint(checkpoint)
        _, weight = other.times.draw(5, torch.zeros(1))
        torch.testing.assert_close(weight, torch.ones(5))  # it starts anew
    small_model(times=AdaptiveTimes).on_load_checkpoint({})  # of an earlier version


RANK = """
import sys
import torch
from torch import distributed
from nfdm_lightning.time_sampling import AdaptiveTimes

def train(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    times, parts = AdaptiveTimes(bins=8), []
    for step in range(20):
        t, _ = times.draw(10, torch.zeros(1, dtype=torch.float64), torch.Generator().manual_seed(100 * step + rank))
        parts.append((t, (1 + rank) * torch.exp(-3 * t)))
        times.observe(*parts[-1])
    distributed.destroy_process_group()
    return times.state_dict()["sums"], parts

if __name__ == "__main__":
    torch.save(train(1, sys.argv[1]), sys.argv[2])
"""


def test_two_processes_have_one_density(tmp_path):
    args = [sys.executable, "-c", RANK, str(tmp_path / "store"), str(tmp_path / "other.pt")]
    process = subprocess.Popen(args, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    names: dict[str, object] = {}
    exec(RANK, names)  # rank 0 is this process
    sums, parts = names["train"](0, tmp_path / "store")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    other_sums, others = torch.load(tmp_path / "other.pt", weights_only=True)
    assert torch.equal(sums, other_sums)
    joint = AdaptiveTimes(bins=8)
    for mine, other in zip(parts, others, strict=True):
        joint.observe(*(torch.cat(pair) for pair in zip(mine, other, strict=True)))
    torch.testing.assert_close(sums, joint.state_dict()["sums"])


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    few = ["--trainer.max_steps=3", "--trainer.callbacks=null", "--trainer.accelerator=cpu", "--data.train_size=64"]
    few += [
        "--data.eval_size=8",
        "--data.batch_size=16",
        "--nll.draws=2",
        "--nll.antithetic=true",
        "--model.antithetic=true",
    ]
    fit = ["fit", "--config", str(CONFIGS / "toy2d_nfdm.yaml"), *few]
    assert main([*fit, "--model.times=AdaptiveTimes", "--model.times.bins=5"]) == 0
    model = NeuralDiffusion.load_from_checkpoint(tmp_path / "runs/toy2d_nfdm/checkpoints/last.ckpt", weights_only=True)
    assert isinstance(model.times, AdaptiveTimes)
    assert model.times.bins == 5
    assert model.times.state_dict()["sums"][1].sum() > 0
    capsys.readouterr()
    assert main([*fit, "--model.times=Adaptive"]) == 2
    assert "choose from: AdaptiveTimes, LowDiscrepancyTimes, UniformTimes" in capsys.readouterr().err
