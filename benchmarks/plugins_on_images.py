"""Gaussian, NDM and NFDM on MNIST or CIFAR-10: equal reverse networks, steps and batches; prints JSON.

    python benchmarks/plugins_on_images.py mnist        --root DATA --folder RUNS --steps 1000
    python benchmarks/plugins_on_images.py cifar10      --root DATA --folder RUNS --steps 15000 --resnet WEIGHTS
    python benchmarks/plugins_on_images.py cifar10_cpu  --root DATA --folder RUNS --steps 1500 --resnet WEIGHTS

``cifar10`` is configs/cifar10_small_*.yaml, for a GPU; ``cifar10_cpu`` makes its networks and batches smaller. CIFAR-10 is
split into 45,000 images for training and 5,000 held out, on which the last checkpoint is measured; MNIST is measured on its
test images. Nothing is chosen on them. With ``--resnet``, the weights of a CIFAR ResNet-56, the Frechet distance between its
features of samples and of the training images is measured too: that is not FID. A run that is in the folder is continued,
or only measured if it is complete.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from common import CONFIGS, PLUGINS, report
from nfdm_lightning.cli import main as lightning
from nfdm_lightning.report import report_path

SMALL_PREDICTOR = ("channels=32", "blocks=1", "multipliers=[1,2,2]", "attention=[]")
SMALL_PROCESS = ("channels=8", "multipliers=[1,2]")
SETTINGS = {
    "mnist": ("mnist", []),
    "cifar10": ("cifar10_small", ["--data.protocol=held_out"]),
    "cifar10_cpu": (
        "cifar10_small",
        [
            *["--data.protocol=held_out", "--data.batch_size=32", "--trainer.precision=32"],
            *["--model.lr=1e-3", "--model.warmup_steps=100"],
            *(f"--model.predictor.network.{setting}" for setting in SMALL_PREDICTOR),
        ],
    ),
}


def run(benchmark: str, plugin: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Trains, or continues, and measures one plug-in; returns its row."""
    stem, extra = SETTINGS[benchmark]
    folder = chosen.folder / f"{benchmark}_{plugin}"
    common = ["--config", str(CONFIGS / f"{stem}_{plugin}.yaml"), f"--trainer.default_root_dir={folder}", *extra]
    common += [f"--data.root={chosen.root}", f"--trainer.max_steps={chosen.steps}", "--trainer.enable_progress_bar=false"]
    common += ["--trainer.enable_model_summary=false"]
    if benchmark == "cifar10_cpu" and plugin != "gaussian":
        common += [f"--model.process.network.{setting}" for setting in SMALL_PROCESS]
    last = folder / "checkpoints" / "last.ckpt"
    done = torch.load(last, weights_only=True, map_location="cpu")["global_step"] if last.is_file() else 0
    if done < chosen.steps:
        fit = ["fit", *common, "--trainer.callbacks=null", "--trainer.limit_val_batches=0"]
        if lightning(fit + (["--ckpt_path=last"] if done else [])) != 0:
            raise SystemExit(f"{plugin}: the training failed")
    callbacks: list[dict[str, Any]] = [{"class_path": "SampleGrid", "init_args": {"number": 64}}]
    if chosen.resnet:
        features = {"class_path": "CifarResNet", "init_args": {"weights": str(chosen.resnet)}}
        solvers = [{"class_path": name, "init_args": {"nfe": chosen.nfe}} for name in ("Ancestral", "Heun")]
        settings = {"features": features, "solvers": solvers, "number": chosen.samples}
        callbacks.append({"class_path": "FID", "init_args": settings})
    test = ["test", *common, f"--trainer.callbacks={json.dumps(callbacks)}", "--ckpt_path=last"]
    if lightning([*test, f"--nll.test_draws={chosen.draws}"]) != 0:
        raise SystemExit(f"{plugin}: the test failed")
    found = json.loads(report_path(last).read_text())
    return {name: found[name] for name in ("metrics", "parameters", "training", "bound", "fid", "data", "checkpoint")}


def main() -> None:
    """Runs every plug-in and prints the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=list(SETTINGS))
    parser.add_argument("--root", required=True, help="folder of the benchmarks' data")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, default=list(PLUGINS))
    parser.add_argument("--draws", type=int, default=4, help="of the bound for each test image")
    parser.add_argument("--resnet", type=Path, help="weights of the CIFAR ResNet-56")
    parser.add_argument("--samples", type=int, default=1000, help="samples for the distance")
    parser.add_argument("--nfe", type=int, default=50, help="evaluations for each of them")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    chosen = parser.parse_args()
    rows = {plugin: run(chosen.benchmark, plugin, chosen) for plugin in chosen.plugins}
    report({"benchmark": chosen.benchmark, "steps": chosen.steps, "plugins": rows}, chosen.out)


if __name__ == "__main__":
    main()
