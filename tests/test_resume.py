"""A run stopped by a signal and resumed ends with the weights of one never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import CONFIGS

FLOAT32 = True

STEPS = 60
ARGS = [
    "--config",
    str(CONFIGS / "toy2d_nfdm.yaml"),
    f"--trainer.max_steps={STEPS}",
    "--trainer.callbacks=null",
    "--model.predictor.network.dropout=0.1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.check_val_every_n_epoch=2",
    "--data.train_size=352",
    "--data.eval_size=32",
    "--data.batch_size=32",
    "--checkpoint.every_n_train_steps=1000",
]
# each step leaves a mark, and the one after which the run is to be stopped waits for it
DRIVER = """
import os, sys, time
import torch
torch.set_num_threads(1)
from lightning.pytorch import Callback, Trainer
from nfdm_lightning import cli, module

class Mark(Callback):
    def on_train_batch_end(self, trainer, *_):
        with open("steps.txt", "a") as file:
            file.write(f"{trainer.global_step}\\n")
        if trainer.global_step == int(os.environ.get("STOP_AFTER", -1)):
            time.sleep(5)  # the signal comes now

original = cli.NfdmCLI._instantiate_trainer
cli.NfdmCLI._instantiate_trainer = lambda self, config, extra: original(self, config, [Mark(), *extra])
sys.exit(cli.main(sys.argv[1:]))
"""


def start(folder: Path, *extra: str, stop_after: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "fit", *ARGS, *extra],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STOP_AFTER": str(stop_after)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *extra: str) -> dict[str, dict[str, torch.Tensor]]:
    process = start(folder, *extra)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    path = folder / "runs" / "toy2d_nfdm" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def steps(folder: Path) -> list[int]:
    path = folder / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder)


@pytest.mark.parametrize(
    ("number", "status", "after"), [(signal.SIGTERM, 143, 17), (signal.SIGTERM, 143, 33), (signal.SIGINT, 130, 25)]
)
def test_stopped_and_resumed_is_as_never_stopped(number, status, after, whole, tmp_path):
    process = start(tmp_path, stop_after=after)
    begin = time.monotonic()
    while len(steps(tmp_path)) < after:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begin < 240
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert "continue with --ckpt_path=last" in output
    assert "Traceback" not in output
    stopped = steps(tmp_path)[-1]
    assert after <= stopped < STEPS
    resumed = run(tmp_path, "--ckpt_path=last")
    assert steps(tmp_path) == list(range(1, STEPS + 1))  # no step twice, none left out
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), f"{part}: {name}"
    record = resumed["callbacks"]["TrainingRecord"]
    assert record["samples"] == STEPS * 32
    assert 0 < record["seconds"] < 240  # not since the machine was started
    for key, group in whole["optimizer_states"][0]["state"].items():
        for name, value in group.items():
            assert torch.equal(resumed["optimizer_states"][0]["state"][key][name], value)
