"""Every plug-in learns the 8 Gaussians: the bound meets the entropy from above, and SDE and ODE both give the data."""

import json
import sys

import pytest
import torch

from conftest import CONFIGS
from nfdm_lightning.cli import main
from nfdm_lightning.data import EightGaussians
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.solvers import Euler, EulerMaruyama

sys.path.append(str(CONFIGS.parent / "benchmarks"))
from plugins_on_toy2d import sliced_wasserstein

FLOAT32 = True


def test_sliced_wasserstein_of_a_shift_and_a_scale():
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    # a shift by (3, 0) projects to 3 cos; its mean square over directions is 9 / 2
    assert sliced_wasserstein(x, x + torch.tensor([3.0, 0.0])) == pytest.approx(4.5**0.5, rel=1e-3)
    assert sliced_wasserstein(x, 2 * x) == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize("plugin", ["gaussian", "ndm", "nfdm"])
def test_bound_and_samples_on_the_eight_gaussians(plugin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--config", str(CONFIGS / f"toy2d_{plugin}.yaml"), "--trainer.callbacks=null", "--trainer.accelerator=cpu"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.default_root_dir=run", "--data.batch_size=256"]
    assert main(["fit", *args, "--trainer.max_steps=600", "--trainer.limit_val_batches=0"]) == 0
    assert main(["test", *args, "--ckpt_path=last", "--nll.test_draws=16"]) == 0
    results = json.loads((tmp_path / "run" / "checkpoints" / "last.test.json").read_text())["metrics"]
    excess = results["test/reconstruction_nats"] + results["test/diffusion_nats"] - EightGaussians().entropy()
    assert -3 * results["test/nats_se"] < excess < 1.0

    model = NeuralDiffusion.load_from_checkpoint("run/checkpoints/last.ckpt").eval()
    generator = torch.Generator().manual_seed(0)
    # benchmarks/plugins_on_toy2d.py does the same with 4,096 samples of 300 steps and several seeds
    fresh = EightGaussians().sample(2048, generator)
    least = sum(sliced_wasserstein(EightGaussians().sample(2048, generator), fresh) for _ in range(8)) / 8
    for solver in (EulerMaruyama(120), Euler(120)):
        samples, _ = model.sample(2048, solver, generator)
        assert sliced_wasserstein(samples, fresh) < 3 * least, type(solver).__name__
