"""The report of ``lightning test``: one JSON file beside the checkpoint, with all that a number needs to be compared."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from nfdm_lightning.callbacks import FID, NLL
from nfdm_lightning.callbacks.training_record import holds_average, training_record
from nfdm_lightning.data import DataModule
from nfdm_lightning.dequantisation import WithDecoder
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.provenance import commit, versions


def report_path(checkpoint: Path) -> Path:
    """Returns where the report of a checkpoint is written: ``last.ckpt`` has ``last.test.json`` beside it."""
    return checkpoint.with_suffix(".test.json")


def build_report(trainer: Trainer, model: NeuralDiffusion, checkpoint: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns everything about a test run as plain data.

    The keys: ``metrics`` (the bound by term, in nats and bits/dim, with standard errors, as logged), ``bound`` (how it was
    evaluated), ``fid`` (the FID family, each number with its protocol), ``data``, ``checkpoint``, ``parameters``,
    ``training`` (data, settings, commit, samples and throughput of the run that made the checkpoint), ``code`` (commit and
    versions of the test), ``config`` (that of the test command).

    Args:
        trainer: after its test.
        model: what was tested.
        checkpoint: the file that it was loaded from.
        config: the configuration of the command line.
    """
    nll = [callback for callback in trainer.callbacks if isinstance(callback, NLL)]  # type: ignore[attr-defined]
    fid = [callback for callback in trainer.callbacks if isinstance(callback, FID)]  # type: ignore[attr-defined]
    data = trainer.datamodule  # type: ignore[attr-defined]
    stored = read_checkpoint(checkpoint)
    training = training_summary(stored)
    if isinstance(data, DataModule) and training.get("data"):
        seen, measured = training["data"], data.record()
        for name in sorted(seen.keys() & measured.keys()):
            if seen[name] != measured[name]:
                rank_zero_warn(
                    f"data: {name}={seen[name]} in training, but {measured[name]} in this test; the report has both"
                )
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "bound": {
            "of": density_name(model),
            "time": "continuous" if model.discrete_steps is None else f"{model.discrete_steps} steps",
            "dequantisation": WithDecoder().described(model.decoder),
            "draws_per_sample": [callback.test_draws for callback in nll],
            "seconds": [round(callback.seconds, 3) for callback in nll],
            "world_size": trainer.world_size,
            "precision": str(model.dtype).removeprefix("torch."),
            "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "matmul": torch.get_float32_matmul_precision()},
        },
        "fid": [result for callback in fid for result in callback.results],
        "data": data.record() if isinstance(data, DataModule) else None,
        "checkpoint": checkpoint_record(checkpoint, stored),
        "parameters": count_parameters(model),
        "training": training,
        "code": {"commit": commit(), **versions()},
        "config": config,
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes a report, whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(_plain(report), indent=2, default=str, allow_nan=False) + "\n")
    partial.replace(path)


def count_parameters(model: NeuralDiffusion) -> dict[str, int]:
    """Returns the number of parameters of the forward process, of predictor and volatility, and of all."""
    forward = sum(parameter.numel() for parameter in model.reverse.process.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"forward": forward, "reverse": total - forward, "total": total}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's content, its tensors left in the file until they are used."""
    stored: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return stored


def checkpoint_record(path: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Returns what a report says of a checkpoint and its content."""
    return {
        "file": str(path),
        "step": stored.get("global_step"),
        "weights": "average (EMA)" if holds_average(stored) else "raw",
    }


def density_name(model: NeuralDiffusion) -> str:
    """Returns what the likelihood of a model is of: -log p(x), or that given source or label."""
    given = ["source"] if model.reverse.process.takes_source else []
    if model.num_classes is not None:
        given.append("label")
    return f"-log p(x | {', '.join(given)})" if given else "-log p(x)"


def training_summary(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint says of its training, with the throughput; empty where it says nothing."""
    record = training_record(stored)
    seconds = record.get("seconds")
    return {**record, "samples_per_second": record["samples"] / seconds} if seconds else record


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it: what is not finite, as null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
