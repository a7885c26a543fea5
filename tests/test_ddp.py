"""Two processes on the CPU: the bound of one, and the gradient of the joint batch."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import CONFIGS
from nfdm_lightning.cli import main

FLOAT32 = True

SMALL = [
    "--config",
    str(CONFIGS / "digits_nfdm.yaml"),
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--data.eval_batch_size=64",
    "--model.predictor.network.channels=8",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=2",
    "--nll.draws=1",
    "--nll.test_draws=2",
]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]

GRADIENTS = """
import sys, torch
torch.set_num_threads(1)
from functools import partial
from lightning.pytorch import Callback, Trainer
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.processes import NFDM
from nfdm_lightning.predictor import XPrediction
from nfdm_lightning.bound import Draws
from nfdm_lightning.data import Toy2D

devices, out = int(sys.argv[1]), sys.argv[2]

class Fixed(NeuralDiffusion):
    # the same random numbers for a sample wherever it is, so that the two runs are comparable
    def bound(self, x, draws=None):
        t = (x[:, 0] * 0.5 + 0.5).frac().abs().clamp(0.01, 0.99)
        return super().bound(x, Draws(t, x.flip(1).sin() * 2, x.cos()))

class Keep(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.is_global_zero and trainer.global_step == 0:
            torch.save({n: p.grad.clone() for n, p in pl_module.named_parameters()}, out)

if __name__ == "__main__":
    torch.manual_seed(0)
    network = partial(ResidualMLP, width=16, depth=1)
    process, predictor = partial(NFDM, network=network), partial(XPrediction, network=network)
    model = Fixed((2,), data_std=2.0, decoder_std=0.01, process=process, predictor=predictor)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    data = Toy2D(train_size=64, eval_size=4, batch_size=64 // devices)
    Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, callbacks=[Keep()], limit_val_batches=0).fit(model, data)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def lightning(folder: Path, *args: str) -> None:
    command = [sys.executable, "-m", "nfdm_lightning", *args]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_ranks_train_and_measure_the_bound_of_one(tmp_path, monkeypatch):
    lightning(tmp_path, "fit", *SMALL, *TWO, "--trainer.max_steps=3")
    run = tmp_path / "runs" / "digits_nfdm"
    lightning(tmp_path, "test", *SMALL, *TWO, "--ckpt_path=last")
    two = json.loads((run / "checkpoints" / "last.test.json").read_text())["metrics"]
    monkeypatch.chdir(tmp_path)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "last.test.json"}
    assert main(["test", *SMALL, "--trainer.callbacks=null", "--ckpt_path=last"]) == 0
    one = json.loads((run / "checkpoints" / "last.test.json").read_text())["metrics"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, float):
            torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_two_ranks_take_the_gradient_of_the_joint_batch(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    run = partial(subprocess.run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    for devices in (1, 2):
        done = run([sys.executable, str(script), str(devices), f"{devices}.pt"])
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (torch.load(tmp_path / f"{devices}.pt", weights_only=True) for devices in (1, 2))
    assert max(value.abs().max() for value in one.values()) > 0.1
    for name, value in one.items():
        error = (two[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: {error}"


FALLS = """
import os, signal
from lightning.pytorch import Callback

class Falls(Callback):
    def __init__(self, rank: int = 1):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(f"pid{trainer.global_rank}", "w") as file:
            file.write(str(os.getpid()))
        trainer.strategy.barrier()
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_others(tmp_path, rank):
    (tmp_path / "falls.py").write_text(FALLS)
    args = ["fit", *SMALL, *TWO, "--trainer.max_steps=1000", "--trainer.limit_train_batches=1.0"]
    args += [f"--trainer.callbacks=[{{class_path: falls.Falls, init_args: {{rank: {rank}}}}}]"]
    command = [sys.executable, "-m", "nfdm_lightning", *args]
    with open(tmp_path / "screen", "w") as screen:  # a pipe would stay open in a process that hangs
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=screen, stderr=subprocess.STDOUT, timeout=300, check=False
        )
    assert done.returncode != 0
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    for _ in range(600):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"still running a minute later: {(tmp_path / 'screen').read_text()}")


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
