"""Straightness and few-step samples on the 8 Gaussians: flow matching, NFDM, NFDM-OT and torchcfm's OT-CFM; prints JSON.

    python benchmarks/few_steps.py [--seeds 3] [--steps 1500] [--methods nfdm_ot ...] [--set SETTING ...] [--out FILE]

Predictors of equal size, equal steps, batches and learning rates; NFDM and NFDM-OT have a forward network besides, which
every evaluation runs too. ``gaussian_fm`` is flow matching's linear path trained on our bound, not its uniform loss.
``curvature`` is the mean of |d/dt f(z_t, t)|^2 along the model's own trajectories (Heun, 100 steps, by forward-mode
autodiff); ``curvature_inner`` the same over t in [0.05, 0.95]. ``sw2_K`` is the sliced 2-Wasserstein distance of 4,096
samples in K Euler steps of the ODE to fresh data, mean of three draws; ``sw2_fresh`` that between two fresh draws;
``sw2_sde`` that of the SDE (Ancestral, 200 steps). ``gap_T`` is the sliced distance of the ODE's states at time T (100 Euler
steps) to those of the forward process. ``nfdm_curvature`` is NFDM with the penalty alone. Settings go to every configured
method, as ``--set model.process.weight=0.1``. Needs the development dependencies (torchcfm).
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import compare, report, train_and_test
from nfdm_lightning.callbacks import EMA
from nfdm_lightning.data import EightGaussians
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.processes.penalties import Velocity, acceleration
from nfdm_lightning.reverse import ReverseProcess
from nfdm_lightning.solvers import Ancestral
from plugins_on_toy2d import REPEATS, sliced_wasserstein

CONFIGURATIONS = {
    "gaussian_fm": ("toy2d_gaussian", ["--model.process.schedule=LinearFlow"]),
    "nfdm": ("toy2d_nfdm", []),
    "nfdm_curvature": ("toy2d_nfdm", ["--model.penalties+=Curvature"]),
    "nfdm_ot": ("toy2d_nfdm_ot", []),
}
METHODS = (*CONFIGURATIONS, "ot_cfm")
STEPS = (1, 2, 4, 8, 16, 100)
GAPS = (0.99, 0.75, 0.5, 0.25)


class OTCFM:
    """Flow matching with minibatch optimal transport (arXiv 2302.00482) by torchcfm, whose time runs from noise to data."""

    def __init__(self, steps: int, batch_size: int, lr: float, seed: int) -> None:
        from torch.optim.swa_utils import AveragedModel
        from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher

        torch.manual_seed(seed)
        matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
        network = ResidualMLP((2,), (2,), width=128, depth=3)
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * lr)
        average = AveragedModel(network, multi_avg_fn=EMA()._average)
        data = EightGaussians().sample(100_000, torch.Generator().manual_seed(1000 * seed))
        for _ in range(steps):
            x = data[torch.randint(len(data), (batch_size,))]
            t, z, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
            loss = ((network(z, t) - velocity) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            cosine.step()
            average.update_parameters(network)
        self.network = average.module.eval()

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """Returns dz/dt in our time, which runs from data to noise."""
        return -self.network(z, 1 - t)


@torch.no_grad()
def euler(flow: Velocity, z: Tensor, steps: int, take: int | None = None) -> Tensor:
    """Solves the ODE from t = 1 to 0 in equal steps; stops after the first ``take`` of them."""
    for k in range(steps if take is None else take):
        z = z - flow.velocity(z, torch.full((len(z),), 1 - k / steps)) / steps
    return z


@torch.no_grad()
def curvature(flow: Velocity, z: Tensor, steps: int = 100) -> dict[str, float]:
    """Returns the mean squared acceleration along the flow's own trajectories from z at t = 1, by Heun's method."""
    costs = []
    for k in range(steps + 1):
        t = torch.full((len(z),), 1 - k / steps)
        costs.append(float((acceleration(flow, z, t) ** 2).sum(1).mean()))
        first = flow.velocity(z, t)
        if k < steps:
            second = flow.velocity(z - first / steps, t - 1 / steps)
            z = z - 0.5 * (first + second) / steps
    margin = steps // 20
    inner = costs[margin : steps + 1 - margin]
    return {"curvature": sum(costs) / len(costs), "curvature_inner": sum(inner) / len(inner)}


def measure(flow: Velocity, seed: int, number: int = 4096) -> dict[str, float]:
    """Returns curvature and distances for every number of steps."""
    generator, data = torch.Generator().manual_seed(54321 + seed), EightGaussians()
    results = curvature(flow, torch.randn(1024, 2, generator=generator))
    results |= dict.fromkeys(["sw2_fresh", *(f"sw2_{steps}" for steps in STEPS)], 0.0)
    for _ in range(REPEATS):
        fresh = data.sample(number, generator)
        results["sw2_fresh"] += sliced_wasserstein(data.sample(number, generator), fresh) / REPEATS
        z = torch.randn(number, 2, generator=generator)
        for steps in STEPS:
            results[f"sw2_{steps}"] += sliced_wasserstein(euler(flow, z, steps), fresh) / REPEATS
    return results


@torch.no_grad()
def measure_model(reverse: ReverseProcess, seed: int, number: int = 4096) -> dict[str, float]:
    """Returns the distance of SDE samples, and of the ODE's states to the forward process's."""
    generator, data = torch.Generator().manual_seed(98765 + seed), EightGaussians()
    results = dict.fromkeys(["sw2_sde", *(f"gap_{t}" for t in GAPS)], 0.0)
    for _ in range(REPEATS):
        fresh = data.sample(number, generator)
        z = torch.randn(number, 2, generator=generator)
        samples = Ancestral(nfe=200).solve(reverse, z, generator).z
        results["sw2_sde"] += sliced_wasserstein(samples, fresh) / REPEATS
        for t in GAPS:
            eps = torch.randn(number, 2, generator=generator)
            forward = reverse.process.transform(eps, torch.full((number,), t), fresh)
            states = euler(reverse, z, 100, round(100 * (1 - t)))
            results[f"gap_{t}"] += sliced_wasserstein(states, forward) / REPEATS
    return results


def run(method: str, seed: int, steps: int, settings: list[str], scratch: Path) -> dict[str, float]:
    """Trains one method with one seed and measures it."""
    begin = time.monotonic()
    results: dict[str, float] = {}
    flow: Velocity
    if method == "ot_cfm":
        flow = OTCFM(steps, batch_size=512, lr=2e-3, seed=seed)
    else:
        config, extra = CONFIGURATIONS[method]
        model: NeuralDiffusion
        model, results = train_and_test(
            config, seed, steps, scratch / f"{method}_{seed}", [*extra, *(f"--{setting}" for setting in settings)]
        )
        flow = model.reverse
        results |= measure_model(model.reverse, seed)
    return {**results, "seconds": round(time.monotonic() - begin, 1), **measure(flow, seed)}


def main() -> None:
    """Runs everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], help="more settings, such as model.process.weight=0.1")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        one = partial(run, steps=chosen.steps, settings=chosen.set, scratch=Path(scratch))
        report({"steps": chosen.steps, "set": chosen.set, "methods": compare(one, chosen.methods, chosen.seeds)}, chosen.out)


if __name__ == "__main__":
    main()
