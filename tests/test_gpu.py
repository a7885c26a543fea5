"""On a GPU: the numbers of the CPU, and a whole run."""

import pytest
import torch
from lightning.pytorch import Callback

from conftest import CONFIGS, PROCESSES, batch, gaussian_data_model, perturb, small_data, small_model, small_trainer
from nfdm_lightning.bound import random_draws, variational_bound
from nfdm_lightning.callbacks import EMA
from nfdm_lightning.cli import main
from nfdm_lightning.decoder import GaussianDecoder
from nfdm_lightning.likelihood import ODE, Bound, ImportanceWeighted
from nfdm_lightning.solvers import Adaptive, Ancestral, Euler, EulerMaruyama, Heun, TorchSDE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_bound_and_samples_are_those_of_the_cpu(process_name):
    process = PROCESSES[process_name]((3,))
    perturb(process)
    reverse = gaussian_data_model(process, 1.0)
    _, _, x = batch((3,), process=process)
    solvers = (Euler(6), Heun(6), EulerMaruyama(6), Ancestral(6), TorchSDE(7), Adaptive(1e-6, 1e-6))
    results = []
    for device in ("cpu", "cuda"):
        reverse.to(device)
        draws = random_draws(process.split(x.to(device))[0], torch.Generator().manual_seed(0))
        parts = [variational_bound(reverse, GaussianDecoder(), x.to(device), draws).nats]
        for solver in solvers[:4] + solvers[5:]:
            given = reverse.given(process.split(x.to(device))[1])
            z = given.prior(4, torch.Generator().manual_seed(1))
            parts.append(solver.solve(given, z, torch.Generator().manual_seed(2)).z)
        assert all(part.device.type == device for part in parts)
        results.append([part.detach().cpu() for part in parts])
        solvers[4].solve(given, given.prior(4))  # torchsde has its own random numbers
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    args = ["--config", str(CONFIGS / "digits_nfdm.yaml"), "--trainer.accelerator=gpu", "--trainer.devices=1"]
    assert main(["fit", *args, "--trainer.max_steps=5"]) == 0
    assert main(["test", *args, "--ckpt_path=last", "--nll.test_draws=2"]) == 0
    assert main(["sample", "--ckpt_path=runs/digits_nfdm/checkpoints/last.ckpt", "--number=4"]) == 0


def test_the_average_is_on_the_device_of_the_model(tmp_path):
    torch.set_default_dtype(torch.float32)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))
            seen.append({parameter.device.type for parameter in ema._average_model.parameters()})

    trainer = small_trainer(tmp_path, accelerator="gpu", callbacks=[EMA(), Look()])
    trainer.fit(small_model(), small_data())
    assert seen == [{"cuda"}] * 5


def test_likelihoods_are_those_of_the_cpu():
    reverse = gaussian_data_model(PROCESSES["nfdm"]((3,)), 1.0)
    perturb(reverse.process)
    _, _, x = batch((3,))
    estimators = (Bound(2), ImportanceWeighted(2, 5), ODE(rtol=1e-7, atol=1e-7), ODE(trace="hutchinson"))
    results = []
    for device in ("cpu", "cuda"):
        reverse.to(device)
        found = [one.evaluate(reverse, GaussianDecoder(), x.to(device), torch.arange(len(x))) for one in estimators]
        results.append([one.nats.cpu() for one in found])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
