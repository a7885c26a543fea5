"""Every shipped configuration is really built, with its real networks, and really run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from conftest import CONFIGS
from nfdm_lightning.cli import NfdmCLI, main
from standins import STANDINS, write_standin

FLOAT32 = True

FILES = sorted(CONFIGS.glob("*.yaml"))
WITHOUT_FILES = ("toy2d", "digits")
LIGHT = [path for path in FILES if path.stem.startswith(WITHOUT_FILES)]
IMAGES = [path for path in FILES if not path.stem.startswith(WITHOUT_FILES)]
TINY = {
    "UNet": {"channels": 8, "blocks": 1, "head_channels": 4},
    "VDMUNet": {"channels": 8, "blocks": 2},
    "DiT": {"width": 16, "depth": 1, "heads": 2, "patch": 16},
}


def test_there_are_configurations():
    plugins = ("gaussian", "ndm", "nfdm", "nfdm_ot", "flow_nfdm", "separable", "mulan", "bridge")
    basic = plugins[:3]
    benchmarks = {"toy2d": plugins, "digits": plugins, "cifar10": plugins, "afhq64": (*basic, "bridge")}
    benchmarks |= dict.fromkeys(
        ("mnist", "fashion_mnist", "cifar10_small", "imagenet32", "imagenet64", "celebahq256"), basic
    )
    expected = {f"{data}_{process}" for data, processes in benchmarks.items() for process in processes}
    assert expected <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_configuration_trains_measures_and_samples(path: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nfdm_lightning.solvers._check_budget", lambda nfe, per_step=1: 2)  # pictures of two steps
    args = ["--config", str(path), "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    few = ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--nll.draws=1", "--nll.test_draws=1"]
    few += ["--data.eval_batch_size=16"]
    assert main(["fit", *args, *few, "--trainer.max_steps=3"]) == 0
    run = tmp_path / "runs" / path.stem
    assert main(["test", *args, *few, "--ckpt_path=last"]) == 0
    assert main(["sample", f"--ckpt_path={run}/checkpoints/last.ckpt", "--number=3"]) == 0
    assert len(np.load(run / "samples" / "samples.npy")) == 3
    assert json.loads((run / "checkpoints" / "last.test.json").read_text())["metrics"]["test/bits_per_dim"] > 0
    assert {picture.name for picture in (run / "pictures").iterdir()} == {"samples_test.png", "trajectories_test.png"}
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_configuration_builds_with_its_real_networks(path: Path, tmp_path, monkeypatch):
    """On the meta device, which holds shapes alone."""
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        args = ["--config", str(path), "--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.logger=false"]
        model = NfdmCLI(args, run=False).model
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e5


def shrink(part: dict[str, Any], place: str) -> list[str]:
    """Returns the settings that make every network of a part of the configuration tiny."""
    settings: list[str] = []
    for name, value in part.get("init_args", {}).items():
        if not isinstance(value, dict) or "class_path" not in value:
            continue
        if value["class_path"] in TINY:
            settings += [f"{place}.{name}.{key}={number}" for key, number in TINY[value["class_path"]].items()]
        else:
            settings += shrink(value, f"{place}.{name}")
    return settings


@pytest.fixture(scope="module")
def standins(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in STANDINS:
        write_standin(name, root)
    return root


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_configuration_trains_on_a_stand_in(path: Path, standins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NFDM_DATA", str(standins))
    config = yaml.safe_load(path.read_text())
    data, model = config["data"], config["model"]
    parts = ("target", "source") if data["class_path"] == "Pairs" else ()
    args = [f"--data.{part}.verify=false" for part in parts] or ["--data.verify=false"]
    for name in ("process", "predictor"):
        args += shrink(model[name], f"--model.{name}")
    args += ["--data.batch_size=2", "--data.eval_batch_size=2", "--nll.draws=1", "--nll.test_draws=1"]
    args += ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    args += ["--trainer.max_steps=2", "--trainer.limit_train_batches=2", "--trainer.check_val_every_n_epoch=1"]
    monkeypatch.setattr("nfdm_lightning.solvers._check_budget", lambda nfe, per_step=1: 2)
    assert main(["fit", "--config", str(path), *args]) == 0
    run = tmp_path / "runs" / path.stem
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert any((run / "pictures").iterdir())
