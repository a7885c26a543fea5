"""Held-out bits/dim of forward processes at equal training time, for several sizes of the forward network; prints JSON.

    python benchmarks/equal_time.py [--data digits] [--budgets 500 1500] [--seeds 3] [--cases ...] [--out FILE]

A budget is the time of so many Gaussian steps. How long a step of each case takes is measured first, all in turn, and sets
its number of steps; the learning rate falls over that number. Everything else is the shipped configuration's. The best case
of the learned processes is to be chosen by the validation split; the test split is for the row that is reported. Bounds of
32 draws per sample with averaged weights; the CPU time of each training is in the JSON. Run on one thread
(OMP_NUM_THREADS=1).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import CONFIGS, QUIET, build_model, report, training_step
from nfdm_lightning.cli import main as lightning
from plugins_on_images import SETTINGS, SMALL_PREDICTOR, SMALL_PROCESS

CIFAR10_CPU = SETTINGS["cifar10_cpu"][1]


def forward_unet(*settings: str) -> list[str]:
    """Returns the command line's settings of a U-Net as forward network."""
    return ["--model.process.network=UNet", *(f"--model.process.network.{setting}" for setting in settings)]


# configuration and settings by name; the Gaussian first
CASES: dict[str, dict[str, tuple[str, list[str]]]] = {
    "digits": {
        "Gaussian": ("digits_gaussian", []),
        "NFDM, shipped MLP": ("digits_nfdm", []),
        "NFDM, U-Net of 1/16": ("digits_nfdm", forward_unet("channels=6", "multipliers=[1,2]")),
        "NFDM, U-Net of 1/4": ("digits_nfdm", forward_unet("channels=12", "multipliers=[1,2]")),
        "NFDM, U-Net of equal size": ("digits_nfdm", forward_unet("channels=24", "multipliers=[1,2]")),
        "SeparableNFDM, shipped MLP": ("digits_separable", []),
        "NDM, shipped MLP": ("digits_ndm", []),
    },
    "cifar10_cpu": {
        "Gaussian": ("cifar10_small_gaussian", CIFAR10_CPU),
        "NFDM, small U-Net": ("cifar10_small_nfdm", [*CIFAR10_CPU, *forward_unet(*SMALL_PROCESS)]),
        "NFDM, U-Net of equal size": ("cifar10_small_nfdm", [*CIFAR10_CPU, *forward_unet(*SMALL_PREDICTOR)]),
        "NDM, small U-Net": ("cifar10_small_ndm", [*CIFAR10_CPU, *forward_unet(*SMALL_PROCESS)]),
    },
}
BATCH, EVALUATED = {"digits": 64, "cifar10_cpu": 32}, {"digits": 10_000, "cifar10_cpu": 512}


def cost(data: str, names: list[str], rounds: int = 12) -> dict[str, float]:
    """Returns the time of a training step of each case over that of the first."""
    chosen = {name: CASES[data][name] for name in names}
    steps = {name: training_step(build_model(config, *rest), BATCH[data]) for name, (config, rest) in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if round_:
                times[name].append(time.process_time() - begin)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {name: value / middle[names[0]] for name, value in middle.items()}


def train(data: str, name: str, steps: int, seed: int) -> dict[str, float]:
    """Trains a case; returns bits/dim of both held-out splits, their standard errors, and the CPU seconds of training."""
    config, rest = CASES[data][name]
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), *QUIET, f"--trainer.default_root_dir={folder}", *rest]
        fit += ["--trainer.logger=false", f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.max_steps={steps}"]
        fit += ["--trainer.limit_val_batches=0"]
        begin = time.process_time()
        if lightning(fit) != 0:
            raise SystemExit(f"{name}, seed {seed}: the run failed")
        result = {"steps": steps, "cpu_seconds": time.process_time() - begin}
        for split in ("val", "test"):
            out = Path(folder) / f"{split}.json"
            measure = ["likelihood", f"--ckpt_path={folder}/checkpoints/last.ckpt", f"--split={split}", f"--out={out}"]
            measure += [f"--number={EVALUATED[data]}", "--estimators=bound", "--guard=0", "--consistency.samples=0"]
            if lightning([*measure, "--progress=false"]) != 0:
                raise SystemExit(f"{name}, seed {seed}: the evaluation failed")
            found = json.loads(out.read_text())["estimates"][0]
            result |= {split: found["bits_per_dim"], f"{split}_se": found["bits_per_dim_se"]}
    return result


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(CASES), default="digits")
    parser.add_argument("--budgets", type=int, nargs="+", default=[500, 1500], help="in Gaussian steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", help="names of cases; the Gaussian is always one")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    names = list(CASES[options.data]) if options.cases is None else ["Gaussian", *options.cases]
    costs = cost(options.data, names)
    print(f"cost of a step: {costs}", file=sys.stderr, flush=True)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {str(one): {name: [] for name in names} for one in options.budgets}
    for seed in range(options.seeds):
        for budget in options.budgets:
            for name in names:
                found = {"seed": seed, **train(options.data, name, round(budget / costs[name]), seed)}
                runs[str(budget)][name].append(found)
                print(f"budget {budget}: {name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    table = {
        budget: {
            name: {
                "val": statistics.mean(one["val"] for one in done),
                "test": statistics.mean(one["test"] for one in done),
                "test_std_over_seeds": statistics.stdev(one["test"] for one in done) if len(done) > 1 else None,
                "val_over_gaussian": [one["val"] - g["val"] for one, g in zip(done, cases["Gaussian"], strict=True)],
                "test_over_gaussian": [one["test"] - g["test"] for one, g in zip(done, cases["Gaussian"], strict=True)],
                "runs": done,
            }
            for name, done in cases.items()
        }
        for budget, cases in runs.items()
    }
    report({"data": options.data, "cost_of_a_step": costs, "budgets_in_gaussian_steps": table}, options.out)


if __name__ == "__main__":
    main()
