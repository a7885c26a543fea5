"""Every shipped configuration is really run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CONFIGS
from nfdm_lightning.cli import main

FLOAT32 = True

FILES = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_configurations():
    assert {path.stem for path in FILES} >= {
        f"{data}_{process}"
        for data in ("toy2d", "digits")
        for process in ("gaussian", "ndm", "nfdm", "nfdm_ot", "flow_nfdm", "separable", "mulan", "bridge")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
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
    assert json.loads((run / "test.json").read_text())["test/bits_per_dim"] > 0
    assert {picture.name for picture in (run / "pictures").iterdir()} == {"samples_test.png", "trajectories_test.png"}
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
