"""Bridges: end marginals in both directions, paths around an obstacle, threes that become eights; prints JSON.

    python benchmarks/bridges.py [--seeds 1] [--steps 1500] [--parts toy ...] [--pictures DIR] [--out FILE]

``toy``: between a checkerboard and 8 Gaussians, one model per direction. Samples from fresh sources by SDE and ODE
(Ancestral, stochasticity 1 and 0, 200 evaluations) against fresh data: a permutation test of the energy distance between
1,000 and 1,000 points, the p-values of three draws combined by Fisher's method, and sliced 2-Wasserstein distances of
4,096. ``obstacle``: share of the length of 2,000 trajectories (100 steps, joined by straight lines) inside the disc, and of
trajectories that touch it, with the penalty and without. ``digits``: a bridge from threes to eights, its test bound, and the
share of its samples that a k-nearest-neighbour classifier of scikit-learn, trained on the training split, takes for an
eight, next to that of real test eights.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from scipy.stats import combine_pvalues
from torch import Tensor

from common import compare, report, train_and_test
from nfdm_lightning import pictures
from nfdm_lightning.data import Checkerboard, Digits, EightGaussians
from nfdm_lightning.marginals import energy_test
from nfdm_lightning.processes import Obstacle
from nfdm_lightning.solvers import Ancestral
from plugins_on_toy2d import sliced_wasserstein

SOLVERS = {"sde": Ancestral(200), "ode": Ancestral(200, stochasticity=0.0)}
REPEATS = 3
TO_CHECKERBOARD = ["--data.target.distribution=Checkerboard", "--data.source.distribution=EightGaussians"]


def toy(direction: str, seed: int, steps: int, scratch: Path) -> dict[str, float]:
    """Trains one direction and compares the ends."""
    to_gaussians = direction == "to_gaussians"
    extra = [] if to_gaussians else TO_CHECKERBOARD
    extra += [f"--data.target.seed={seed}", f"--data.source.seed={seed + 100}"]
    model, results = train_and_test("toy2d_bridge", seed, steps, scratch / f"{direction}_{seed}", extra)
    ends = (Checkerboard(), EightGaussians())
    source, target = ends if to_gaussians else ends[::-1]
    generator = torch.Generator().manual_seed(777 + seed)
    for name in ("fresh", *SOLVERS):
        p_values, distance = [], 0.0
        for _ in range(REPEATS):
            start, fresh = source.sample(4096, generator), target.sample(4096, generator)
            if name == "fresh":
                drawn = target.sample(4096, generator)
            else:
                drawn, _ = model.sample(4096, SOLVERS[name], generator, source=start)
            p_values.append(energy_test(drawn[:1000], fresh[:1000], generator).p_value)
            distance += sliced_wasserstein(drawn, fresh) / REPEATS
        results |= {f"p_{name}": float(combine_pvalues(p_values).pvalue), f"sw2_{name}": distance}
    return results


def inside_of(disc: Obstacle, states: Tensor, parts: int = 20) -> tuple[float, float]:
    """Returns the share of the length of paths (K, N, 2) inside a disc, and the share of paths that touch it.

    The steps are joined by straight lines: a path that jumps across is inside too.
    """
    share = torch.linspace(0, 1, parts)[:, None, None, None]
    points = states[:-1] + share * states.diff(dim=0)
    inside = (disc.depth(points.flatten(0, 2)) > 0).float().unflatten(0, points.shape[:3])
    length = states.diff(dim=0).norm(dim=-1)
    return float((inside.mean(0) * length).sum() / length.sum()), float(inside.amax((0, 1)).mean())


def obstacle(penalty: str, seed: int, steps: int, scratch: Path, folder: Path | None) -> dict[str, float]:
    """Trains with or without the penalty and counts states inside the disc."""
    # without: the same cost of no weight, so that the disc is known
    extra = [] if penalty == "with" else ["--model.penalties.weight=0.0"]
    model, results = train_and_test("toy2d_obstacle", seed, steps, scratch / f"{penalty}_{seed}", extra)
    (disc,) = model.penalties
    assert isinstance(disc, Obstacle)
    generator = torch.Generator().manual_seed(seed)
    source = torch.tensor([4.0, 0.0]) + 0.5 * torch.randn(2000, 2, generator=generator)
    for kind, solver in {"sde": Ancestral(100), "ode": Ancestral(100, stochasticity=0.0)}.items():
        _, solution = model.sample(2000, solver, generator, trajectory=True, source=source)
        inside, crossing = inside_of(disc, solution.trajectory)
        results |= {f"inside_{kind}": inside, f"crossing_{kind}": crossing}
        if folder is not None and seed == 0:
            title = f"{penalty} the penalty: {kind.upper()}, {solution.nfe} evaluations"
            pixels = pictures.trajectories(solution.times, solution.trajectory, title, "source", [disc])
            pictures.save_png(pixels, folder / f"obstacle_{penalty}_{kind}.png")
    return results


def digits(direction: str, seed: int, steps: int, scratch: Path, folder: Path | None) -> dict[str, float]:
    """Trains the bridge of digits and classifies its ends."""
    from sklearn.neighbors import KNeighborsClassifier

    everything = {digit: Digits(digit=digit) for digit in range(10)}
    images = torch.cat([data.split("train").flatten(1) for data in everything.values()])
    labels = [digit for digit, data in everything.items() for _ in data.raw("train")]
    classifier = KNeighborsClassifier(3).fit(images.numpy(), labels)

    def eights(drawn: Tensor) -> float:
        return float((classifier.predict(drawn.flatten(1).numpy()) == 8).mean())

    model, results = train_and_test("digits_bridge", seed, steps, scratch / f"{direction}_{seed}")
    results["eights_real"] = eights(everything[8].split("test"))
    source = everything[3].sources(256)
    results["eights_source"] = eights(source)
    for kind, solver in SOLVERS.items():
        drawn, _ = model.sample(256, solver, torch.Generator().manual_seed(seed), source=source)
        results[f"eights_{kind}"] = eights(drawn)
        if folder is not None and seed == 0:
            pixels = pictures.sample_grid(drawn[:24], columns=8, sources=source[:24])
            pictures.save_png(pixels, folder / f"digits_bridge_{kind}.png")
    return results


def main() -> None:
    """Runs everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--parts", nargs="+", choices=("toy", "obstacle", "digits"), default=["toy", "obstacle", "digits"])
    parser.add_argument("--pictures", type=Path, help="also draw pictures into this folder")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    tables = {}
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"steps": chosen.steps, "scratch": Path(scratch)}
        drawing = {**settings, "folder": chosen.pictures}
        parts = {
            "toy": (partial(toy, **settings), ["to_gaussians", "to_checkerboard"]),
            "obstacle": (partial(obstacle, **drawing), ["with", "without"]),
            "digits": (partial(digits, **drawing), ["three_to_eight"]),
        }
        for part in chosen.parts:
            run, kinds = parts[part]
            tables[part] = compare(run, kinds, chosen.seeds)
    report({"steps": chosen.steps, **tables}, chosen.out)


if __name__ == "__main__":
    main()
