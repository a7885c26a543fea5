"""What the benchmarks share: training through the command line's own entry point, and a summary over seeds."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nfdm_lightning.cli import NfdmCLI
from nfdm_lightning.cli import main as lightning
from nfdm_lightning.module import NeuralDiffusion

PLUGINS = ("gaussian", "ndm", "nfdm")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUIET = ["--trainer.callbacks=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def train_and_test(
    config: str, seed: int, steps: int, folder: Path, extra: Sequence[str] = ()
) -> tuple[NeuralDiffusion, dict[str, float]]:
    """Trains and tests a shipped configuration; returns the model with averaged weights and the test metrics.

    Nothing is chosen on test data: the last checkpoint is evaluated.
    """
    common = ["--config", str(CONFIGS / f"{config}.yaml"), f"--trainer.default_root_dir={folder}", *extra, *QUIET]
    fit = ["fit", *common, f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.max_steps={steps}"]
    if lightning(fit) != 0 or lightning(["test", *common, "--ckpt_path=last"]) != 0:
        raise SystemExit(f"{config}, seed {seed}: the run failed")
    results: dict[str, float] = json.loads((folder / "checkpoints" / "last.test.json").read_text())["metrics"]
    return NeuralDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval(), results


def build_model(config: str, *settings: str) -> NeuralDiffusion:
    """Returns the untrained model of a shipped configuration with settings of the command line, on the CPU in float32."""
    args = ["--config", str(CONFIGS / f"{config}.yaml"), "--trainer.logger=false", "--trainer.accelerator=cpu"]
    model = NfdmCLI([*args, "--trainer.precision=32", *settings], run=False).model
    assert isinstance(model, NeuralDiffusion)
    return model


def training_step(model: NeuralDiffusion, batch_size: int) -> Callable[[], None]:
    """Returns a function that does one training step of the model, on random data: bound, backward pass, AdamW."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.train().parameters():  # none is zero: a zeroed last layer would make zeros of all gradients
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    x = torch.randn(batch_size, *model.reverse.shape)
    if levels := model.hparams["levels"]:
        x = torch.randint(0, levels, x.shape) * 2 / (levels - 1) - 1

    def step() -> None:
        optimiser.zero_grad()
        model.bound(x).nats.mean().backward()
        optimiser.step()

    return step


def options(description: str, steps: int) -> argparse.Namespace:
    """Parses the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, default=list(PLUGINS))
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


def compare(run: Callable[[str, int], dict[str, float]], plugins: list[str], seeds: int) -> dict[str, Any]:
    """Runs every plug-in with every seed and returns mean and spread of each number, with the single runs.

    Seeds outside, plug-ins inside: a drift of the machine's speed falls on all alike.
    """
    runs: dict[str, list[dict[str, float]]] = {plugin: [] for plugin in plugins}
    for seed in range(seeds):
        for plugin, done in runs.items():
            done.append({"seed": seed, **run(plugin, seed)})
            print(f"done: {plugin} {json.dumps(done[-1])}", file=sys.stderr, flush=True)  # a run is not lost with the rest
    table: dict[str, Any] = {}
    for plugin, done in runs.items():
        columns = {name: [one[name] for one in done] for name in done[0] if name != "seed"}
        table[plugin] = {
            "mean": {name: statistics.mean(column) for name, column in columns.items()},
            "std_over_seeds": {name: statistics.stdev(column) for name, column in columns.items()} if seeds > 1 else None,
            "runs": done,
        }
    return table


def report(result: dict[str, Any], out: Path | None) -> None:
    """Prints a result as JSON with what it was made on, and writes it to a file if one is named."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    text = json.dumps({"machine": {**machine, "processor": platform.machine()}, **result}, indent=2)
    if out:
        out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
