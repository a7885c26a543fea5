"""NFDM on the public toy: steps per second and time to the bound, against double backward as in the public notebook; JSON.

    python benchmarks/public_toy.py --speed [--memory-steps 20000] [--out FILE]
    python benchmarks/public_toy.py --bound [--baseline-steps 100000] [--seeds 3] [--out FILE]

8 Gaussians; forward process, predictor and volatility have four hidden layers of 64 SELU each, batch 1,024, Adam 1e-3. The
baseline, written here, takes the time derivative by ``torch.autograd.functional.jvp``, which runs backward twice. With
--speed all ways do their steps in turn, with networks of the same size. With --bound the baseline trains by its recipe, the
shipped configurations by theirs, and each time is CPU time of training alone; the diffusion loss is of fresh points. Run
on one thread (OMP_NUM_THREADS=1).
"""

import argparse
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import report, train_and_test
from nfdm_lightning import NFDM, Gaussian, NeuralDiffusion, SeparableNFDM
from nfdm_lightning.bound import diffusion_loss
from nfdm_lightning.data.toy2d import EightGaussians
from nfdm_lightning.predictor import XPrediction
from nfdm_lightning.processes.schedules import LinearFlow
from nfdm_lightning.volatility import Volatility

BATCH, LR, DELTA = 1024, 1e-3, 1e-2
FLOOR = EightGaussians().entropy() - 2 * (0.5 + math.log(DELTA) + 0.5 * math.log(2 * math.pi))
"""Entropy less the reconstruction term at decoder std 0.01: no diffusion loss is below it."""


def selu(inputs: int, outputs: int) -> nn.Sequential:
    """Four hidden layers of 64 SELU."""
    layers: list[nn.Module] = []
    for width in (inputs, 64, 64, 64):
        layers += [nn.Linear(width, 64), nn.SELU()]
    return nn.Sequential(*layers, nn.Linear(64, outputs))


class SeluOfTime(nn.Module):
    """The same, of (x, t), in the form that the package's parts take."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = selu(math.prod(in_shape) + 1, math.prod(out_shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the output, (B, *out_shape), at x (B, *in_shape) and t (B,)."""
        return self.layers(torch.cat([x, t[:, None]], 1))


class SeluVolatility(Volatility):
    """log g^2 is that of the reference and a network of four hidden layers of 64 SELU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = selu(1, 1)

    def forward(self, t: Tensor, reference_g2: Tensor) -> Tensor:
        return reference_g2 * self.layers(t[:, None])[:, 0].exp()


class Baseline(nn.Module):
    """The notebook's model: NFDM pinned at both ends, its predictor, a learned volatility; derivatives by double backward.

    Args:
        learned: whether the forward process is learned; if not it is linear, with a closed form.
    """

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        self.forward_network = selu(3, 4) if learned else None
        self.predictor, self.volatility = selu(3, 2), selu(1, 1)

    def moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.forward_network is not None
        shift, raw = self.forward_network(torch.cat([x, t], 1)).chunk(2, 1)
        return (1 - t) * (x + t * shift), ((1 - t) * (math.log(DELTA) + t * raw)).exp()

    def moments_dt(self, t: Tensor, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if self.forward_network is None:
            std = DELTA ** (1 - t).expand_as(x)
            return ((1 - t) * x, std), (-x, -math.log(DELTA) * std)
        return torch.autograd.functional.jvp(lambda time: self.moments(time, x), t, torch.ones_like(t), create_graph=True)

    def loss(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Returns the diffusion loss of each sample, (B,); t is (B, 1)."""
        g2 = self.volatility(t).exp() ** 2

        def drift(moments: Any, at: Tensor) -> Tensor:
            (_, std), (mean_dt, std_dt) = moments
            return mean_dt + std_dt * at + 0.5 * g2 * at / std

        moments = self.moments_dt(t, x)
        z = moments[0][0] + moments[0][1] * eps
        x_hat = (1 - t) * z + (t + DELTA) * self.predictor(torch.cat([z, t], 1))
        model = self.moments_dt(t, x_hat)
        eps_hat = (z - model[0][0]) / model[0][1]
        return ((drift(moments, eps) - drift(model, eps_hat)) ** 2 / (2 * g2)).sum(1)


def baseline_step(learned: bool) -> Callable[[], None]:
    """Returns a function that does one training step of the notebook's recipe."""
    model, data = Baseline(learned), EightGaussians()
    optimiser = torch.optim.Adam(model.parameters(), lr=LR)

    def step() -> None:
        optimiser.zero_grad()
        model.loss(data.sample(BATCH), torch.rand(BATCH, 1), torch.randn(BATCH, 2)).mean().backward()
        optimiser.step()

    return step


def own_step(process: Any) -> Callable[[], None]:
    """Returns a function that does one training step of this package's model with networks of the same size."""
    data = EightGaussians()
    model = NeuralDiffusion(
        shape=(2,),
        data_std=data.data_std,
        process=process,
        predictor=partial(XPrediction, network=SeluOfTime),
        volatility=SeluVolatility,
        decoder_std=DELTA,
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        model.bound(data.sample(BATCH)).nats.mean().backward()
        optimiser.step()

    return step


WAYS: dict[str, Callable[[], Callable[[], None]]] = {
    "NFDM, double backward (baseline)": lambda: baseline_step(True),
    "fixed linear (baseline)": lambda: baseline_step(False),
    "NFDM": lambda: own_step(partial(NFDM, network=SeluOfTime)),
    "SeparableNFDM": lambda: own_step(partial(SeparableNFDM, network=SeluOfTime)),
    "Gaussian": lambda: own_step(partial(Gaussian, schedule=LinearFlow)),
}


def resident() -> float:
    """Returns the resident memory of this process now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def speed(rounds: int, steps: int, memory_steps: int) -> dict[str, Any]:
    """Returns milliseconds per step of each way, done in turn, and the memory over many steps of NFDM."""
    torch.manual_seed(0)
    ways = {name: make() for name, make in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, step in ways.items():
            begin = time.process_time()
            for _ in range(steps):
                step()
            if round_:  # the first warms up
                times[name].append((time.process_time() - begin) / steps * 1e3)
    base = times["NFDM, double backward (baseline)"]
    table = {
        name: {
            "ms_per_step": statistics.median(found),
            "quartiles": statistics.quantiles(found, n=4)[::2],
            "times_the_baselines_steps_per_second": statistics.median(b / f for b, f in zip(base, found, strict=True)),
        }
        for name, found in times.items()
    }
    memory = []
    for step_ in range(memory_steps):
        ways["NFDM"]()
        if (step_ + 1) % (memory_steps // 4) == 0:
            memory.append(resident())
    return {"ways": table, "rounds": rounds, "steps_per_round": steps, "resident_mib_over_the_steps_of_nfdm": memory}


@torch.no_grad()
def fresh_loss(loss: Callable[[Tensor, Tensor, Tensor], Tensor], batches: int = 128) -> tuple[float, float]:
    """Returns mean and standard error of a diffusion loss of (x, t (B,), eps) over fresh points at stratified times."""
    generator = torch.Generator().manual_seed(123)
    data, means = EightGaussians(), []
    for _ in range(batches):
        x = data.sample(2048, generator)
        t = (torch.arange(2048) + torch.rand(2048, generator=generator)) / 2048
        means.append(float(loss(x, t, torch.randn(2048, 2, generator=generator)).mean()))
    return statistics.mean(means), statistics.stdev(means) / math.sqrt(batches)


def train_baseline(learned: bool, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Trains by the notebook's recipe; returns CPU seconds and losses along the way."""
    torch.manual_seed(seed)
    model, data = Baseline(learned), EightGaussians()
    optimiser = torch.optim.Adam(model.parameters(), lr=LR)
    curve, seconds = [], 0.0
    for done in range(every, steps + 1, every):
        begin = time.process_time()
        for _ in range(every):
            optimiser.zero_grad()
            model.loss(data.sample(BATCH), torch.rand(BATCH, 1), torch.randn(BATCH, 2)).mean().backward()
            optimiser.step()
        seconds += time.process_time() - begin
        found, error = fresh_loss(lambda x, t, eps: model.loss(x, t[:, None], eps).detach())
        curve.append({"steps": done, "cpu_seconds": seconds, "loss": found, "standard_error": error})
        print(f"baseline learned={learned}: {curve[-1]}", file=sys.stderr, flush=True)
    return {"seed": seed, "curve": curve}


def train_own(config: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains a shipped configuration through the command line; returns CPU seconds, all but the imports, and its loss."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        model, _ = train_and_test(config, seed, steps, Path(folder), ["--nll.test_draws=1"])
        seconds = time.process_time() - begin
    loss, error = fresh_loss(lambda x, t, eps: diffusion_loss(model.reverse, x, t, eps)[0])
    result = {"seed": seed, "steps": steps, "cpu_seconds": seconds, "loss": loss, "standard_error": error}
    print(f"{config}: {result}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--memory-steps", type=int, default=20000)
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--baseline-steps", type=int, default=100_000)
    parser.add_argument("--own-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    result: dict[str, Any] = {"floor": FLOOR}
    if options.speed:
        result["speed"] = speed(options.rounds, options.steps, options.memory_steps)
    if options.bound:
        own = ("toy2d_nfdm", "toy2d_separable", "toy2d_gaussian")
        result["own"] = {name: [train_own(name, seed, options.own_steps) for seed in range(options.seeds)] for name in own}
        every = max(1, options.baseline_steps // 20)
        for name, learned in (("baseline_fixed", False), ("baseline", True)):
            result[name] = train_baseline(learned, 0, options.baseline_steps, every)
            report(result, options.out)  # hours of work: kept after each part
            sys.stdout.flush()
        return
    report(result, options.out)


if __name__ == "__main__":
    main()
