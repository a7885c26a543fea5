"""Test bits/dim of every plug-in on the digits: equal reverse network, equal steps, several seeds; prints JSON.

    python benchmarks/plugins_on_digits.py [--seeds 3] [--steps 1500] [--only ndm] [--out FILE]

Runs the shipped configurations through the command line's own entry point. Nothing is chosen on test data: the last
checkpoint (averaged weights) is evaluated.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nfdm_lightning.cli import main as lightning
from nfdm_lightning.module import NeuralDiffusion

PLUGINS = ("gaussian", "ndm", "nfdm")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUIET = ["--trainer.callbacks=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def one_run(plugin: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Trains and tests one plug-in with one seed."""
    config = ["--config", str(CONFIGS / f"digits_{plugin}.yaml"), f"--trainer.default_root_dir={folder}", *QUIET]
    begin = time.monotonic()
    fit = ["fit", *config, f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.max_steps={steps}"]
    if lightning(fit) != 0 or lightning(["test", *config, "--ckpt_path=last"]) != 0:
        raise SystemExit(f"{plugin}, seed {seed}: the run failed")
    results = json.loads((folder / "test.json").read_text())
    model = NeuralDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    parameters = {
        f"{part}_parameters": sum(p.numel() for p in getattr(model.reverse, part).parameters())
        for part in ("process", "predictor")
    }
    del results["checkpoint"]
    return {"seed": seed, **results, **parameters, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    """Runs everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", choices=PLUGINS)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    table: dict[str, object] = {}
    # seeds outside, plug-ins inside: a drift of the machine's speed falls on all alike
    runs: dict[str, list[dict[str, float]]] = {plugin: [] for plugin in ([options.only] if options.only else PLUGINS)}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            for plugin, done in runs.items():
                done.append(one_run(plugin, seed, options.steps, Path(scratch) / f"{plugin}_{seed}"))
    for plugin, done in runs.items():
        bits = [run["test/bits_per_dim"] for run in done]
        table[plugin] = {
            "test_bits_per_dim": statistics.mean(bits),
            "spread_over_seeds": statistics.stdev(bits) if len(bits) > 1 else None,
            "standard_error_over_data": statistics.mean(run["test/bits_per_dim_se"] for run in done),
            "runs": done,
        }
    text = json.dumps({"steps": options.steps, "threads": torch.get_num_threads(), "plugins": table}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
