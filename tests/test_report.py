"""The report of a test run says all that its numbers need, and the throughput of the training before it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nfdm_lightning
from conftest import CONFIGS
from nfdm_lightning.callbacks import Throughput
from nfdm_lightning.cli import main

FLOAT32 = True


class MeanColours(nn.Module):
    """Eight features of an image: means of its rows."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 3))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("report")
    args = ["--config", str(CONFIGS / "digits_nfdm.yaml"), f"--trainer.default_root_dir={folder}"]
    args += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    features = {"class_path": "NetworkFeatures", "init_args": {"network": "test_report.MeanColours"}}
    features["init_args"] |= {"name": "rows", "num_features": 8}
    solvers = [{"class_path": name, "init_args": {"nfe": 2}} for name in ("Ancestral", "Heun")]
    fid = {"class_path": "FID", "init_args": {"features": features, "solvers": solvers, "number": 20, "cache": str(folder)}}
    args += [f"--trainer.callbacks={json.dumps([fid])}"]
    assert main(["fit", *args, "--trainer.max_steps=4", "--nll.draws=1", "--trainer.limit_val_batches=1"]) == 0
    assert main(["test", *args, "--ckpt_path=last", "--nll.test_draws=2"]) == 0
    content = json.loads((folder / "checkpoints" / "last.test.json").read_text())
    assert not list(folder.rglob("*.partial"))
    return content


def test_the_bound_comes_with_its_conditions(report):
    assert report["metrics"]["test/bits_per_dim"] > report["metrics"]["test/bits_per_dim_se"] > 0
    assert report["bound"]["time"] == "continuous"
    assert report["bound"]["dequantisation"] == "none: discrete decoder over 17 levels"
    assert report["bound"]["draws_per_sample"] == [2]
    assert report["bound"]["seconds"][0] > 0


def test_distances_come_with_their_protocol(report):
    assert [(one["solver"]["class"], one["nfe"]) for one in report["fid"]] == [("Ancestral", 2), ("Heun", 2)]
    for one in report["fid"]:
        assert one["metric"] == "fd_rows"
        assert one["number"] == 20
        assert one["value"] == pytest.approx(report["metrics"][f"test/fd_rows@{one['solver']['class']}2"], rel=1e-5)


def test_data_weights_and_code_are_named(report):
    assert report["data"]["flip"] is False
    assert len(report["data"]["checksum"]) == 32
    assert report["checkpoint"]["step"] == 4
    assert report["checkpoint"]["weights"] == "average (EMA)"
    parameters = report["parameters"]
    assert parameters["total"] == parameters["forward"] + parameters["reverse"] > parameters["forward"] > 0
    assert report["config"]["model"]["process"]["class_path"].endswith("NFDM")
    assert torch.__version__.startswith(report["code"]["torch"])
    root = Path(nfdm_lightning.__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    assert (report["code"]["commit"] or "").startswith(git.stdout.strip())


def test_throughput_counts_every_sample_of_the_training(report):
    training = report["training"]
    assert training["samples"] == 4 * 64
    assert training["samples_per_second"] == pytest.approx(training["samples"] / training["seconds"])


def test_throughput_goes_on_after_a_stop():
    first, second = Throughput(), Throughput()
    first.samples, first.seconds = 10, 2.5
    second.load_state_dict(first.state_dict())
    assert (second.samples, second.seconds) == (10, 2.5)
