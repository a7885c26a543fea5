"""Every plug-in for 1,000 steps on the toy at the extremes of batch size and learning rate: is every value finite? JSON.

    python benchmarks/stress.py [--steps 1000] [--plugins mulan ...] [--batch-sizes 2 1024] [--lrs 1e-4 3e-3] [--set ...]
        [--out FILE]

The shipped configurations through the command line's own entry point; its health check stops a run at the first loss or
gradient that is not finite. ``first`` and ``last`` are means of the bits/dim over the first and last 50 training steps,
``largest`` is the largest of a step.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from common import CONFIGS, report
from nfdm_lightning.cli import NfdmCLI
from nfdm_lightning.errors import NonFiniteError

PLUGINS = ("gaussian", "ndm", "ndm_discrete", "nfdm", "nfdm_ot", "flow_nfdm", "separable", "mulan", "bridge", "obstacle")


class Losses(Callback):
    """Keeps the bits/dim of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/bits_per_dim"]))


def run(plugin: str, batch_size: int, lr: float, steps: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Trains once; returns how it went."""
    args = ["--config", str(CONFIGS / f"toy2d_{plugin}.yaml"), f"--trainer.default_root_dir={folder}"]
    args += [f"--trainer.max_steps={steps}", f"--data.batch_size={batch_size}", f"--model.lr={lr}"]
    args += ["--trainer.callbacks=null", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    args += [f"--{setting}" for setting in settings]
    losses, begin, fault = Losses(), time.monotonic(), ""
    cli = NfdmCLI(args, run=False)  # only parses and builds, so that a callback can be added
    cli.trainer.callbacks.append(losses)  # type: ignore[attr-defined]
    try:
        cli.trainer.fit(cli.model, cli.datamodule)
    except NonFiniteError as error:
        fault = str(error)
    values = losses.values
    return {
        "finite": not fault and len(values) == steps,
        "fault": fault,
        "first": statistics.fmean(values[:50] or [math.nan]),
        "last": statistics.fmean(values[-50:] or [math.nan]),
        "largest": max(values, default=math.nan),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    """Runs everything and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, default=list(PLUGINS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 1024])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-4, 3e-3])
    parser.add_argument("--set", nargs="*", default=[], help="more settings, such as model.predictor.network.width=32")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for plugin in chosen.plugins:
            for size in chosen.batch_sizes:
                for lr in chosen.lrs:
                    folder = Path(scratch) / f"{plugin}_{size}_{lr}"
                    result = run(plugin, size, lr, chosen.steps, folder, chosen.set)
                    rows.append({"plugin": plugin, "batch_size": size, "lr": lr, **result})
                    print(f"done: {rows[-1]}", flush=True)
    finite = sum(row["finite"] for row in rows)
    report({"steps": chosen.steps, "settings": chosen.set, "runs": len(rows), "finite": finite, "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()
