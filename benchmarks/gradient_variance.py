"""Variance of the loss and of its gradient, by how times and noise are drawn; prints JSON.

    python benchmarks/gradient_variance.py [--data toy2d digits] [--plugins ndm ...] [--steps 300] [--draws 100]
    python benchmarks/gradient_variance.py --train [--data toy2d] [--plugins gaussian] [--steps 1500] [--seeds 3]

The first measures frozen models, after one step and after ``--steps`` (raw weights, dropout off), on batches of 64.
``gradient`` has for each way of drawing and each part, forward and reverse, the trace of the covariance of the batch's
gradient: at ``one`` batch of data, and over ``fresh`` batches, the same ones for every way. ``ratio`` is that to the
default's, with its standard error over the draws; ``noise_to_signal``, of the default, the trace over the squared norm of
the mean gradient. ``loss`` is the same of the batch's loss in nats. ``evaluation`` is the variance of the mean bound of 64
test samples at 4 draws each, over seeds of the draws, as a ratio too. The densities of AdaptiveTimes are learned on the
frozen model first. With ``--train`` the ways are trained for equal steps, and tested.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import CONFIGS, PLUGINS, QUIET, compare, report, train_and_test
from nfdm_lightning.bound import Draws, indexed_draws, random_draws
from nfdm_lightning.cli import main as lightning
from nfdm_lightning.data import DataModule, Digits, Toy2D
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.seeding import mixed_seed
from nfdm_lightning.time_sampling import AdaptiveTimes, LowDiscrepancyTimes, TimeSampler, UniformTimes

BATCH, DRAWS = 64, 4
DEFAULT = "low_discrepancy"
WAYS = ("uniform", DEFAULT, "adaptive", f"{DEFAULT}_antithetic", "adaptive_antithetic")
SETTINGS = {
    "uniform": ["--model.times=UniformTimes"],
    DEFAULT: [],
    "adaptive": ["--model.times=AdaptiveTimes"],
    f"{DEFAULT}_antithetic": ["--model.antithetic=true"],
    "adaptive_antithetic": ["--model.times=AdaptiveTimes", "--model.antithetic=true"],
}


def generator(*parts: int) -> torch.Generator:
    """Returns random numbers of their own for each use."""
    return torch.Generator().manual_seed(mixed_seed(*parts))


def train(config: str, seed: int, steps: int, folder: Path) -> NeuralDiffusion:
    """Trains a shipped configuration with uniform times, spread out, and returns its raw weights."""
    args = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), f"--trainer.default_root_dir={folder}", *QUIET]
    args += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.max_steps={steps}", "--ema.decay=0"]
    if lightning([*args, "--trainer.limit_val_batches=0"]) != 0:
        raise SystemExit(f"{config}, seed {seed}: the run failed")
    return NeuralDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True).eval()


@torch.no_grad()
def learn(model: NeuralDiffusion, x: Tensor, batches: int = 100) -> AdaptiveTimes:
    """Returns the density that training would have learned, were the weights those of the model throughout."""
    times = AdaptiveTimes()
    for number in range(batches):
        random = generator(1, number)
        batch = x[torch.randint(len(x), (2 * BATCH,), generator=random)]
        draws = random_draws(batch, random, times)
        terms = model.bound(batch, draws)
        times.observe(draws.t, terms.diffusion / terms.weight)
    return times


def gradients(model: NeuralDiffusion, x: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Returns the gradient of the batch's mean loss for each part in one vector, and the loss, (1,)."""
    loss = model.bound(x, draws).nats.mean()
    process = {id(parameter) for parameter in model.reverse.process.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slopes = torch.autograd.grad(loss, trained, allow_unused=True)
    parts: dict[str, list[Tensor]] = {"forward": [], "reverse": []}
    for parameter, slope in zip(trained, slopes, strict=True):
        if slope is not None:
            parts["forward" if id(parameter) in process else "reverse"].append(slope.flatten())
    return {"loss": loss.detach()[None], **{name: torch.cat(slopes) for name, slopes in parts.items() if slopes}}


def trace(vectors: Tensor) -> tuple[float, float]:
    """Returns the trace of the covariance of vectors (R, P) and its standard error."""
    number = len(vectors)
    squares = ((vectors - vectors.mean(0)) ** 2).sum(1).double() * number / (number - 1)
    return squares.mean().item(), (squares.std() / math.sqrt(number)).item()


def compared(values: dict[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Returns every variance as a ratio to the default's, with its standard error."""
    base, base_error = values[DEFAULT]
    table = {}
    for name, (value, error) in values.items():
        relative = math.hypot(error / value, base_error / base) if name != DEFAULT else 0.0
        table[name] = {"ratio": round(value / base, 4), "se": round(value / base * relative, 4)}
    return table


def batches(model: NeuralDiffusion, x: Tensor, samplers: dict[str, TimeSampler], draws: int, fixed: bool) -> dict[str, Any]:
    """Returns the variances of loss and gradient, over draws of times and noise, and of data unless they are fixed."""
    vectors: dict[str, dict[str, list[Tensor]]] = {}
    for way in WAYS:
        times, antithetic = samplers[way.removesuffix("_antithetic")], way.endswith("_antithetic")
        for number in range(draws):
            batch = x[torch.randint(len(x), (BATCH,), generator=generator(2, 0 if fixed else number))]
            drawn = random_draws(batch, generator(3, number, WAYS.index(way)), times, antithetic)
            for part, vector in gradients(model, batch, drawn).items():
                vectors.setdefault(part, {}).setdefault(way, []).append(vector)
    result = {}
    for part, ways in vectors.items():
        stacked = {way: torch.stack(found) for way, found in ways.items()}
        values = {way: trace(found) for way, found in stacked.items()}
        # every way has the same mean: that of all is known best
        mean = torch.cat(list(stacked.values())).mean(0)
        error = sum(value for value, _ in values.values()) / len(WAYS) / (draws * len(WAYS))
        signal = (mean.double() ** 2).sum().item() - error
        result[part] = {"noise_to_signal": values[DEFAULT][0] / signal if signal > error else None, "ways": compared(values)}
    return result


@torch.no_grad()
def evaluation(model: NeuralDiffusion, x: Tensor, times: AdaptiveTimes, seeds: int) -> dict[str, Any]:
    """Returns the variance over seeds of the mean bound of given samples, for ways to place and mirror their draws."""
    x, index = x[:BATCH], torch.arange(BATCH)

    def stratified(draw: int, seed: int) -> Draws:
        return indexed_draws(x, index, draw, DRAWS, seed)

    def antithetic(draw: int, seed: int) -> Draws:
        return indexed_draws(x, index, draw, DRAWS, seed, antithetic=True)

    def same_time(draw: int, seed: int) -> Draws:
        return replace(antithetic(draw, seed), t=indexed_draws(x, index, draw // 2, DRAWS // 2, seed).t)

    def importance(draw: int, seed: int) -> Draws:
        return indexed_draws(x, index, draw, DRAWS, seed, times=times)

    ways: dict[str, Callable[[int, int], Draws]] = {
        DEFAULT: stratified,
        "antithetic": antithetic,
        "antithetic_same_time": same_time,
        "importance": importance,
    }
    values = {}
    means = {}
    for name, way in ways.items():
        estimates = [
            sum(model.bound(x, way(draw, seed)).nats.mean() for draw in range(DRAWS)) / DRAWS for seed in range(seeds)
        ]
        found = torch.stack([torch.as_tensor(one) for one in estimates])[:, None]
        values[name], means[name] = trace(found), found.mean().item()
    return {"ways": compared(values), "std_nats": math.sqrt(values[DEFAULT][0]), "mean_nats": means}


def measure(data: DataModule, model: NeuralDiffusion, draws: int) -> dict[str, Any]:
    """Returns everything about one frozen model."""
    x = data.split("train")
    adaptive = learn(model, x)
    samplers = {"uniform": UniformTimes(), DEFAULT: LowDiscrepancyTimes(), "adaptive": adaptive}
    density = adaptive.bins * adaptive.probabilities(x)
    return {
        "one": batches(model, x, samplers, draws, fixed=True),
        "fresh": batches(model, x, samplers, draws, fixed=False),
        "evaluation": evaluation(model, data.split("test"), adaptive, draws),
        "density": [round(value, 3) for value in density.tolist()],
    }


def variances(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measures every plug-in on every data set, at its start and after training."""
    results: dict[str, Any] = {}
    for name in chosen.data:
        data: DataModule = {"toy2d": Toy2D, "digits": Digits}[name]()
        for plugin in chosen.plugins:
            for steps in (1, chosen.steps):
                begin = time.monotonic()
                with tempfile.TemporaryDirectory() as scratch:
                    model = train(f"{name}_{plugin}", 0, steps, Path(scratch))
                found = {**measure(data, model, chosen.draws), "seconds": round(time.monotonic() - begin, 1)}
                results.setdefault(name, {}).setdefault(plugin, {})[f"step_{steps}"] = found
                print(f"done: {name} {plugin} {steps} {json.dumps(found)}", file=sys.stderr, flush=True)
    return {"steps": chosen.steps, "draws": chosen.draws, "batch_size": BATCH, "models": results}


def training(chosen: argparse.Namespace) -> dict[str, Any]:
    """Trains every way for equal steps with every seed, and tests it."""
    tables: dict[str, Any] = {}
    for name in chosen.data:
        for plugin in chosen.plugins:
            with tempfile.TemporaryDirectory() as scratch:

                def run(way: str, seed: int, config: str = f"{name}_{plugin}", folder: str = scratch) -> dict[str, float]:
                    place = Path(folder) / f"{way}_{seed}"
                    return train_and_test(config, seed, chosen.steps, place, SETTINGS[way])[1]

                tables[f"{name}_{plugin}"] = compare(run, chosen.ways, chosen.seeds)
    return {"steps": chosen.steps, "configurations": tables}


def main() -> None:
    """Measures or trains, and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("toy2d", "digits"), default=["toy2d", "digits"])
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, default=list(PLUGINS))
    parser.add_argument("--steps", type=int, help="300 by default, 1,500 with --train")
    parser.add_argument("--draws", type=int, default=100, help="batches for each way and measurement")
    parser.add_argument("--train", action="store_true", help="train the ways instead, and test them")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to train")
    parser.add_argument("--seeds", type=int, default=3, help="of the trainings")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    chosen.steps = chosen.steps or (1500 if chosen.train else 300)
    report(training(chosen) if chosen.train else variances(chosen), chosen.out)


if __name__ == "__main__":
    main()
