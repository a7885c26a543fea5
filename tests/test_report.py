"""The report of a test run says all that its numbers need, and the throughput of the training before it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nfdm_lightning
from conftest import CONFIGS, small_data, small_model, small_trainer
from nfdm_lightning.callbacks import EMA, TrainingRecord
from nfdm_lightning.callbacks.training_record import holds_average, training_record
from nfdm_lightning.cli import main
from nfdm_lightning.provenance import commit
from nfdm_lightning.report import write_report

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


def test_the_training_is_described_as_it_was(report):
    training = report["training"]
    assert training["data"] == report["data"]
    assert training["commit"] == report["code"]["commit"]
    assert (training["processes"], training["batch_size"], training["precision"]) == (1, 64, "32-true")
    assert training["ema_decay"] == 0.999


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_weights_are_an_average_only_where_they_were_averaged(tmp_path, decay):
    trainer = small_trainer(tmp_path, callbacks=[TrainingRecord(), EMA(decay)], enable_checkpointing=False, max_steps=2)
    trainer.fit(small_model(), small_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert training_record(checkpoint)["ema_decay"] == decay
    assert holds_average({**checkpoint, "current_model_state": {}}) == (decay > 0)
    assert not holds_average({"state_dict": {}})


def test_the_commit_is_not_that_of_another_project(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    inside = tmp_path / ".venv" / "nfdm_lightning"
    inside.mkdir(parents=True)
    (inside / "provenance.py").touch()
    (tmp_path / ".gitignore").write_text(".venv\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    assert commit(inside) is None
    subprocess.run([*git, "add", "-f", "."], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "ours"], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert commit(inside) == head.strip()
    (inside / "provenance.py").write_text("changed")
    assert commit(inside) == f"{head.strip()} with changes"


def test_what_is_not_finite_is_null(tmp_path):
    write_report({"metrics": {"test/fid": float("nan")}, "fid": [{"value": float("inf")}]}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"metrics": {"test/fid": None}, "fid": [{"value": None}]}
