"""Every plug-in on the 8 Gaussians, whose density is known: bound against entropy, samples against fresh data; prints JSON.

    python benchmarks/plugins_on_toy2d.py [--seeds 3] [--steps 1500] [--plugins ndm ...] [--out FILE]

``excess_nats`` is reconstruction + diffusion - entropy on the test split, at least 0 within its error. ``sw2_*`` is the
sliced 2-Wasserstein distance of 4,096 samples to as many fresh draws of the data, by SDE and ODE in 300 steps; ``sw2_fresh``
the same between two fresh draws, the least that one can hope for. Each is a mean over three repeats.
"""

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from common import compare, options, report, train_and_test
from nfdm_lightning.data import EightGaussians
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.solvers import Ancestral, Euler, EulerMaruyama

SOLVERS = {"sde": EulerMaruyama(300), "sde_ancestral": Ancestral(300), "ode": Euler(300)}
REPEATS = 3


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 512) -> float:
    """Returns the sliced 2-Wasserstein distance of two sets of points, (N, 2) each, over equally spread directions."""
    angles = torch.arange(directions, dtype=torch.float64) * torch.pi / directions
    lines = torch.stack([angles.cos(), angles.sin()])
    projected = ((points.double() @ lines).sort(0).values for points in (a, b))
    first, second = projected
    return float(((first - second) ** 2).mean().sqrt())


def measure_samples(model: NeuralDiffusion, seed: int, number: int = 4096) -> dict[str, float]:
    """Returns the distances of a model's samples to fresh data, each the mean over repeats.

    One distance between two sets of 4,096 is noisy: the share of each of the eight modes varies by chance.
    """
    generator = torch.Generator().manual_seed(12345 + seed)
    data = EightGaussians()
    distances = dict.fromkeys(["sw2_fresh", *(f"sw2_{name}" for name in SOLVERS)], 0.0)
    for _ in range(REPEATS):
        fresh = data.sample(number, generator)
        distances["sw2_fresh"] += sliced_wasserstein(data.sample(number, generator), fresh) / REPEATS
        for name, solver in SOLVERS.items():
            samples, _ = model.sample(number, solver, generator)
            distances[f"sw2_{name}"] += sliced_wasserstein(samples, fresh) / REPEATS
    return distances


def main() -> None:
    """Runs everything and prints the table as JSON."""
    chosen = options(__doc__ or "", steps=1500)
    entropy = EightGaussians().entropy()
    with tempfile.TemporaryDirectory() as scratch:

        def run(plugin: str, seed: int) -> dict[str, float]:
            begin = time.monotonic()
            folder = Path(scratch) / f"{plugin}_{seed}"
            model, results = train_and_test(f"toy2d_{plugin}", seed, chosen.steps, folder)
            seconds = round(time.monotonic() - begin, 1)
            excess = results["test/reconstruction_nats"] + results["test/diffusion_nats"] - entropy
            return {**results, "excess_nats": excess, **measure_samples(model, seed), "seconds": seconds}

        report(
            {"steps": chosen.steps, "entropy": entropy, "plugins": compare(run, chosen.plugins, chosen.seeds)}, chosen.out
        )


if __name__ == "__main__":
    main()
