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
    "AffineCoupling": {"layers": 2},
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


def shrink(part: dict[str, Any]) -> None:
    """Makes every network in a part of a configuration tiny."""
    part.get("init_args", {}).update(TINY.get(part.get("class_path", ""), {}))
    for value in part.values():
        if isinstance(value, dict):
            shrink(value)


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
    shrink(config["model"])
    if path.stem.startswith("celebahq256"):  # two resolutions of six: 256x256 is much for a CPU
        config["model"]["predictor"]["init_args"]["network"]["init_args"].update(multipliers=[1, 1], attention=[])
    for callback in config["trainer"]["callbacks"]:
        callback["init_args"]["number"] = 2
        if callback["class_path"] == "SampleGrid":
            callback["init_args"]["every_n_epochs"] = 1
    parts = ("target", "source") if config["data"]["class_path"] == "Pairs" else ()
    for part in [config["data"]["init_args"][name] for name in parts] or [config["data"]]:
        part.setdefault("init_args", {})["verify"] = False
    config["data"]["init_args"].update(batch_size=2, eval_batch_size=2)
    config["trainer"].update(accelerator="cpu", max_steps=2, limit_train_batches=2, limit_val_batches=1)
    config["trainer"].update(check_val_every_n_epoch=1, enable_progress_bar=False, num_sanity_val_steps=0)
    if path.stem != "cifar10_ndm":  # the mixed precision of the others is slow on a CPU
        config["trainer"]["precision"] = "32-true"
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(config))
    monkeypatch.setattr("nfdm_lightning.solvers._check_budget", lambda nfe, per_step=1: 2)
    assert main(["fit", "--config", str(tiny), "--nll.draws=1"]) == 0
    run = tmp_path / "runs" / path.stem
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert any((run / "pictures").iterdir())
