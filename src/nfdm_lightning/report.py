"""The report of ``lightning test``: one JSON file beside the checkpoint, with all that a number needs to be compared."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from nfdm_lightning.callbacks import FID, NLL, Throughput
from nfdm_lightning.data import DataModule
from nfdm_lightning.module import NeuralDiffusion

_PACKAGES = ("torch", "lightning", "torchmetrics", "torch-fidelity", "nfdm-lightning")


def report_path(checkpoint: Path) -> Path:
    """Returns where the report of a checkpoint is written: ``last.ckpt`` has ``last.test.json`` beside it."""
    return checkpoint.with_suffix(".test.json")


def build_report(trainer: Trainer, model: NeuralDiffusion, checkpoint: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns everything about a test run as plain data.

    The keys: ``metrics`` (the bound by term, in nats and bits/dim, with standard errors, as logged), ``bound`` (how it was
    evaluated), ``fid`` (the FID family, each number with its protocol), ``data``, ``checkpoint``, ``parameters``,
    ``training`` (samples seen and throughput), ``code`` (commit and versions), ``config``.

    Args:
        trainer: after its test.
        model: what was tested.
        checkpoint: the file that it was loaded from.
        config: the configuration of the command line.
    """
    nll = [callback for callback in trainer.callbacks if isinstance(callback, NLL)]  # type: ignore[attr-defined]
    fid = [callback for callback in trainer.callbacks if isinstance(callback, FID)]  # type: ignore[attr-defined]
    data = trainer.datamodule  # type: ignore[attr-defined]
    stored = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "bound": {
            "time": "continuous" if model.discrete_steps is None else f"{model.discrete_steps} steps",
            "dequantisation": _dequantisation(model),
            "draws_per_sample": [callback.test_draws for callback in nll],
            "seconds": [round(callback.seconds, 3) for callback in nll],
            "world_size": trainer.world_size,
            "precision": "float32" if model.dtype == torch.float32 else str(model.dtype).removeprefix("torch."),
        },
        "fid": [result for callback in fid for result in callback.results],
        "data": data.record() if isinstance(data, DataModule) else None,
        "checkpoint": {
            "file": str(checkpoint),
            "step": stored.get("global_step"),
            "weights": _weights(stored),
        },
        "parameters": count_parameters(model),
        "training": _training(stored),
        "code": {"commit": commit(), "python": platform.python_version(), **_versions()},
        "config": config,
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes a report, whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(report, indent=2, default=str) + "\n")
    partial.replace(path)


def count_parameters(model: NeuralDiffusion) -> dict[str, int]:
    """Returns the number of parameters of the forward process, of predictor and volatility, and of all."""
    forward = sum(parameter.numel() for parameter in model.reverse.process.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"forward": forward, "reverse": total - forward, "total": total}


def commit() -> str | None:
    """Returns the git commit of the package's source, marked if it was changed since; None where it is not from git."""
    folder = Path(__file__).resolve().parent
    try:
        done = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "."])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[0].stdout.strip() + (" with changes" if done[1].stdout.strip() else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found


def _dequantisation(model: NeuralDiffusion) -> str:
    if model.hparams["levels"] is None:
        return "none: continuous data"
    return f"none: discrete decoder over {model.hparams['levels']} levels"


def _weights(stored: dict[str, Any]) -> str:
    return "average (EMA)" if "current_model_state" in stored else "raw"


def _training(stored: dict[str, Any]) -> dict[str, Any]:
    counted = stored.get("callbacks", {}).get(Throughput.__qualname__)
    if not counted or not counted["seconds"]:
        return {}
    rate = counted["samples"] / counted["seconds"]
    return {**counted, "samples_per_second": rate}
